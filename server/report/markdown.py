"""A report as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.report.advice import Advice, advise
from server.report.columns import cells, legend
from server.report.plots import TITLES
from server.report.rows import rows_of, why_no_quality
from server.tables import markdown_table


def advice_of(document: Mapping[str, Any]) -> Advice:
    return advise(rows_of(document), why_no_quality(document))


def markdown(document: Mapping[str, Any], plots: Sequence[str] = (), folder: str = "") -> str:
    """The report as Markdown: recommendation, table, legend, plots, layers, method.

    Args:
        plots: names of the plots that were drawn; each is linked as an SVG file in ``folder``.
    """
    first, *others = advice_of(document).sentences
    parts = [
        f"# {document['model']['name']}: which precision?",
        f"**{first}**",
        "\n".join(f"- {sentence}" for sentence in others),
        markdown_table(cells(document, rows_of(document))),
        "\n".join(f"- {term}: {meaning}" for term, meaning in legend(document)),
        *(f"![{TITLES[name]}]({folder}{name}.svg)" for name in plots),
        "\n".join(["## Layers", "", *layers(document)]),
        "\n".join(["## How it was measured", "", *(f"- {fact}" for fact in facts(document))]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def layers(document: Mapping[str, Any]) -> list[str]:
    """A line for each precision: the quantized share, the SQNR, and why layers were not quantized."""
    found = []
    for row in rows_of(document):
        proof = document["precisions"][row.precision]["loading"]["proof"]
        if proof is None:
            continue
        done = [one for one in proof["layers"] if one["quantized"]]
        noise = [one["sqnr_db"] for one in done if one["sqnr_db"] is not None]
        kept = dict.fromkeys(one["reason"] for one in proof["layers"] if one["reason"])
        text = f"{row.precision}: {quantized(proof)}"
        text += f" ({len(done)} layers, SQNR {min(noise):.1f} to {max(noise):.1f} dB)" if noise else ""
        found.append(f"- {text}" + (f"; kept, because {'; '.join(kept)}" if done and kept else ""))
    return found


def quantized(proof: Mapping[str, Any]) -> str:
    share: float = proof["quantized_share"]
    return f"{share:.1%} of the linear weights quantized" if share else "nothing is quantized"


def threads(host: Mapping[str, Any]) -> str:
    return "1 thread" if host["threads"] == 1 else f"{host['threads']} threads"


def facts(document: Mapping[str, Any]) -> list[str]:
    """Model, host, versions and method: what a comparison with other figures needs."""
    model, host, text, versions = (document[name] for name in ("model", "host", "text", "versions"))
    where = host["gpu"] or f"{host['cpu']}, {threads(host)}"
    revision = f", revision {model['revision']}" if model["revision"] else ""
    found = [
        f"model: {model['name']} ({model['architecture']}{revision}), "
        f"{model['file_bytes'] / 1e6:,.1f} MB on disk",
        f"host: {where}; kernels: {host['kernels']}",
        "versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    for steps in document["precisions"].values():
        if "speed" in steps:
            speed = steps["speed"]
            found.append(
                f"speed: {speed['prompt']} prompt tokens, {speed['tokens']} generated, greedy, medians of "
                f"{_runs(document)} runs, each precision in turn with fp32; {spreads(document)}"
            )
            break
    quality = (document["precisions"].get("fp32") or {}).get("quality")
    if quality:
        found.append(
            f"quality: {text['name']}, {quality['tokens']:,} tokens, {quality['scored']:,} of them scored in "
            f"windows of {quality['window']} at stride {quality['stride']}; fp32's perplexity "
            f"{quality['perplexity']:.5g} a token, of a vocabulary of {model['vocabulary']:,}"
        )
    found += [f"{name} has no figures, or not all: {why}" for name, why in document["failed"].items()]
    return [*found, f"measured until {document['finished'] or 'now, unfinished'}"]


def _runs(document: Mapping[str, Any]) -> str:
    """The number of runs per batch; more were made where they scattered."""
    counts = {
        len(batch["decode_rates"])
        for steps in document["precisions"].values()
        if "speed" in steps
        for batch in steps["speed"]["batches"].values()
    }
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def spreads(document: Mapping[str, Any]) -> str:
    """The largest interquartile range of a batch's runs, as a share of the median."""
    found = [
        _middle_half(batch["decode_rates"])
        for steps in document["precisions"].values()
        if "speed" in steps
        for batch in steps["speed"]["batches"].values()
    ]
    return f"the middle half of a batch's runs lay up to {max(found):.0%} apart"


def _middle_half(rates: Sequence[float]) -> float:
    ordered = sorted(rates)
    return (ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]) / ordered[len(ordered) // 2]
