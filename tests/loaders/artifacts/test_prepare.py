"""Made files: once, whole, by one process; found again by everything that they depend on."""

import multiprocessing
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from loaders.artifacts import NotPrepared, Recipe, prepare
from loaders.artifacts.prepare import NotKept
from loaders.base import ModelSpec, Progress, ignore_progress
from loaders.texts.calibration import CalibrationError
from tests import checkpoints
from tests.conftest import PATIENCE

RECIPE = Recipe("int4", {"format": 1, "group": 32}, ("torch",))


class Maker:
    """Writes a file, and counts how often."""

    def __init__(self, content: str = "codes") -> None:
        self.content, self.made = content, 0

    def __call__(self, folder: Path, progress: Progress) -> None:
        self.made += 1
        progress("quantizing", 1, 1)
        (folder / "weights").write_text(self.content)


def test_files_are_made_once(spec: ModelSpec) -> None:
    maker = Maker()
    first = prepare(spec, RECIPE, maker, ignore_progress)
    assert (first / "weights").read_text() == "codes"
    assert prepare(spec, RECIPE, maker, ignore_progress) == first
    assert prepare(spec, RECIPE, None, ignore_progress) == first
    assert maker.made == 1


def test_without_a_maker_other_options_are_accepted(spec: ModelSpec) -> None:
    """Whoever trained for more steps wants that model served, without naming the steps again."""
    longer = replace(RECIPE, options={"format": 1, "steps": 500})
    made = prepare(spec, longer, Maker(), ignore_progress)
    assert prepare(spec, RECIPE, None, ignore_progress) == made
    for other in (replace(RECIPE, method="qat-int8"), replace(RECIPE, options={"format": 2})):
        with pytest.raises(NotPrepared):
            prepare(spec, other, None, ignore_progress)
    checkpoints.save(checkpoints.gpt2(seed=1), spec.checkpoint.folder)
    with pytest.raises(NotPrepared):
        prepare(spec, RECIPE, None, ignore_progress)


def test_whatever_they_depend_on_makes_others(spec: ModelSpec, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one text")
    calibrated = replace(RECIPE, calibrated=True)
    found = {
        prepare(spec, RECIPE, Maker(), ignore_progress),
        prepare(spec, replace(RECIPE, options={"format": 1, "group": 64}), Maker(), ignore_progress),
        prepare(spec, replace(RECIPE, method="qat-int4"), Maker(), ignore_progress),
        prepare(spec, replace(RECIPE, packages=("numpy",)), Maker(), ignore_progress),
        prepare(replace(spec, calibration=text), calibrated, Maker(), ignore_progress),
    }
    text.write_text("two text")
    found.add(prepare(replace(spec, calibration=text), calibrated, Maker(), ignore_progress))
    checkpoints.save(checkpoints.gpt2(seed=1), spec.checkpoint.folder)
    found.add(prepare(spec, RECIPE, Maker(), ignore_progress))
    assert len(found) == 7


def test_the_name_of_a_text_changes_nothing(spec: ModelSpec, tmp_path: Path) -> None:
    calibrated, maker = replace(RECIPE, calibrated=True), Maker()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same text")
        prepare(replace(spec, calibration=tmp_path / name), calibrated, maker, ignore_progress)
    assert maker.made == 1


@pytest.mark.parametrize("damage", ["changed", "truncated", "deleted", "manifest", "no manifest"])
def test_damaged_files_are_made_again(spec: ModelSpec, damage: str) -> None:
    maker = Maker()
    folder = prepare(spec, RECIPE, maker, ignore_progress)
    weights, manifest = folder / "weights", folder / "artifact.json"
    match damage:
        case "changed":
            weights.write_text("c0des")
        case "truncated":
            weights.write_text("code")
        case "deleted":
            weights.unlink()
        case "manifest":
            manifest.write_text('{"format": 1, "files": []}')
        case _:
            manifest.unlink()
    with pytest.raises(NotPrepared):
        prepare(spec, RECIPE, None, ignore_progress)
    assert prepare(spec, RECIPE, maker, ignore_progress) == folder
    assert weights.read_text() == "codes"
    assert maker.made == 2


def test_interrupted_nothing_is_left(spec: ModelSpec) -> None:
    def interrupted(folder: Path, progress: Progress) -> None:
        (folder / "weights").write_text("half of th")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(spec, RECIPE, interrupted, ignore_progress)
    assert spec.artifacts is not None
    assert [path for path in spec.artifacts.iterdir() if path.is_dir()] == []
    maker = Maker()
    assert (prepare(spec, RECIPE, maker, ignore_progress) / "weights").read_text() == "codes"


def test_files_of_a_killed_process_are_removed(spec: ModelSpec) -> None:
    folder = prepare(spec, RECIPE, Maker(), ignore_progress)
    partial_folder = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial_folder)
    (partial_folder / "other").write_text("left over")
    folder = prepare(spec, RECIPE, Maker(), ignore_progress)
    assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "weights"]
    assert not partial_folder.exists()


def test_another_thread_waits_and_makes_nothing(spec: ModelSpec) -> None:
    begun, go_on, stages = threading.Event(), threading.Event(), []
    first, second = Maker(), Maker()

    def slow(folder: Path, progress: Progress) -> None:
        begun.set()
        assert go_on.wait(PATIENCE)
        first(folder, progress)

    def waiting(stage: str, current: int, total: int) -> None:
        stages.append(stage)
        go_on.set()

    one = threading.Thread(target=prepare, args=(spec, RECIPE, slow, ignore_progress))
    one.start()
    assert begun.wait(PATIENCE)
    prepare(spec, RECIPE, second, waiting)
    one.join()
    assert (first.made, second.made, stages[0]) == (1, 0, "waiting for another process")


def _append(made: Path, folder: Path, progress: Progress) -> None:
    with made.open("a") as file:
        file.write("made\n")
    (folder / "weights").write_text("codes")


def _prepare(spec: ModelSpec, made: Path) -> None:
    prepare(spec, RECIPE, partial(_append, made), ignore_progress)


def test_processes_make_them_once(spec: ModelSpec, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare, args=(spec, tmp_path / "made")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert (tmp_path / "made").read_text() == "made\n"


def test_without_a_maker_the_command_is_named(spec: ModelSpec) -> None:
    with pytest.raises(NotPrepared, match=r"int4 of tiny .*: bitdial quantize --model tiny --method int4"):
        prepare(spec, RECIPE, None, ignore_progress)


def test_a_cache_that_cannot_be_written_is_named(spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotKept, match="names another folder"):
        prepare(replace(spec, artifacts=tmp_path / "file"), RECIPE, Maker(), ignore_progress)


def test_a_missing_calibration_text_is_named(spec: ModelSpec, tmp_path: Path) -> None:
    calibrated = replace(spec, calibration=tmp_path / "missing.txt")
    with pytest.raises(CalibrationError, match=r"missing\.txt is not a file"):
        prepare(calibrated, replace(RECIPE, calibrated=True), Maker(), ignore_progress)
