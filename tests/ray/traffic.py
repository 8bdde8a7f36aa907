"""Clients that send one request after another, and how their requests ended."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Outcomes:
    """How the requests of some clients ended."""

    answered: int = 0
    refused: list[str] = field(default_factory=list)
    """Errors in the form of the API."""
    broken: list[str] = field(default_factory=list)
    """Everything else."""
    longest: float = 0.0

    def figures(self) -> dict[str, object]:
        """Counts, and the longest request in seconds."""
        return {
            "answered": self.answered,
            "errors of the API": len(self.refused),
            "broken": len(self.broken),
            "longest request seconds": round(self.longest, 2),
        }


@contextmanager
def clients(address: str, count: int, tokens: int = 40) -> Iterator[Outcomes]:
    """Clients that send requests meanwhile; every second one streams."""
    outcomes, ended, lock = Outcomes(), threading.Event(), threading.Lock()

    def run(number: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not ended.is_set():
                started = time.monotonic()
                kind, text = _request(client, tokens, stream=number % 2 == 0)
                with lock:
                    outcomes.longest = max(outcomes.longest, time.monotonic() - started)
                    if kind == "answered":
                        outcomes.answered += 1
                    else:
                        getattr(outcomes, kind).append(text)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        ended.set()
        for thread in threads:
            thread.join(90)


def _request(client: httpx.Client, tokens: int, stream: bool) -> tuple[str, str]:
    body = {"inputs": "The with statement", "max_new_tokens": tokens, "ignore_eos": True, "stream": stream}
    try:
        response = client.post("/generate", json=body)
        last = response.text.rstrip().rsplit("\n\n", 1)[-1].removeprefix("data: ")
        answer = json.loads(last)
    except (httpx.HTTPError, ValueError) as error:
        return "broken", repr(error)
    if response.status_code == 200 and answer.get("generated_text") is not None:
        return "answered", ""
    return ("refused" if answer.get("error_type") else "broken"), f"{response.status_code} {last[:200]}"
