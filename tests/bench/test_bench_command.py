"""`bitdial bench` from options to output, on a small real checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import server.bench.main
from server.__main__ import main
from server.bench import bandwidth as host
from server.bench import session
from server.bench.contexts import ContextCost, plot
from tests import checkpoints

# many tokens: no row may end before all have begun, however busy the host is
SIZES = ["--batches", "1,3", "--prompt", "6", "--tokens", "240", "--repeat", "2"]


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables CPU affinity and uses small buffers."""
    monkeypatch.setattr(server.bench.main, "pin", lambda threads: None)
    monkeypatch.setattr(session, "_PAUSE", 0.0)
    monkeypatch.setattr(host, "_SMALLEST_BUFFER", 2**20)
    monkeypatch.setattr(host, "_TIMES_L3", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoints.save(checkpoints.gpt2(), tmp_path_factory.mktemp("models") / "tiny"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """(lines before the last, the last as an object) of a successful run."""
    assert main(["bench", *arguments]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


@pytest.mark.usefixtures("forked_processes")
def test_engines_are_compared_with_generate(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    names = "fp32,dynamic-int8"
    lines, report = run(capsys, "--model", folder, "--precisions", names, *SIZES, "--json", str(file))
    assert report == json.loads(file.read_text())
    found = [(row["precision"], row["batch"], row["engine"]) for row in report["rows"]]
    assert found == [
        (name, batch, engine)
        for name in names.split(",")
        for batch in (1, 3)
        for engine in ("bitdial", "transformers")
    ]
    for row in report["rows"]:
        assert len(row["decode_rates"]) == 2
        assert row["prefill_tokens_per_second"] > 0
        assert row["inter_token_p50_ms"] <= row["inter_token_p99_ms"]
        if row["engine"] == "transformers" and row["precision"] == "fp32":
            assert row["same_tokens"] == 1.0  # generate's own tokens, in another process
    assert report["model"]["name"] == "tiny"
    assert report["host"]["threads"] >= 1
    assert report["settings"]["batches"] == [1, 3]
    text = "\n".join(lines)
    assert "kernels: " in text
    assert "read + written bytes" in text
    assert folder not in text + json.dumps(report)
    assert sum(line.startswith(("fp32", "dynamic-int8")) for line in lines) == 8 + 4
    # weights at random: no quality, and it is said
    assert "The weights predict no better than chance" in text
    assert not [line for line in lines if line.startswith("perplexity ")]
    assert not report["quality"]["trained"]
    assert [line["mean_kl"] for line in report["comparison"]] == [None] * 4


@pytest.mark.usefixtures("forked_processes")
def test_a_precision_that_transformers_lacks_is_measured_alone(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--precisions", "static-int8", "--quality-tokens", "0", *SIZES]
    _, document = run(capsys, "--model", folder, *options)
    assert [(row["precision"], row["engine"]) for row in document["rows"]] == [("static-int8", "bitdial")] * 2


@pytest.mark.usefixtures("forked_processes")
def test_quality_is_shown_beside_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "summary.md"
    lines, report = run(
        capsys, "--precisions", "fp32,nf4", "--batches", "1", "--prompt", "4", "--tokens", "60",
        "--repeat", "1", "--quality-tokens", "300", "--markdown", str(file),
    )  # fmt: skip
    quality = report["quality"]
    assert quality["trained"]
    assert 300 <= quality["tokens"] <= 800
    assert quality["scored"] == quality["tokens"] - -(-quality["tokens"] // quality["window"])
    found = {(line["precision"], line["engine"]): line for line in report["comparison"]}
    assert list(found) == [
        (name, engine) for name in ("fp32", "nf4") for engine in ("bitdial", "transformers")
    ]
    ours, generate, nf4, bnb = found.values()
    assert ours["mean_kl"] == 0.0
    assert generate["mean_kl"] < 1e-6  # the same weights in another process
    assert generate["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-4)
    assert 0.01 < nf4["mean_kl"] < 0.5
    assert bnb["mean_kl"] == pytest.approx(nf4["mean_kl"], rel=0.2)
    assert nf4["top1_agreement"] < ours["top1_agreement"] == 1.0
    [rate] = [row["decode_tokens_per_second"] for row in report["rows"] if row["engine"] == "bitdial"][1:]
    assert nf4["decode_tokens_per_second"] == {"1": rate}
    assert f"first {quality['tokens']} tokens of held-out" in "\n".join(lines)
    head, _, *rows = file.read_text().splitlines()
    assert head.startswith(
        "| precision | engine | weights (MB) | perplexity | KL (nats) | top-1 (%) | tok/s 1 |"
    )
    assert len(rows) == 4
    assert f" {nf4['perplexity']:.3f} | {nf4['mean_kl']:.4f} | " in rows[2]


def test_quality_can_be_left_out(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines, report = run(
        capsys, "--model", folder, "--precisions", "fp32", *SIZES, "--no-generate", "--quality-tokens", "0"
    )
    assert "quality" not in report
    assert "better than chance" not in "\n".join(lines)
    [line] = report["comparison"]
    assert line["perplexity"] is None
    assert line["decode_tokens_per_second"].keys() == {"1", "3"}


def test_costs_by_context_and_their_plot(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plots" / "contexts.svg"
    lines, report = run(
        capsys, "--model", folder, "--precisions", "fp32,nf4", "--no-engines", "--contexts", "8,64,250",
        "--repeat", "1", "--plot", str(file),
    )  # fmt: skip
    assert report["rows"] == []
    costs = report["contexts"]
    assert [(c["precision"], c["context"]) for c in costs] == [
        (name, context) for name in ("fp32", "nf4") for context in (8, 64, 250)
    ]
    for short, long in zip(costs[::3], costs[2::3], strict=True):
        assert 0 < short["kv_share"] < long["kv_share"] < 1
    drawn = file.read_text()
    assert "<svg" in drawn
    assert "plotted to contexts.svg" in lines


def test_without_matplotlib_the_plot_is_missed_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = plot([ContextCost("fp32", 8, 1.0, 0.1)], "title", tmp_path / "x.svg")
    assert said == "no plot: matplotlib is not installed (pip install matplotlib)"
    assert not (tmp_path / "x.svg").exists()


def test_memory_while_loading(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines, report = run(capsys, "--model", folder, "--precisions", "fp32", "--no-engines", "--loading")
    [row] = report["loading"]
    assert row["checkpoint_bytes"] == (Path(folder) / "model.safetensors").stat().st_size
    assert row["weights_bytes"] == sum(p.nbytes for p in checkpoints.gpt2().parameters())
    if sys.platform == "linux":
        assert row["ratio"] == row["peak_growth_bytes"] / (row["checkpoint_bytes"] + row["weights_bytes"])
        assert row["peak_growth_bytes"] >= row["resident_growth_bytes"]
    assert any(line.startswith("fp32 ") for line in lines)


def test_somebodys_server(live: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines, report = run(
        capsys, "--http", live, "--precisions", "fp32,bf16", "--streams", "1,3", "--rates", "40",
        "--duration", "0.2", "--prompt", "6", "--tokens", "8", "--no-http-checks",
    )  # fmt: skip
    assert [part["precision"] for part in report["http"]] == ["fp32", "bf16"]
    for part in report["http"]:
        assert [(row["kind"], row["offered"]) for row in part["loads"]] == [
            ("closed loop", 1), ("closed loop", 3), ("poisson", 40),
        ]  # fmt: skip
        assert all(row["requests"] and not row["errors"] for row in part["loads"])
    assert sum(line.startswith(("fp32", "bf16")) for line in lines) == 6
    assert "shares its CPUs" in "\n".join(lines)


@pytest.mark.usefixtures("forked_processes")
def test_a_started_server_is_compared_with_the_engine(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report = run(
        capsys, "--model", folder, "--precisions", "dynamic-int8", "--batches", "1", "--prompt", "32",
        "--tokens", "200", "--repeat", "1", "--no-generate", "--streams", "2", "--rates", "20",
        "--duration", "0.3", "--http",
    )  # fmt: skip
    assert [row["engine"] for row in report["rows"]] == ["bitdial", "bitdial over HTTP"]
    [part] = report["http"]
    assert all(not row["errors"] for row in part["loads"])
    assert part["first_token"]["prompt"] == 128
    assert part["long_prompt"]["prompt"] == 252


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--http", "http://127.0.0.1:9"], 1, "/tokenize can't be reached (ConnectionRefusedError)"),
        (["--http", "ftp://host"], 1, "is not an address such as http://127.0.0.1:8080"),
        (["--batches", "1,x"], 2, "--batches: '1,x' is not a list of numbers"),
        (["--batches", "0"], 2, "is not a list of numbers"),
        (["--rates", "0"], 2, "is not a list of rates"),
        (["--precisions", "int3"], 2, "choose from fp32"),
        (["--prompt", "500", "--tokens", "20"], 1, "exceed the context of 512"),
        (["--text", "missing.txt"], 1, "missing.txt is not a file"),
        (["--contexts", "510"], 1, "--contexts 510: at most 508 in a context of 512"),
    ],
)
def test_an_impossible_measurement_is_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == code
    said = capsys.readouterr().err.strip()
    assert said.startswith("bitdial bench: ")
    assert message in said
    assert "\n" not in said
