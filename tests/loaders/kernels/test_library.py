"""What is refused: a library whose structures differ from Python's, a step whose phases are miscounted."""

import ctypes
import re
from pathlib import Path

import pytest

from loaders import kernels
from loaders.kernels import Library, build, structures
from tests import decoders
from tests.loaders.kernels.test_decoder_kernel import IDS, Cache, packed

pytestmark = pytest.mark.skipif(kernels.get() is None, reason=str(kernels.find()))


@pytest.mark.parametrize("name", structures.SHARED)
def test_a_structure_of_another_size_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = type("Longer", (structures.SHARED[name],), {"_fields_": [("added", structures.I64)]})
    sizes = [ctypes.sizeof(structures.SHARED[name]), ctypes.sizeof(longer)]
    monkeypatch.setitem(structures.SHARED, name, longer)
    expected = f"structure '{name}' has {sizes[0]} bytes in C, {sizes[1]} in Python"
    target = kernels.runnable()[0]
    with pytest.raises(structures.StructureMismatch, match=expected):
        Library(build.compiled(target), target)
    assert expected in str(kernels.load(target))  # torch computes instead, and says why


@pytest.mark.parametrize("phases", [9, 11])
def test_miscounted_phases_are_an_error(phases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*build.SOURCES, *build.HEADERS]:
        (tmp_path / name).write_bytes((build.FOLDER / name).read_bytes())
    source = tmp_path / "decoder.c"
    source.write_text(re.sub(r"PHASES_PER_LAYER = \d+", f"PHASES_PER_LAYER = {phases}", source.read_text()))
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    try:
        build._compile(["-march=x86-64-v3", "-O1"], tmp_path / "miscounted.so")
    except build.BuildError as error:
        pytest.skip(str(error))
    model = decoders.make("llama")
    compute = packed(Library(tmp_path / "miscounted.so", "miscounted"), model)
    with pytest.raises(RuntimeError, match="another number of phases"):
        compute(Cache(model), [0] * 5, range(5), IDS[:5], 5)
