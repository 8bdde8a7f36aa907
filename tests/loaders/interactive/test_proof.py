"""What a notebook shows of a loaded model."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import loaders
from loaders.base import KeptLayer, LoadedModel
from tests.fakes import fake_model


class Tables(HTMLParser):
    """The rows of all tables of a page, and its tags; every tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        assert not attrs
        self.tags.add(tag)
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaders.load("nf4", "bundled")


def test_the_tables_show_bytes_formats_and_reasons(model: LoadedModel) -> None:
    tables = Tables(model._repr_html_())
    rows = {row[0]: row[1:] for row in tables.rows}
    for dtype, size in model.footprint.by_dtype.items():
        assert rows[dtype][0] == f"{size:,}"
    assert rows["model"] == ["bundled"]
    assert rows["kernels"] == [model.details["kernels"]]
    assert rows["transformer.h.0–4.attn.c_attn"][:2] == ["5", "4-bit"]
    assert rows["transformer.h.0–4.attn.c_attn"][3] == "quantized"
    assert rows["transformer.wpe"][3] == "the embedding is looked up, not multiplied"
    layers = tables.rows[[row[0] for row in tables.rows].index("layers") + 1 :]
    footprint = model.footprint
    assert sum(int(row[1]) for row in layers) == len(footprint.quantized) + len(footprint.kept)


def test_the_line_says_how_large_and_how_quantized(model: LoadedModel) -> None:
    footprint = model.footprint
    assert repr(model) == str(model)
    assert re.fullmatch(
        rf"<LoadedModel nf4 of bundled: [\d.]+ MB, {footprint.bits_per_weight:.2f} bits per weight, "
        rf"{len(footprint.quantized)} layers quantized, {len(footprint.kept)} kept, kernels: .+>",
        repr(model),
    )


def test_hostile_names_stay_text() -> None:
    hostile = "<script>alert('x')</script>"
    model = fake_model(hostile)
    model.details = {"kernels": hostile}
    model.footprint = replace(
        model.footprint, by_dtype={hostile: 4000}, quantized=[hostile], kept=[KeptLayer(hostile, hostile)]
    )
    tables = Tables(model._repr_html_())
    assert tables.tags == {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    assert [hostile, "1", "unknown", "", hostile] in tables.rows


def test_a_closed_model_is_shown_without_its_formats() -> None:
    model = loaders.load("bf16", "bundled")
    before = Tables(model._repr_html_()).rows
    model.close()
    after = Tables(model._repr_html_()).rows
    assert [row[0] for row in before] == [row[0] for row in after]
    assert {row[2] for row in after if row[0].startswith("transformer.h")} == {"unknown"}
