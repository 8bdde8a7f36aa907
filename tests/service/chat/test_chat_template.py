"""A chat template's environment compared with ``transformers``', and messages that it would drop."""

import json
from typing import Any

import pytest
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _cached_compile_jinja_template

from server.service.chat.template import ChatTemplate, RoleDropped, TemplateRefusal, TooLong, environment
from tests.chat_templates import FAMILIES, LLAMA_3, MISTRAL, QWEN
from tests.checkpoints import byte_tokenizer

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " Hi \n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|> & 'ä' 😀\\n"}],
    [
        {"role": "user", "content": "1 + 1?", "name": None},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2", "reasoning": "so it is"},
        {"role": "user", "content": "and\r\nthen?"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}],
]


def template(source: str, most: int = 10**6) -> ChatTemplate:
    return ChatTemplate(source, byte_tokenizer().special_tokens_map, most)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("family", FAMILIES)
def test_it_renders_as_transformers_does(family: str, messages: list[dict[str, Any]]) -> None:
    expected = byte_tokenizer().apply_chat_template(
        messages, chat_template=FAMILIES[family], tokenize=False, add_generation_prompt=True
    )
    assert template(FAMILIES[family]).render(messages) == expected
    assert len(expected) > len(messages[-1]["content"])


def test_the_environment_has_what_transformers_has_and_no_more() -> None:
    theirs, ours = _cached_compile_jinja_template("").environment, environment()
    assert (ours.filters.keys(), ours.globals.keys()) == (theirs.filters.keys(), theirs.globals.keys())
    assert (ours.tests.keys(), type(ours)) == (theirs.tests.keys(), type(theirs))
    tags = [{tag for one in made.extensions.values() for tag in one.tags} for made in (ours, theirs)]
    assert tags[0] == tags[1]
    for name in ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "newline_sequence", "autoescape"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}.{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}.{{ x.y }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(_a=1) %}",
        "{% set n = namespace() %}{% set n._a = 1 %}",
        "{{ dict.__class__.__mro__ }}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(source: str) -> None:
    with pytest.raises(TemplateError):
        template(source + "{{ messages[0].content }}").render(CONVERSATIONS[0])
    with pytest.raises(TemplateError):
        byte_tokenizer().apply_chat_template(CONVERSATIONS[0], chat_template=source, tokenize=False)


def test_a_refusal_is_not_a_fault() -> None:
    twice = [{"role": "user", "content": "a"}] * 2
    with pytest.raises(TemplateRefusal, match="must alternate"):
        template(MISTRAL).render(twice)
    with pytest.raises(TemplateSyntaxError):
        template("{% if %}")
    with pytest.raises(TooLong):
        template("{{ messages[0].content * 1000 }}", most=999).render(CONVERSATIONS[0])


def system(content: str = "Be brief.") -> dict[str, str]:
    return {"role": "system", "content": content}


def developer(content: str = "Be brief.") -> dict[str, str]:
    return {"role": "developer", "content": content}


def user(content: str = "Hi") -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("family", ["smollm", "llama-3", "mistral", "qwen", "phi"])
def test_a_developer_message_is_one_of_the_system_where_the_template_knows_none(family: str) -> None:
    made = template(FAMILIES[family])
    assert made.render([developer(), user()]) == made.render([system(), user()])


def test_a_developer_message_stays_one_where_the_template_knows_it() -> None:
    knows = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{# developer #}"
    assert template(knows).render([developer(), user()]) == "developer: Be brief.;user: Hi;"
    both = "{% for m in messages if m.role in ('developer', 'user') %}{{ m.content }};{% endfor %}"
    assert template(both).render([developer(), user()]) == "Be brief.;Hi;"
    with pytest.raises(RoleDropped) as dropped:
        template(both).render([user(), system()])
    assert (dropped.value.index, dropped.value.role) == (1, "system")


def test_a_developer_message_stays_one_where_the_template_refuses_system() -> None:
    gemma = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    )
    assert template(gemma).render([developer(), user()]) == "developer: Be brief.;user: Hi;"
    with pytest.raises(TemplateRefusal, match="System role not supported"):
        template(gemma).render([system(), user()])


USER_ONLY = "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}"
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }};{% endif %}"
    "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }};{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "messages", "index", "role"),
    [
        (USER_ONLY, [developer(), user()], 0, "developer"),
        (USER_ONLY, [system(), user()], 0, "system"),
        (USER_ONLY, [user(), {"role": "assistant", "content": "Hi"}, user()], 1, "assistant"),
        (FIRST_SYSTEM, [user(), system()], 1, "system"),
        (FIRST_SYSTEM, [system(), developer(), user()], 1, "developer"),
        ("{{ messages[-1].content }}", [user(), user()], 0, "user"),
    ],
)
def test_a_dropped_message_is_an_error(
    source: str, messages: list[dict[str, str]], index: int, role: str
) -> None:
    with pytest.raises(RoleDropped) as dropped:
        template(source).render(messages)
    assert (dropped.value.index, dropped.value.role) == (index, role)
    assert template(source).render([user("alone")]).startswith("alone")


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (QWEN, "<think>secret</think>shown", "shown"),
        (LLAMA_3, "  trimmed \n", "\n\ntrimmed<|eot_id|>"),
        ("{% for m in messages %}{{ m.content | upper }};{% endfor %}", "loud", "LOUD;"),
        ("{% for m in messages %}{{ m.content | tojson }};{% endfor %}", 'quo"ted', '"quo\\"ted";'),
        ("{% for m in messages %}{{ m.content[:20] }};{% endfor %}", "x" * 50, "x" * 20 + ";"),
    ],
)
def test_a_template_may_change_the_contents_of_a_message(source: str, content: str, expected: str) -> None:
    text = template(source).render([user(), {"role": "assistant", "content": content}, user()])
    assert expected in text
    assert "secret" not in text


def test_a_template_that_wants_contents_of_a_kind_is_not_tried_with_others() -> None:
    picky = (
        "{% if messages[0].content[0] != '{' %}{{ raise_exception('no JSON') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    assert template(picky).render([user(json.dumps({"a": 1}))]) == '{"a": 1}'
