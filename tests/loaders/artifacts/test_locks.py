"""Files of locks: removed with what they lock, but not while a process has them, and never two at once."""

import errno
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from loaders import locking
from loaders.artifacts import Recipe, prepare
from loaders.artifacts.cache import entries, evict, remove, remove_locks
from loaders.artifacts.in_use import lock_file, release
from loaders.artifacts.recipe import KEY
from loaders.base import ModelSpec, Progress, ignore_progress
from loaders.errors import CheckpointError
from loaders.locking import lock_of, locked, locked_now

FORK = multiprocessing.get_context("fork")
RECIPE = Recipe("int4", {"format": 1})
TIMES = 60


def write(folder: Path, progress: Progress) -> None:
    (folder / "weights").write_bytes(bytes(1000))


def root_of(spec: ModelSpec) -> Path:
    assert spec.artifacts is not None
    return spec.artifacts


def left_in(root: Path) -> list[str]:
    return sorted(one.name for one in root.iterdir())


def place_in(root: Path) -> Path:
    return root / f"int4-{'0' * KEY}"


@pytest.mark.parametrize("leave", [lambda root: evict(root, 0), lambda root: remove(entries(root)[0])])
def test_the_locks_leave_with_the_files(spec: ModelSpec, leave: Callable[[Path], Any]) -> None:
    release(prepare(spec, RECIPE, write, ignore_progress))
    leave(root_of(spec))
    assert left_in(root_of(spec)) == []


def test_locks_whose_files_are_gone_leave_with_the_next_eviction(spec: ModelSpec) -> None:
    def fail(folder: Path, progress: Progress) -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        prepare(spec, RECIPE, fail, ignore_progress)
    root = root_of(spec)
    gone, other = place_in(root), root / "notes.lock"
    for path in (lock_of(gone), lock_file(gone), other):
        path.touch()
    kept = prepare(spec, Recipe("onnx-int8", {"format": 1}), write, ignore_progress)
    assert evict(root, 10**9) == []
    assert left_in(root) == sorted([kept.name, lock_of(kept).name, lock_file(kept).name, other.name])
    release(kept)


def test_locks_of_an_interrupted_training_stay(spec: ModelSpec) -> None:
    place = place_in(root_of(spec))
    root_of(spec).mkdir()
    place.with_name(f"{place.name}.training").touch()
    lock_of(place).touch()
    remove_locks(root_of(spec))
    assert lock_of(place).exists()


def _hold(place: Path, pipe: Connection) -> None:
    with locked(place, ignore_progress):
        pipe.send("locked")
        pipe.recv()


@contextmanager
def held_by_a_process(place: Path) -> Iterator[None]:
    own, other = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(place, other), daemon=True)
    process.start()
    try:
        assert own.poll(60)
        yield
    finally:
        process.kill()
        process.join(60)


def test_a_lock_that_a_process_holds_stays_and_one_of_a_killed_process_leaves(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    with held_by_a_process(place):
        remove_locks(tmp_path)
        assert lock_of(place).exists()
        with locked_now(place) as taken:
            assert not taken
    remove_locks(tmp_path)
    assert left_in(tmp_path) == []


def test_a_file_that_is_removed_before_it_is_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the file between this one's opening and locking it."""
    place = place_in(tmp_path)
    flock, removed = locking._fcntl.flock, list[str]()

    class Interrupted:
        LOCK_EX, LOCK_NB, LOCK_UN = locking._fcntl.LOCK_EX, locking._fcntl.LOCK_NB, locking._fcntl.LOCK_UN

        @staticmethod
        def flock(file: Any, operation: int) -> None:
            if not removed:
                removed.append("once")
                remove_locks(tmp_path)
                assert left_in(tmp_path) == []
            flock(file, operation)

    monkeypatch.setattr(locking, "_fcntl", Interrupted)
    with locked_now(place) as first, locked_now(place) as second:
        assert (first, second) == (True, False)


def _contend(place: Path, inside: Path, start: Event, clashes: Any) -> None:
    start.wait(60)
    times = 0
    while times < TIMES:
        with locked_now(place) as taken:
            if taken:
                times += 1
                try:
                    inside.mkdir()
                except FileExistsError:
                    clashes.value += 1
                else:
                    time.sleep(0.001)
                    inside.rmdir()


def _sweep(root: Path, start: Event, end: Event) -> None:
    start.wait(60)
    while not end.is_set():
        remove_locks(root)


def test_processes_never_have_the_lock_together_while_others_remove_its_file(tmp_path: Path) -> None:
    place, inside = place_in(tmp_path), tmp_path / "inside"
    start, end, clashes = FORK.Event(), FORK.Event(), FORK.Value("i", 0)
    contending = [FORK.Process(target=_contend, args=(place, inside, start, clashes)) for _ in range(4)]
    sweeping = [FORK.Process(target=_sweep, args=(tmp_path, start, end)) for _ in range(2)]
    for process in (*contending, *sweeping):
        process.start()
    start.set()
    for process in contending:
        process.join(120)
    end.set()
    for process in sweeping:
        process.join(120)
    assert [process.exitcode for process in (*contending, *sweeping)] == [0] * 6
    assert clashes.value == 0
    remove_locks(tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locking._fcntl, "flock", unsupported)
    place = place_in(tmp_path)
    with locked_now(place) as first, locked_now(place) as second:
        assert (first, second) == (True, False)
    with locked(place, ignore_progress):
        remove_locks(tmp_path)
        assert lock_of(place).exists()
