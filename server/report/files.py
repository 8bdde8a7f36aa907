"""A report as Markdown, JSON, HTML and plots in a folder that the user names."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.report.markdown import advice_of, markdown
from server.report.page import page
from server.report.plots import drawn
from server.report.rows import front, rows_of

PLOTS = "plots"


def as_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its Pareto front and recommendation."""
    rows, advice = rows_of(document), advice_of(document)
    return {
        **document,
        "front": sorted(front(rows)),
        "recommendation": {"precision": advice.precision, "sentences": list(advice.sentences)},
    }


def write(document: Mapping[str, Any], kept: Path, out: Path) -> list[Path]:
    """Writes Markdown, JSON and HTML into ``out``, the plots into a subfolder; returns the texts' paths.

    Args:
        kept: the folder of the saved report, with its plots.

    Raises:
        OSError: a file can't be written.
    """
    names = drawn(kept)
    (out / PLOTS).mkdir(parents=True, exist_ok=True)
    for name in names:
        for ending in ("svg", "png"):
            shutil.copyfile(kept / f"{name}.{ending}", out / PLOTS / f"{name}.{ending}")
    texts = {
        "report.md": markdown(document, names, f"{PLOTS}/"),
        "report.json": json.dumps(as_json(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": page(document, kept),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]
