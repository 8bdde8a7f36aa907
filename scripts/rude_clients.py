#!/usr/bin/env python3
"""Measures the latency of GET /health/live while abusive clients hold connections; needs two cores.

    .venv/bin/python scripts/rude_clients.py [--seconds 5] [--tree FOLDER] [--only chunks|idle]

A server runs on one core, the abusive clients and the measuring client on another. Two attacks: endless
`POST /generate` bodies in one-byte chunks, on 1, 16 and 64 connections without a key and on 16 with it,
reopened when closed; and 400 connections that send nothing, to a server limited to 256 open
files. `--tree` measures the server of another checkout of this repository. Prints milliseconds; one JSON
line last.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEY = "the-key-of-this-measurement"
HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
WITH_KEY = f"Authorization: Bearer {KEY}\r\n".encode()
CHUNKS = b"1\r\nx\r\n" * 10_000
CHUNK_ATTACKS = ((1, b""), (16, b""), (64, b""), (16, WITH_KEY))
FILES, IDLE = 256, 400
PAUSE = 0.05  # seconds between two measured requests
CLIENT_CORE, SERVER_CORE = 0, 1


@contextlib.contextmanager
def serving(tree: Path, log: Path, files: int | None = None) -> Iterator[int]:
    """Yields the port of a server on one core with at most ``files`` open files."""

    def confine() -> None:
        os.sched_setaffinity(0, {SERVER_CORE})
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", "0", "--precisions", "fp32"],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "API_KEY": KEY}, preexec_fn=confine,
            stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            found = (re.search(r"listening on http://[\d.]+:(\d+)", line) for line in process.stdout)
            port = int(next(match[1] for match in found if match))
            while get(port, "/health/ready")[0] != 200:
                time.sleep(0.1)
            yield port
        finally:
            process.kill()
            process.wait()


def get(port: int, path: str) -> tuple[int, float]:
    """Status (0: no response) and seconds of a GET on a new connection."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    return status, time.perf_counter() - begun


def measure(seconds: float, port: int) -> dict[str, Any]:
    """Latencies in milliseconds, and statuses."""
    end, found = time.monotonic() + seconds, []
    while time.monotonic() < end:
        found.append(get(port, "/health/live"))
        time.sleep(PAUSE)
    took = sorted(1000 * one for _, one in found)
    statuses = {str(status): sum(one == status for one, _ in found) for status in {one for one, _ in found}}
    median, longest = round(statistics.median(took), 1), round(took[-1], 1)
    return {"asked": len(found), "statuses": statuses, "median_ms": median, "longest_ms": longest}


def send_chunks(port: int, connections: int, key: bytes, seconds: float) -> None:
    """Runs in a subprocess: every connection sends as fast as possible and is reopened when closed."""
    end = time.monotonic() + seconds

    def send() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as rude:
                rude.settimeout(1)
                rude.sendall(HEAD + key + b"\r\n")
                while time.monotonic() < end:
                    rude.sendall(CHUNKS)

    threads = [threading.Thread(target=send) for _ in range(connections)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


def under_chunks(tree: Path, log: Path, connections: int, key: bytes, seconds: float) -> dict[str, Any]:
    with serving(tree, log) as port:
        rude = get_context("spawn").Process(target=send_chunks, args=(port, connections, key, seconds + 1))
        rude.start()
        time.sleep(1)
        found = measure(seconds, port)
        rude.join()
    return found


def under_idle(tree: Path, log: Path, seconds: float) -> dict[str, Any]:
    with serving(tree, log, FILES) as port, contextlib.ExitStack() as held:
        for _ in range(IDLE):
            held.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port), 5)))
        found = measure(seconds, port)
        found["docs_status"] = get(port, "/docs/static/swagger-ui.css")[0]
    return found | {"log_lines": log.read_bytes().count(b"\n")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--only", choices=["chunks", "idle"])
    options = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        for connections, key in CHUNK_ATTACKS if options.only != "idle" else ():
            name = f"{connections} × one-byte chunks{', with the key' if key else ''}"
            found[name] = under_chunks(options.tree, log, connections, key, options.seconds)
            print(name, found[name], flush=True)
        if options.only != "chunks":
            name = f"{IDLE} idle, {FILES} files"
            found[name] = under_idle(options.tree, log, options.seconds)
            print(name, found[name], flush=True)
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
