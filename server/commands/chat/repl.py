"""The conversation's loop: reads a message, shows the answer as it comes, obeys what begins with a slash."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from server.commands.chat import slash
from server.commands.chat.answer import Answer
from server.commands.chat.client import ChatError, Client
from server.commands.chat.conversation import Conversation, Sampling, Turn
from server.commands.chat.flow import Flow
from server.commands.chat.typed import Input
from server.commands.chat.waiting import Waiting

_LEAVE = "Ctrl-D or /bye ends the conversation"


class Chat:
    """A conversation with one server.

    Args:
        precision: the first one; None: the server's default.
        ended: the exit code of the server if it has ended; None: it is not known.

    Raises:
        ChatError: the server can't be reached, or can't load the precision.
    """

    def __init__(
        self,
        client: Client,
        precision: str | None,
        sampling: Sampling,
        system: str | None = None,
        ended: Callable[[], int | None] | None = None,
    ) -> None:
        self.client, self.sampling, self._ended = client, sampling, ended or (lambda: None)
        self.known: list[str] | None = None
        """Names of the server's precisions, once they were asked for."""
        served = client.served()
        self.model, self.context, self.templated = served.model, served.context, served.templated
        self.precision = served.precision if precision is None else precision
        if system is not None and not self.templated:
            raise ChatError(slash.NO_TEMPLATE)
        self.conversation = Conversation(system)
        client.load(self.precision)

    def prompt(self) -> str:
        return f"{self.precision}> "

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

            if self.templated:
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

    def _greet(self) -> None:
        self.note(f"{self.model}, context {self.context} tokens")
        if not self.templated:
            self.note("it has no chat template: each message is continued, without those before it")
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
