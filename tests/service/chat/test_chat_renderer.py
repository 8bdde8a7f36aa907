"""Processes that render chat templates: their limits, what they inherit, and how they end."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.errors import DeadlinePassed, Invalid, NotReady
from server.service.chat.renderer import ChatRenderer
from server.service.chat.source import make_renderer, read_template, template_of
from tests.chat_templates import SMOLLM
from tests.checkpoints import byte_tokenizer
from tests.conftest import until

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
POWER = "{{ (messages|length + 9) ** (10 ** 9) }}"
CONSTANT = "{{ 9 ** (10 ** 9) }}"  # computed when it is compiled
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "{% if 'bomb' in messages[0].content %}" + POWER + "{% endif %}" + PLAIN
LIMIT = 10_000  # bytes of a body


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def soon() -> float:
    return time.perf_counter() + 60


def with_renderer(template: str, test: Callable[[ChatRenderer], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        renderer = ChatRenderer(template, {}, LIMIT, **options)
        try:
            await test(renderer)
        finally:
            await renderer.stop()
        assert not mine()

    asyncio.run(main())


def mine(parent: int | None = None) -> list[psutil.Process]:
    """The rendering child processes of this process, or of another."""
    return [one for one in psutil.Process(parent).children() if _renders(one)]


def _renders(process: psutil.Process) -> bool:
    try:
        return "chat.process" in " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return False


async def fault(renderer: ChatRenderer, content: str = "Hi") -> str:
    with pytest.raises(Invalid) as caught:
        await renderer.render(said(content), soon())
    return caught.value.message


def test_a_process_is_started_once_and_used_again() -> None:
    async def check(renderer: ChatRenderer) -> None:
        assert not mine()
        assert await renderer.render(said("Hi 😀"), soon()) == "user: Hi 😀;"
        (first,) = mine()
        assert await renderer.render(said("\ud800"), soon()) == "user: \ud800;"
        assert mine() == [first]

    with_renderer(PLAIN, check)


def test_special_tokens_are_the_tokenizer_s() -> None:
    async def main() -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {"other": "x", "default": "{{ bos_token }}" + SMOLLM}
        renderer = make_renderer(tokenizer, None, LIMIT)
        assert renderer is not None
        expected = tokenizer.apply_chat_template(said("Hi"), tokenize=False, add_generation_prompt=True)
        assert await renderer.render(said("Hi"), soon()) == expected
        assert "<|endoftext|>" in expected
        await renderer.stop()

    asyncio.run(main())


def test_many_at_once_are_rendered_each_for_itself() -> None:
    async def check(renderer: ChatRenderer) -> None:
        texts = await asyncio.gather(*(renderer.render(said(str(i)), soon()) for i in range(50)))
        assert texts == [f"user: {i};" for i in range(50)]
        assert len(mine()) <= 2

    with_renderer(PLAIN, check)


@pytest.mark.parametrize("template", [POWER, LOOPS, CONSTANT], ids=["power", "loops", "constant"])
def test_endless_computation_is_stopped(template: str) -> None:
    async def check(renderer: ChatRenderer) -> None:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        others = asyncio.create_task(turn())
        assert "took longer than 0.3 s" in await fault(renderer)
        assert turns > 100  # the event loop kept running
        others.cancel()
        await until(lambda: not mine())

    with_renderer(template, check, seconds=0.3)


def test_others_are_rendered_meanwhile() -> None:
    async def check(renderer: ChatRenderer) -> None:
        stuck = asyncio.create_task(fault(renderer, "bomb"))
        await until(mine)
        assert await renderer.render(said("Hi"), soon()) == "user: Hi;"
        assert not stuck.done()
        stuck.cancel()

    with_renderer(BOMB, check, seconds=60)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
    ids=["repeated", "formatted", "doubled"],
)
def test_too_much_memory_is_refused(template: str) -> None:
    async def check(renderer: ChatRenderer) -> None:
        assert "needs more than 256 MiB" in await fault(renderer)

    with_renderer(template, check)


def test_an_endless_text_is_refused() -> None:
    async def check(renderer: ChatRenderer) -> None:
        assert "too long a text" in await fault(renderer)

    with_renderer("{% for a in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}", check)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ raise_exception(messages[0].content) }}", "refuses these messages"),
        ("{{ nothing.at_all }}", "fails on these messages (UndefinedError)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on these messages (RecursionError)"),
        ("a\n{% if %}", "is not valid: line 2: Expected an expression, got 'end of statement block'"),
        ("nothing", "drops message 1: it has no place there for the role user"),
    ],
)
def test_the_message_of_a_refusal(template: str, expected: str) -> None:
    async def check(renderer: ChatRenderer) -> None:
        assert await fault(renderer, "secret words") == f"the model's chat template {expected}"
        assert len(mine()) == 1  # and it still serves

    with_renderer(template, check)


def test_the_request_s_deadline_counts_in_the_process_and_before_it() -> None:
    async def check(renderer: ChatRenderer) -> None:
        stuck = [
            asyncio.create_task(renderer.render(said("bomb"), time.perf_counter() + 0.5)) for _ in range(3)
        ]
        for one in await asyncio.gather(*stuck, return_exceptions=True):
            assert isinstance(one, DeadlinePassed)
        await until(lambda: not mine())

    with_renderer(BOMB, check)


def test_a_cancelled_request_ends_its_process() -> None:
    async def check(renderer: ChatRenderer) -> None:
        stuck = asyncio.create_task(renderer.render(said("bomb"), soon()))
        await until(mine)
        stuck.cancel()
        await until(lambda: not mine())
        assert await renderer.render(said("Hi"), soon()) == "user: Hi;"

    with_renderer(BOMB, check)


def test_a_process_that_was_killed_is_replaced() -> None:
    async def check(renderer: ChatRenderer) -> None:
        await renderer.render(said("Hi"), soon())
        (first,) = mine()
        first.kill()
        await until(lambda: not any(process.running for process in renderer._alive))
        assert await renderer.render(said("Hi"), soon()) == "user: Hi;"

    with_renderer(PLAIN, check)


def test_it_inherits_no_file_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("API_KEY", "secret")

    async def check(renderer: ChatRenderer) -> None:
        with (tmp_path / "open").open("w") as held:
            os.set_inheritable(held.fileno(), True)
            await renderer.render(said("Hi"), soon())
            (process,) = mine()
            assert process.environ().keys() <= {"TZ", "LD_LIBRARY_PATH"}
            assert process.num_fds() == 3
            assert process.cwd() == "/"
            assert os.getsid(process.pid) != os.getsid(0)  # only the server handles Ctrl-C

    with_renderer(PLAIN, check)


def test_without_a_process_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    async def check(renderer: ChatRenderer) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", none)
            with pytest.raises(NotReady, match="no process for the chat template"):
                await renderer.render(said("Hi"), soon())
        assert await renderer.render(said("Hi"), soon()) == "user: Hi;"

    with_renderer(PLAIN, check)


def test_it_ends_when_its_pipe_is_closed() -> None:
    """A closed pipe is the only sign that the server was killed."""

    async def check(renderer: ChatRenderer) -> None:
        await renderer.render(said("Hi"), soon())
        (process,) = mine()
        (held,) = renderer._alive
        assert held._process.stdin is not None
        held._process.stdin.close()
        await until(lambda: not process.is_running())

    with_renderer(PLAIN, check)


def test_it_ends_by_itself_while_it_computes() -> None:
    async def check(renderer: ChatRenderer) -> None:
        renderer._seconds = 60  # like a killed server, which closes nothing properly
        assert await fault(renderer) == "the model's chat template can't be run on these messages"
        await until(lambda: not mine())

    with_renderer(POWER, check, seconds=0.3)


def test_which_template_is_a_tokenizer_s() -> None:
    tokenizer = byte_tokenizer()
    assert template_of(tokenizer) is None
    for given, expected in (("x", "x"), ({"default": "d", "rag": "r"}, "d"), ({"rag": "r"}, None), (5, None)):
        tokenizer.chat_template = given
        assert template_of(tokenizer) == expected


def test_a_template_s_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + "{{ 'ä' }}\n".encode())
    assert read_template(file) == "{{ 'ä' }}\n"
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for made, message in (
        (b"\xff\xfe", "not UTF-8"), (b" \n", "empty"), (b"x" * (2**20 + 1), "larger than 1048576 bytes"),
    ):  # fmt: skip
        file.write_bytes(made)
        with pytest.raises(ValueError, match=message):
            read_template(file)
    for path, message in (
        (tmp_path / "none", "can't be read: No such file"), (fifo, "not a regular file"),
        (tmp_path, "Is a directory|not a regular file"), (Path("/dev/zero"), "not a regular file"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_template(path)
