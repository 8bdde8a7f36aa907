"""A report as one self-contained HTML page: style and plots inline, no scripts."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from server.report.columns import cells, legend, shown
from server.report.markdown import advice_of, facts, quantized, threads
from server.report.plots import TITLES, drawn
from server.report.rows import rows_of
from server.tables import NONE

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_LAYER_HEADS = (
    "layer", "before", "after", "kept as", "shape", "bytes", "bits", "error", "max", "SQNR dB", "why kept",
)  # fmt: skip


def page(document: Mapping[str, Any], folder: Path) -> str:
    """The report as an HTML document.

    Args:
        folder: has the plots; those that exist are shown.
    """
    model, host = document["model"], document["host"]
    advice = advice_of(document)
    first, *others = (escape(sentence) for sentence in advice.sentences)
    where = host["gpu"] or f"{host['cpu']}, {threads(host)}"
    title = f"{model['name']}: which precision?"
    under = f"{model['architecture']} on {where}; {document['finished'] or 'unfinished'}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="under">{escape(under)}</p>',
        f'<div class="advice"><p>{first}</p>{_list(others)}</div>',
        f"<h2>Every precision</h2>{_table(document, advice.precision)}{_legend(document)}",
        f"<h2>Plots</h2>{_plots(folder)}" if drawn(folder) else "",
        f"<h2>Proof, layer by layer</h2>{_layers(document)}",
        f"<h2>How it was measured</h2>{_list([escape(fact) for fact in facts(document)], 'facts')}",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _list(items: Sequence[str], kind: str = "") -> str:
    if not items:
        return ""
    return f"<ul{f' class={kind}' if kind else ''}>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _table(document: Mapping[str, Any], chosen: str | None) -> str:
    rows = rows_of(document)
    head, *lines = cells(document, rows)
    marked = [row.precision == chosen for row in rows]
    body = "".join(_line(line, "chosen" if mark else "") for line, mark in zip(lines, marked, strict=True))
    return (
        f'<div class="wide"><table><thead>{_line(head, cell="th")}</thead><tbody>{body}</tbody></table></div>'
    )


def _line(cells: Sequence[str], kind: str = "", cell: str = "td") -> str:
    inner = "".join(f"<{cell}>{escape(text)}</{cell}>" for text in cells)
    return f"<tr{f' class={kind}' if kind else ''}>{inner}</tr>"


def _legend(document: Mapping[str, Any]) -> str:
    pairs = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in legend(document))
    return f"<dl>{pairs}</dl>"


def _plots(folder: Path) -> str:
    figures = []
    for name in drawn(folder):
        kind = ' class="long"' if name == "layers" else ""
        svg = _inline((folder / f"{name}.svg").read_text(encoding="utf-8"), name)
        figures.append(f'<figure{kind} role="img" aria-label="{escape(TITLES[name])}">{svg}</figure>')
    return f'<div class="plots">{"".join(figures)}</div>'


def _inline(svg: str, name: str) -> str:
    """The ``<svg>`` element, its ids prefixed with the plot's name so that they are unique on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    return re.sub(r'href="#', f'href="#{name}-', svg)


def _layers(document: Mapping[str, Any]) -> str:
    found = []
    for row in rows_of(document):
        proof = document["precisions"][row.precision]["loading"]["proof"]
        if proof is None:
            continue
        alarm = f'<p class="alarm">{escape(proof["warning"])}</p>' if proof["warning"] else ""
        lines = "".join(_line(_layer(one)) for one in proof["layers"])
        head = _line(_LAYER_HEADS, cell="th")
        found.append(
            f"<details><summary><b>{escape(row.precision)}</b>: {escape(quantized(proof))}{alarm}</summary>"
            f'<div class="wide"><table><thead>{head}</thead>'
            f"<tbody>{lines}</tbody></table></div></details>"
        )
    return "".join(found)


def _layer(one: Mapping[str, Any]) -> list[str]:
    return [
        one["name"],
        one["kind_before"],
        one["kind_after"],
        one["format"],
        " × ".join(map(str, one["shape"])),
        f"{one['nbytes']:,}" if one["shared_with"] is None else f"of {one['shared_with']}",
        f"{one['bits_per_weight']:.2f}",
        shown(one["relative_error"], ".3%"),
        shown(one["max_error"], ".2e"),
        shown(one["sqnr_db"], ".1f"),
        one["reason"] or NONE,
    ]
