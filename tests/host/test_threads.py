"""The number of compute threads: the default, and that every computing thread uses it."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loaders.base import LoadedModel, ModelSpec, Progress, ignore_progress
from server import __main__
from server.engine.engine import Engine
from server.engine.sequence import SamplingParams
from server.host import cgroups, threads
from server.host.threads import run_in_own_thread
from server.report.background import Reports
from server.report.measuring import measure, speed
from server.report.measuring.measure import Measurement, Plan
from server.report.store import SavedReport
from server.report.subject import subject_of
from server.settings.server import ModelSettings, Settings
from tests import checkpoints
from tests.fakes import FakeRunner, fake_checkpoint, fake_model
from tests.forked import ROOT, ask, environment
from tests.routes.test_report_route import READING


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four cores of two hyper-threads each: CPUs 0 and 4 are one core, and so on. No quota."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{cpu % 4}\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cgroups, "cpus", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("may_run_on", "quota", "variable", "expected"),
    [
        (range(8), None, None, 4),  # one per core, not per hyper-thread
        ({0, 4}, None, None, 1),  # both of one core
        ({1, 2, 6}, None, None, 2),
        (range(8), 3, None, 3),
        (range(8), 6, None, 4),  # more than the number of cores
        ({0}, 3, None, 1),
        (range(8), 3, "6", 6),  # asked for
        (range(8), None, "2,4", 2),
        (range(8), None, "", 4),
        (range(8), None, "0", 4),
        (range(8), None, "many", 4),
    ],
)
def test_one_thread_for_every_core_that_it_may_use(
    may_run_on: Sequence[int], quota: int | None, variable: str | None, expected: int,
    host: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(may_run_on))
    monkeypatch.setattr(cgroups, "cpus", lambda: quota)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads.default_threads() == expected
    assert Settings().resolved_threads() == expected
    assert Settings(threads=7).resolved_threads() == 7


def test_cpus_of_unknown_topology_are_cores(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_CPUS", host / "nowhere")
    assert threads.physical_cores() == list(range(8))


@pytest.mark.parametrize(("quota", "given", "expected"), [(3, None, "3"), (6, None, "4"), (3, "8", "8")])
def test_under_a_quota_libraries_get_the_number_too(
    quota: int, given: str | None, expected: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "cpus", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", given or "to be restored")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    assert __main__.main(["--version"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == expected


def test_a_threads_number_stays_whatever_others_set() -> None:
    """Set alone, the first parallel operation replaces it by the number that another thread has set."""
    chosen, others_have_set = threading.Event(), threading.Event()
    found: list[int] = []

    def compute() -> None:
        threads.compute_with(3)
        chosen.set()
        others_have_set.wait()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    chosen.wait()
    run_in_own_thread(lambda: None, 1)
    others_have_set.set()
    thread.join()
    assert found == [3]


class Recording(FakeRunner):
    """Records the number of threads that it would compute with."""

    def __init__(self, slots: int = 8) -> None:
        super().__init__(slots)
        self.numbers: set[int] = set()

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        self.numbers.add(torch.get_num_threads())
        return super().decode(slots, ids)


def test_an_engine_sets_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runner = Recording()

    async def generate() -> None:
        run_in_own_thread(lambda: None, 1)
        engine = Engine(fake_model("fp32", runner), eos_ids=frozenset())
        await engine.start()
        run_in_own_thread(lambda: None, 1)
        async for _ in engine.generate([1, 2], SamplingParams(3, ignore_eos=True)):
            pass
        await engine.stop()

    asyncio.run(generate())
    assert runner.numbers == {3}


def test_the_report_is_measured_with_the_number_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Determining the report's subject leaves the process's number at 1."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(speed, "PAUSE", 0.0)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "layer_errors", lambda *_: None)
    runners: list[Recording] = []
    loading: set[int] = set()

    def load(name: str, spec: ModelSpec, progress: Progress = ignore_progress) -> LoadedModel:
        loading.add(torch.get_num_threads())
        runners.append(Recording())
        return fake_model(name, runners[-1])

    spec = Settings(device="cpu").spec(fake_checkpoint(tmp_path), 8)
    kept = SavedReport(subject_of(spec), READING)
    assert kept.document["host"]["threads"] == 3
    run_in_own_thread(lambda: None, 1)
    Measurement(Plan(spec, ("bf16",), None), kept, load=load).run()
    computed = [runner.numbers for runner in runners if runner.numbers]
    assert computed == [{3}, {3}]
    assert loading == {3}


def test_the_reports_process_gets_the_servers_thread_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have another affinity than the server, or another environment."""
    order = tmp_path / "order.json"
    script = f"import sys; open({str(order)!r}, 'w').write(sys.stdin.readline()); print('{{\"kept\": 1}}')"
    monkeypatch.setattr("server.report.background.start_command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    reports = Reports(Settings(device="cpu"), fake_checkpoint(tmp_path))

    async def make() -> None:
        async for _ in reports.make({"precisions": ["fp32"], "quality": False}, None):
            pass

    asyncio.run(make())
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert ModelSettings(**json.loads(order.read_text())["settings"]).resolved_threads() == 3


SERVE = """
import sys, threading
import torch
import loaders
from server.engine.worker import Worker

def note():
    print("computing", threading.current_thread().name, torch.get_num_threads(), flush=True)

def noted(work):
    def called(*arguments):
        note()
        return work(*arguments)
    return called

Worker.warm_up, Worker.step = noted(Worker.warm_up), noted(Worker.step)
loaders.load = noted(loaders.load)
from server.__main__ import main

main(["serve", "--model", sys.argv[1], "--port", "0", "--precisions", "fp32,bf16"])
"""


@contextmanager
def server(folder: Path, **variables: str) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """A server process with default settings: its port, and the thread counts of its computing threads."""
    values = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS"}
    values |= {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"], **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder)],
        cwd=ROOT, env=values, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    seen: list[tuple[str, int]] = []
    port: list[int] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                port.append(int(match[1]))
            if match := re.fullmatch(r"computing (\S+) (\d+)\n", line):
                seen.append((match[1], int(match[2])))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while not port:
            assert process.poll() is None
            time.sleep(0.02)
        while ask(port[0], "GET", "/health")[0] != 200:
            assert process.poll() is None
            time.sleep(0.05)
        yield port[0], seen
    finally:
        process.kill()
        process.wait()
        reader.join()


def test_a_server_with_its_defaults_computes_on_every_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after other computations on one core: host information, layer reports, comparisons."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    expected = threads.default_threads()
    wish: dict[str, Any] = {"inputs": "abc", "parameters": {"max_new_tokens": 3}}
    with server(checkpoints.save(checkpoints.gpt2(), tmp_path / "tiny")) as (port, seen):
        assert ask(port, "POST", "/compare", wish | {"precisions": ["fp32", "bf16"]})[0] == 200
        stats = json.loads(ask(port, "GET", "/stats?layers=true")[1])
        assert ask(port, "POST", "/precisions/nf4/load")[0] == 200
        for precision in ("fp32", "bf16", "nf4"):
            assert ask(port, "POST", "/generate", wish | {"precision": precision})[0] == 200
    assert stats["host"]["cpu_threads"] == expected
    names = {"load-fp32", "load-bf16", "load-nf4", "engine-fp32", "engine-bf16", "engine-nf4"}
    assert set(seen) == {(name, expected) for name in names}
