"""The cache of made files: what leaves it first, and what never does."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from loaders.artifacts import Recipe, prepare
from loaders.artifacts.cache import Entry, entries, evict, remove
from loaders.artifacts.in_use import lock_file, release
from loaders.base import ModelSpec, Progress, ignore_progress

BYTES = 10_000


def write(folder: Path, progress: Progress) -> None:
    (folder / "weights").write_bytes(bytes(BYTES))


def recipe(group: int, method: str = "int4", **options: int) -> Recipe:
    return Recipe(method, {"format": 1, "group": group, **options})


def made(spec: ModelSpec, one: Recipe, age: float | None = None) -> Path:
    """Files that no process uses; ``age``: seconds since their last use."""
    folder = prepare(spec, one, write, ignore_progress)
    release(folder)
    if age is not None:
        os.utime(lock_file(folder), (1e9 - age, 1e9 - age))
    return folder


def root_of(spec: ModelSpec) -> Path:
    assert spec.artifacts is not None
    return spec.artifacts


def test_the_least_recently_used_files_leave_first(spec: ModelSpec) -> None:
    old, older, new = made(spec, recipe(1), 20), made(spec, recipe(2), 30), made(spec, recipe(3), 10)
    assert [one.path for one in entries(root_of(spec))] == [older, old, new]
    assert [one.path for one in evict(root_of(spec), 2 * BYTES + 5000)] == [older]
    assert not older.exists()
    made(spec, recipe(1))  # used once more
    assert [one.path for one in evict(root_of(spec), BYTES + 5000)] == [new]
    assert evict(root_of(spec), BYTES + 5000) == []
    assert (old / "weights").exists()


def test_looking_is_no_use(spec: ModelSpec) -> None:
    """Also of files from before uses were noted."""
    folder = made(spec, recipe(1))
    lock_file(folder).unlink()
    os.utime(folder, (1e9, 1e9))
    for _ in range(2):
        (entry,) = entries(root_of(spec))
        assert (entry.used, entry.in_use) == (1e9, False)


def test_a_load_keeps_to_the_limit(spec: ModelSpec) -> None:
    bounded = replace(spec, artifacts_limit=BYTES + 5000)
    first, second = made(bounded, recipe(1)), made(bounded, recipe(2))
    assert (first.exists(), second.exists()) == (False, True)
    third = prepare(replace(spec, artifacts_limit=0), recipe(3), write, ignore_progress)
    assert (second.exists(), third.exists()) == (False, True), "what is being loaded stays"
    release(third)


def test_what_was_removed_is_made_again(spec: ModelSpec) -> None:
    folder = made(spec, recipe(1))
    assert len(evict(root_of(spec), 0)) == 1
    assert (made(spec, recipe(1)) / "weights").stat().st_size == BYTES
    assert folder.exists()


def _use(spec: ModelSpec, one: Recipe, pipe: Connection) -> None:
    prepare(spec, one, write, ignore_progress)
    pipe.send("loaded")
    pipe.recv()


@contextmanager
def used_by_a_process(spec: ModelSpec, one: Recipe) -> Iterator[Callable[[], None]]:
    """Another process has loaded the files; calling what is yielded kills it."""
    context = multiprocessing.get_context("fork")
    own, other = context.Pipe()
    process = context.Process(target=_use, args=(spec, one, other), daemon=True)
    process.start()

    def kill() -> None:
        process.kill()
        process.join(60)

    try:
        assert own.poll(60)
        yield kill
    finally:
        kill()


def test_what_another_process_uses_stays_until_it_ends(spec: ModelSpec) -> None:
    folder = made(spec, recipe(1))
    with used_by_a_process(spec, recipe(1)) as kill:
        (entry,) = entries(root_of(spec))
        assert entry.in_use
        assert evict(root_of(spec), 0) == []
        assert not remove(entry)
        assert (folder / "weights").exists()
        kill()
        assert not entries(root_of(spec))[0].in_use
        assert len(evict(root_of(spec), 0)) == 1
    assert not folder.exists()


def test_what_this_process_uses_stays(spec: ModelSpec) -> None:
    folder = prepare(spec, recipe(1), write, ignore_progress)
    assert evict(root_of(spec), 0) == []
    release(folder)
    assert len(evict(root_of(spec), 0)) == 1


def test_what_is_being_made_stays(spec: ModelSpec) -> None:
    begun, go_on, results = threading.Event(), threading.Event(), list[Path]()

    def slow(folder: Path, progress: Progress) -> None:
        write(folder, progress)
        begun.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=lambda: results.append(prepare(spec, recipe(1), slow, ignore_progress)))
    thread.start()
    assert begun.wait(60)
    (entry,) = entries(root_of(spec))
    assert (entry.kind, entry.in_use) == ("unfinished", True)
    assert evict(root_of(spec), 0) == []
    go_on.set()
    thread.join()
    assert (results[0] / "weights").exists()
    release(results[0])


def kinds(found: list[Entry]) -> dict[str, str]:
    return {one.method: one.kind for one in found}


def test_trainings_are_removed_by_a_person_alone(spec: ModelSpec) -> None:
    """No load makes them again; what a killed process left over has no use."""
    trained = made(spec, recipe(1, "qat-int8", steps=500))
    state = trained.with_name(f"qat-int4-{'0' * 16}.training")
    state.write_bytes(bytes(10))
    left = trained.with_name(f"int4-{'0' * 16}.partial")
    left.mkdir()
    (left / "weights").write_bytes(bytes(10))
    broken = made(spec, recipe(1, "static-int8"))
    (broken / "artifact.json").unlink()
    assert kinds(entries(root_of(spec))) == {
        "qat-int8": "trained", "qat-int4": "training", "int4": "unfinished", "static-int8": "damaged",
    }  # fmt: skip
    assert {one.method for one in evict(root_of(spec), 0)} == {"int4", "static-int8"}
    assert all(remove(one) for one in entries(root_of(spec)))
    assert entries(root_of(spec)) == []
    assert not state.exists()


def test_other_files_are_no_part_of_the_cache(spec: ModelSpec, tmp_path: Path) -> None:
    assert entries(tmp_path / "missing") == []
    root_of(spec).mkdir()
    (root_of(spec) / "notes.txt").write_text("mine")
    (root_of(spec) / "int4-of-mine").mkdir()
    assert entries(root_of(spec)) == []
    assert evict(root_of(spec), 0) == []


@pytest.mark.parametrize("manifest", ["", "[]", '{"format": 1, "precision": "int4"}'])
def test_a_broken_manifest_is_no_error(spec: ModelSpec, manifest: str) -> None:
    folder = made(spec, recipe(1))
    (folder / "artifact.json").write_text(manifest)
    (entry,) = entries(root_of(spec))
    assert (entry.kind, entry.model) == ("damaged", None)
