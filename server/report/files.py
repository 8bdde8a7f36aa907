"""A report as files: plots in the cache beside the figures, everything in a folder where it is asked for."""

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
    """The document, and what follows from it."""
    rows, advice = rows_of(document), advice_of(document)
    return {
        **document,
        "front": sorted(front(rows)),
        "recommendation": {"precision": advice.precision, "sentences": list(advice.sentences)},
    }


def write(document: Mapping[str, Any], kept: Path, out: Path) -> list[Path]:
    """Markdown, JSON and the page into ``out``, the plots into a folder in it; what was written.

    Args:
        kept: where the plots lie.

    Raises:
        OSError: it can't be written.
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
