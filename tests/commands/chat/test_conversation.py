"""`bitdial chat` with a running server: turns, precisions, and what begins with a slash."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.commands.chat.conftest import Talk
from tests.conftest import PATIENCE, Loads, wait_until

TalkTo = Callable[..., Talk]
Serve = Callable[..., str]


def answer(url: str, *said: str, tokens: int = 6, precision: str = "fp32", system: str | None = None) -> str:
    """What the server answers to a conversation, by its own route."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "precision": precision}
    told = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE).json()
    return str(told["choices"][0]["message"]["content"])


@pytest.fixture
def url(serve: Serve, template: Path) -> str:
    return serve(chat_template=template)


def test_every_turn_is_part_of_the_next_question(url: str, talk: TalkTo) -> None:
    done = talk("hello", "and now", url=url, max_new_tokens=6)
    first = answer(url, "hello")
    assert done == Talk(f"{first}\n{answer(url, 'hello', first, 'and now')}\n", "", 0)


def test_the_precision_changes_in_mid_conversation(url: str, talk: TalkTo, loads: Loads) -> None:
    done = talk("hello", "/precision fp16", "hello", url=url, max_new_tokens=6)
    assert loads.names[-1] == "fp16"
    assert loads.runners["fp16"].batches
    first = answer(url, "hello")
    assert done.out.splitlines()[-1] == answer(url, "hello", first, "hello", precision="fp16")


def test_a_precision_is_known_by_its_aliases_and_shown_with_its_state(url: str, talk: TalkTo) -> None:
    done = talk("/precision half", "/precision", "/precision int3", url=url)
    assert "bf16              loaded" in done.out
    assert "nf4               unloaded" in done.out
    assert "there is no precision half; there are fp32, bf16" in done.err
    assert done.code == 1


def test_the_first_precision_is_the_servers_default_or_the_one_named(
    serve: Serve, template: Path, talk: TalkTo, loads: Loads
) -> None:
    url = serve(chat_template=template, precision="bf16", precisions="fp32,bf16")

    def steps() -> tuple[int, int]:
        return len(loads.runners["bf16"].batches), len(loads.runners["fp32"].batches)

    before = steps()
    talk("hello", url=url, max_new_tokens=6)
    assert steps() == (before[0] + 5, before[1])
    talk("hello", url=url, max_new_tokens=6, precision="fp32")
    assert steps() == (before[0] + 5, before[1] + 5)


def test_a_system_message_begins_the_conversation(url: str, talk: TalkTo) -> None:
    done = talk(
        "hi", "/system Be kind.", "/clear", "hi", "/system off", "/undo", "hi", url=url, max_new_tokens=6
    )
    lines = done.out.splitlines()
    assert [lines[0], lines[3], lines[6]] == [
        answer(url, "hi"),
        answer(url, "hi", system="Be kind."),
        answer(url, "hi"),
    ]
    assert "system message: Be kind." in lines
    assert "system message: none" in lines


def test_an_answer_is_repeated_without_becoming_part_of_the_question(url: str, talk: TalkTo) -> None:
    done = talk("hello", "/retry", url=url, max_new_tokens=6)
    assert done.out == f"{answer(url, 'hello')}\n" * 2


def test_sampling_is_set_by_the_names_of_the_api(url: str, talk: TalkTo) -> None:
    done = talk(
        "/set temperature 2", "/set seed 7", "hello", "/retry", "/set temperature off", "/retry",
        "/set heat 3", "/set top-p 2", url=url, max_new_tokens=6,
    )  # fmt: skip
    assert "max_new_tokens 6, temperature 2.0, top_k off, top_p off, seed 7\n" in done.out
    assert done.out.endswith(f"seed 7\n{answer(url, 'hello')}\n")
    assert "there is no heat; there are max_new_tokens, temperature" in done.err
    assert "top_p: Input should be less than 1" in done.err


def test_answers_are_compared_side_by_side(url: str, talk: TalkTo) -> None:
    done = talk("hello", "/compare bf16", "and now", url=url, max_new_tokens=6)
    assert "[fp32: 6 tokens, first after " in done.out
    assert "bf16 answers with the same text as fp32." in done.out
    first = answer(url, "hello")
    assert done.out.splitlines()[-1] == answer(url, "hello", first, "and now")


def test_answers_that_part_are_marked_where_they_do(url: str, talk: TalkTo, loads: Loads) -> None:
    wait_until(lambda: "bf16" in loads.runners)
    runner = loads.runners["bf16"]
    runner.next_id = lambda ids: 65 + len(ids) % 26  # type: ignore[method-assign]
    done = talk("hello", "/compare bf16", url=url, max_new_tokens=6)
    assert "fp32                                   │ bf16" in done.out
    assert done.out.count("▶") == 2


def test_stats_are_of_the_loaded_precisions(url: str, talk: TalkTo) -> None:
    lines = talk("hello", "/stats", url=url, max_new_tokens=6).out.splitlines()
    head, *rows = lines[1:4]
    assert head.split() == [
        "precision",
        "weights",
        "MB",
        "KV",
        "cache",
        "MB",
        "bits",
        "requests",
        "TTFT",
        "ms",
        "tok/s",
    ]
    assert [row.split()[:5] for row in rows] == [
        ["fp32", "0.0", "0.0", "32.00", "1"],
        ["bf16", "0.0", "0.0", "32.00", "0"],
    ]


def test_an_answer_becomes_shorter_at_the_contexts_end(url: str, talk: TalkTo) -> None:
    done = talk("x" * 120, url=url, max_new_tokens=250)  # a context of 256 tokens, of a byte each
    assert done.err == ""
    assert len(done.out) in (1 + 62, 1 + 125)


def test_a_conversation_beyond_the_context_is_an_error_and_goes_on(url: str, talk: TalkTo) -> None:
    done = talk("x" * 300, "hello", url=url, max_new_tokens=6)
    assert "maximum context length is 256 tokens" in done.err
    assert done.out == f"{answer(url, 'hello')}\n"
    assert done.code == 1


def test_a_model_without_template_continues_each_message(serve: Serve, talk: TalkTo) -> None:
    url = serve()
    body = {"prompt": "hello", "max_tokens": 6, "temperature": 0}
    told = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]["text"]
    done = talk("hello", "hello", "/system Be kind.", url=url, max_new_tokens=6)
    assert done.out == f"{told}\n" * 2
    assert "no chat template, and so no system message" in done.err
    assert talk(url=url, system="Be kind.").code == 1


def test_a_message_of_several_lines_is_in_quotes(url: str, talk: TalkTo) -> None:
    done = talk('"""', "a", "b", '"""', "//slash", url=url, max_new_tokens=6)
    first = answer(url, "a\nb")
    assert done.out == f"{first}\n{answer(url, 'a' + chr(10) + 'b', first, '/slash')}\n"


def test_what_the_model_says_cannot_move_the_cursor(url: str, talk: TalkTo, loads: Loads) -> None:
    loads.runners["fp32"].next_id = lambda ids: 27  # type: ignore[method-assign]
    assert "\x1b" not in talk("hello", url=url, max_new_tokens=6).out


def test_commands_that_do_not_exist_are_named(url: str, talk: TalkTo) -> None:
    done = talk("/nonsense", "/compare", "/retry", "/bye", "never", url=url)
    assert done.err.splitlines() == [
        "bitdial chat: there is no /nonsense: /help lists the commands; // begins a message with /",
        "bitdial chat: there is no answer yet to compare",
        "bitdial chat: there is no answer yet to repeat",
    ]
    assert done.out == ""


def test_help_lists_every_command(url: str, talk: TalkTo) -> None:
    listed = talk("/help", url=url).out
    for command in (
        "/precision",
        "/compare",
        "/stats",
        "/system",
        "/set",
        "/retry",
        "/undo",
        "/clear",
        "/bye",
    ):
        assert command in listed


def test_keys_are_sent_and_a_load_that_is_not_permitted_is_left_to_the_first_request(
    serve: Serve, template: Path, talk: TalkTo, monkeypatch: pytest.MonkeyPatch, loads: Loads
) -> None:
    url = serve(chat_template=template, api_key="opensesame")
    refused = talk("hello", url=url)
    assert (refused.out, refused.code) == ("", 1)
    assert "opensesame" not in refused.err
    assert talk("hello", url=url, api_key="opensesame").code == 0
    monkeypatch.setenv("API_KEY", "opensesame")
    assert talk("/precision fp16", "hello", url=url).code == 0
    assert loads.runners["fp16"].batches


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"url": "localhost:8080"}, "--url: 'localhost:8080' is not an address such as", 2),
        ({"url": "http://127.0.0.1:1"}, "no server at http://127.0.0.1:1: ", 1),
        ({"url": "http://127.0.0.1:1", "threads": "1"}, "--threads is not for a running server", 2),
        ({"model": "/nowhere"}, "'/nowhere' is neither 'bundled', nor an existing folder", 1),
        ({"temperature": 0}, "--temperature: ", 2),
    ],
)
def test_what_can_not_begin_is_one_line(
    options: dict[str, str], message: str, code: int, talk: TalkTo
) -> None:
    done = talk("hello", **options)
    assert message in done.err
    assert (done.out, done.code) == ("", code)


def test_a_model_of_several_is_named(url: str, talk: TalkTo) -> None:
    assert talk("hello", url=url, model="fake", max_new_tokens=6).out == f"{answer(url, 'hello')}\n"
    unknown = talk("hello", url=url, model="other")
    assert (unknown.out, unknown.code) == ("", 1)
    assert "no such model here; this server has fake" in unknown.err


def test_what_is_no_bitdial_server_is_said_so(talk: TalkTo, live: str) -> None:
    done = talk("hello", url=f"{live}/nothing")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
