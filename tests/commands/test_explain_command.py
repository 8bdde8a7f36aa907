"""``bitdial explain``: a layer of known weights in the terminal, as JSON and as a picture; and its errors."""

import json
import re
import struct
import xml.etree.ElementTree as ElementTree
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from loaders.layers.int4_codes import TABLE
from server.__main__ import main
from server.commands.explain import figure
from server.report import plots
from server.report.plots import PlotsUnavailable
from tests import checkpoints
from tests.commands.test_terminal import Screen

LAYER = "transformer.h.1.mlp.c_fc"
WEIGHT = 0.78125  # 100/128, row 3, column 5: the largest but for one outlier of 1.5 in row 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = checkpoints.gpt2()
    with torch.no_grad():
        weight = model.transformer.h[1].mlp.c_fc.weight  # (inputs, outputs)
        weight.copy_((weight * 128).round().clamp(-99, 99) / 128)
        weight[5, 3], weight[0, 0] = WEIGHT, 1.5
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = 40.0  # the layer with the largest error
    return str(checkpoints.save(model, tmp_path_factory.mktemp("models") / "tiny"))


def explained(folder: str, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["explain", "--model", folder, "--json", str(out), *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_figures_of_known_weights(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schemes = "int8-tensor,int8-channel,uint8-tensor,int8-tensor-mse,int4-16"
    options = ("--layer", "1.mlp.c_fc", "--weight", "3,5", "--schemes", schemes)
    found = explained(folder, tmp_path / "out.json", *options)
    assert (found["layer"], found["shape"], found["high"]) == (LAYER, [256, 64], 1.5)
    assert sum(found["counts"]) == 256 * 64
    bits = found["weight"]["float32_bits"]
    assert struct.unpack(">f", int(bits, 2).to_bytes(4, "big")) == (WEIGHT,)
    tensor, channel, asymmetric, mse, group = found["schemes"].values()
    assert tensor["scale"] == pytest.approx([1.5 / 127] * 2)
    code = round(WEIGHT / (1.5 / 127))
    assert (tensor["weight"]["code"], tensor["weight"]["bits"]) == (code, f"{code:08b}")
    assert channel["ranges"] == 256
    assert channel["weight"]["code"] == 127, "it is the largest of its row"
    assert channel["weight"]["value"] == pytest.approx(WEIGHT)
    zero = round(-found["low"] / ((1.5 - found["low"]) / 255))
    assert asymmetric["zero_point"] == [zero, zero]
    assert int(asymmetric["weight"]["bits"], 2) == asymmetric["weight"]["code"] > zero
    assert mse["clipped"] >= 1 > tensor["clipped"]
    assert mse["relative_error"] < tensor["relative_error"]
    assert (group["ranges"], group["bits_per_weight"]) == (256 * 4, 4 + 32 / 16)
    for one in found["schemes"].values():
        assert sum(one["counts"]) == 256 * 64
        assert one["sqnr_db"] == pytest.approx(-20 * torch.tensor(one["relative_error"]).log10().item(), 1e-4)
    printed = capsys.readouterr().out
    sign, exponent, fraction = bits[0], bits[1:9], bits[9:]
    assert f"{sign} {exponent} {fraction}" in printed
    assert re.search(rf"int8-tensor +{code:08b} +{code} × 0\.01181 = ", printed)


def test_the_format_of_int4_is_shown_as_rounded_alone(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg = tmp_path / "layer.svg"
    options = ("--layer", LAYER, "--weight", "3,5", "--schemes", "int4-table,nf4", "--out", str(svg))
    found = explained(folder, tmp_path / "out.json", *options)["schemes"]
    own, nf4 = found["int4-table"], found["nf4"]
    assert own["table"] == list(map(float, TABLE))
    assert (own["note"], nf4["note"]) == ("not calibrated, unlike int4", None)
    assert (own["ranges"], own["zero_point"]) == (256 * 4, None)
    assert own["bits_per_weight"] == 4 + 8 / 16 + 32 / 64
    code = own["weight"]
    assert code["bits"] == f"{code['code']:04b}"
    assert code["level"] == TABLE[code["code"]]
    assert code["value"] == pytest.approx(code["level"] * code["scale"])
    printed = capsys.readouterr().out
    assert "int4-table: not calibrated, unlike int4" in printed
    assert f"{code['level']:g} × {code['scale']:.4g} = {code['value']:.5g}" in printed
    drawn = " ".join(ElementTree.parse(svg).getroot().itertext())
    assert "int4-table" in drawn
    assert "not calibrated, unlike int4" in drawn


def test_without_a_layer_the_largest_errors_are_listed_and_the_first_is_shown(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(folder, tmp_path / "out.json", "--schemes", "int8-tensor")
    assert found["layer"] == found["layers"][0]["name"] == "transformer.h.0.mlp.c_proj"
    errors = [one["relative_error"] for one in found["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert {one["name"] for one in found["layers"]} >= {LAYER, "lm_head"}
    assert not any("wte" in one["name"] for one in found["layers"]), "an embedding is looked up"
    assert errors[0] == found["schemes"]["int8-tensor"]["relative_error"]
    printed = capsys.readouterr().out
    assert "The largest errors in int8-tensor, 9 of 9 linear layers" in printed
    assert printed.index("lm_head") < printed.index("0.mlp.c_proj of tiny: Conv1D, 64 × 256, 65,536 bytes")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_gets_it_within_its_width(
    folder: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    with redirect_stdout(screen):
        assert main(["explain", "--model", folder]) == 0
    shown = screen.getvalue().splitlines()
    assert max(map(len, shown)) <= columns
    bars = [line for line in shown if line.startswith("int8-tensor-kl") and "█" in line]
    assert len(bars) == 1
    assert any(line.startswith("float32") for line in shown)


def test_a_picture(folder: str, tmp_path: Path) -> None:
    svg, png = tmp_path / "new" / "layer.svg", tmp_path / "layer.png"
    arguments = ["explain", "--model", folder, "--layer", LAYER, "--schemes", "int8-tensor,uint4-32"]
    assert main([*arguments, "--out", str(svg)]) == 0
    text = " ".join(ElementTree.parse(svg).getroot().itertext())
    for expected in (LAYER, "int8-tensor", "uint4-32", "S 0.0118", "512 ranges", "float32"):
        assert expected in text
    assert main([*arguments[:-1], "int8-tensor", "--out", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_scheme_that_does_not_fit_is_left_out(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(folder, tmp_path / "o.json", "--layer", LAYER, "--schemes", "int4-48,int4-channel")
    assert list(found["schemes"]) == ["int4-channel"]
    assert (
        "left out: int4-48: rows of 64 inputs can't be divided into groups of 48" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--layer", "c_fcc"], "--layer: no layer 'c_fcc'; for example ", 2),
        (["--layer", "c_fc"], "--layer: several layers end in 'c_fc'; for example transformer.h.0", 2),
        (["--schemes", "int9x"], "--schemes: no quantizer 'int9x'; a name is int2 … int16", 2),
        (["--schemes", "int8-channel-kl"], "--schemes: no quantizer 'int8-channel-kl'", 2),
        (["--schemes", "uint8-full"], "--schemes: no quantizer 'uint8-full'", 2),
        (["--schemes", "int17"], "--schemes: no quantizer 'int17'", 2),
        (["--schemes", "int4-tables"], "with -nested for scales in eight bits; or int4-table", 2),
        (["--schemes", ","], "--schemes: no quantizer ''; a name is", 2),
        (["--schemes", "int4-48", "--layer", LAYER], "--schemes: int4-48: rows of 64 inputs", 2),
        (["--weight", "9"], "--weight: '9' is not ROW,COLUMN", 2),
        (["--layer", LAYER, "--weight", "256,0"], f"--weight: {LAYER} has 256 rows and 64 columns", 2),
        (["--out", "layer.pdf"], "--out: 'layer.pdf' must end in .svg or .png", 2),
        (["--layer", LAYER, "--json", "/dev/full"], "--json: No space left on device", 1),
        (["--model", "no/such"], "no/such", 1),
    ],
)  # fmt: skip
def test_an_error_is_one_line(
    folder: str, arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in arguments else ["--model", folder]
    assert main(["explain", *model, *arguments]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bitdial explain: ")
    assert message in last


def test_weights_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoints.gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_proj.weight[3, 4] = torch.nan
    folder = checkpoints.save(model, tmp_path / "broken")
    assert main(["explain", "--model", str(folder), "--layer", "0.attn.c_proj"]) == 1
    assert "0.attn.c_proj has weights that are NaN or infinite" in capsys.readouterr().err


def test_without_matplotlib_a_picture_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise PlotsUnavailable(plots.MISSING)

    monkeypatch.setattr(plots, "require", missing)
    monkeypatch.setattr(figure, "draw", lambda *_: pytest.fail("drawn"))
    assert main(["explain", "--model", "no/such", "--out", "layer.svg"]) == 2
    assert capsys.readouterr().err == f"bitdial explain: {plots.MISSING}\n"
