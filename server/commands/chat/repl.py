"""The conversation's loop: reads a message, shows the answer as it comes, obeys what begins with a slash."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from server.commands.chat import slash
from server.commands.chat.answer import Answer
from server.commands.chat.client import Client
from server.commands.chat.conversation import Conversation, Sampling, Turn
from server.commands.chat.errors import ChatError
from server.commands.chat.flow import Flow
from server.commands.chat.typed import Input
from server.commands.chat.waiting import Waiting
from server.commands.side_by_side import shown

_LEAVE = "Ctrl-D or /bye ends the conversation"


class Chat:
    """A conversation with one server.

    Args:
        model: the first one, and perhaps its precision; None: the server's default.
        precision: the first one; None: the one in ``model``, or the model's default.
        ended: the exit code of the server if it has ended; None: it is not known.

    Raises:
        ChatError: the server can't be reached, or can't load the precision.
    """

    def __init__(
        self,
        client: Client,
        model: str | None,
        precision: str | None,
        sampling: Sampling,
        system: str | None = None,
        ended: Callable[[], int | None] | None = None,
    ) -> None:
        self.client, self.sampling, self._ended = client, sampling, ended or (lambda: None)
        self.known: list[str] | None = None
        """Names of the model's precisions, once they were asked for."""
        self.served = client.choose(model)
        self.precision = self.served.precision if precision is None else precision
        if system is not None and not self.served.templated:
            raise ChatError(slash.NO_TEMPLATE)
        self.conversation = Conversation(system)
        client.load(self.precision)

    def go_on_with(self, model: str) -> None:
        """Another model of the server; after an error, the one before.

        Args:
            model: as of ``Client.choose``.
        """
        before = self.client.model
        served = self.client.choose(model)
        try:
            self.client.load(served.precision)
        except BaseException:
            self.client.model = before
            raise
        self.served, self.precision, self.known = served, served.precision, None
        self.introduce()

    def prompt(self) -> str:
        several = len(self.served.models) > 1
        return shown(f"{self.served.model}:{self.precision}> " if several else f"{self.precision}> ")

    def words(self) -> Mapping[str, Sequence[str]]:
        """The commands, and of each what may follow it."""
        return slash.words(self)

    def run(self, read: Input) -> int:
        """Until the input ends. Returns the exit code: 1 if it was no terminal and a request failed.

        Raises:
            ChatError: the server has ended.
        """
        self._greet()
        failed = False
        with _interruptible():
            while True:
                try:
                    text = read()
                    if text and not self._obeyed(text):
                        self.ask(text.removeprefix("/") if text.startswith("//") else text)
                except (EOFError, slash.Leave):
                    return int(failed)
                except KeyboardInterrupt:
                    self.note(f"({_LEAVE})")
                except ChatError as error:
                    failed = failed or not sys.stdin.isatty()
                    print(f"bitdial chat: {error}", file=sys.stderr)
                    if error.lost and (code := self._ended()) is not None:
                        raise ChatError("its server has ended", exit_code=code) from None

    def ask(self, question: str) -> None:
        """Shows the answer as it comes, and takes it into the conversation; Ctrl-C stops it."""
        stopped, answer, flow = "", Answer(self.precision), Flow(sys.stdout)
        try:
            self.fill(answer, question, flow.write)
        except KeyboardInterrupt:
            stopped = ", stopped"
        finally:
            flow.end()
        self.note(f"[{answer.figures()}{stopped}]")
        if answer.text:
            self.conversation.turns.append(Turn(question, answer.text, answer.precision))

    def fill(self, answer: Answer, question: str, on_text: Callable[[str], None]) -> None:
        """The answer to the question after all turns."""
        with Waiting(sys.stderr) as waiting:

            def on_first(text: str) -> None:
                waiting.stop()
                on_text(text)

            if self.served.templated:
                self.client.reply(self.conversation, question, self.sampling, answer, on_first)
            else:
                self.client.continuation(question, self.sampling, answer, on_first)

    def note(self, text: str) -> None:
        """A line beside the conversation, which a pipe does not get."""
        if sys.stdin.isatty():
            print(text, file=sys.stderr, flush=True)

    def _obeyed(self, text: str) -> bool:
        if not text.startswith("/") or text.startswith("//"):
            return False
        slash.obey(self, text)
        return True

    def introduce(self) -> None:
        """Says what the model is."""
        self.note(f"{shown(self.served.model)}, context {self.served.context} tokens")
        if not self.served.templated:
            self.note("it has no chat template: each message is continued, without those before it")

    def _greet(self) -> None:
        self.introduce()
        if len(self.served.models) > 1:
            self.note(f"/model chooses among {shown(', '.join(self.served.models))}")
        self.note(f"/help lists the commands; {_LEAVE}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """While entered, Ctrl-C raises ``KeyboardInterrupt``: it stops the answer and not the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
