"""One count of durations, read as histograms of different bounds and labels."""

from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import HistogramMetricFamily

from server.observability.durations import Durations, Labels
from server.observability.ended import SpanIds

FINE, COARSE = (0.1, 0.2, 0.4, 1.0), (0.15, 0.4, 3.0)


def read(durations: Durations, bounds: tuple[float, ...]) -> dict[str, float]:
    family = HistogramMetricFamily("x", "text", labels=["a"])
    durations.histogram(family, bounds, lambda labels: labels)
    return {sample.name + sample.labels.get("le", ""): sample.value for sample in family.samples}


@given(st.lists(st.one_of(st.sampled_from(FINE + COARSE), st.floats(0, 5))))
def test_each_histogram_is_as_if_it_had_counted_itself(values: list[float]) -> None:
    durations = Durations(FINE, COARSE)
    durations.observe(values, ("x",))
    for bounds in (FINE, COARSE):
        own = [bisect_left(bounds, value) for value in values]
        found = read(durations, bounds)
        upto = [sum(bucket <= at for bucket in own) for at in range(len(bounds) + 1)]
        assert [found[f"x_bucket{name}"] for name in [*map(str, bounds), "+Inf"]] == upto
        assert found["x_count"] == len(values)
        assert found["x_sum"] == pytest.approx(sum(values))


def test_series_with_the_same_labels_are_added_and_others_left_out() -> None:
    durations = Durations(FINE)
    for labels in (("a", "1"), ("a", "2"), ("b", "1"), ("c", "1")):
        durations.observe((0.3,), labels)

    def first(labels: Labels) -> Labels | None:
        return None if labels[0] == "c" else labels[:1]

    family = durations.histogram(HistogramMetricFamily("x", "text", labels=["a"]), FINE, first)
    counts = {s.labels["a"]: s.value for s in family.samples if s.name == "x_count"}
    assert counts == {"a": 2, "b": 1}


def test_a_bucket_has_its_latest_example() -> None:
    durations = Durations(FINE, COARSE)
    for value, span in ((0.3, "1"), (0.18, "2"), (0.35, None), (2.0, "3")):
        durations.observe((value,), ("x",), SpanIds("trace", span) if span else None)
    family = durations.histogram(
        HistogramMetricFamily("x", "text", labels=["a"]), COARSE, lambda labels: labels
    )
    found = {s.labels["le"]: s.exemplar.labels["span_id"] for s in family.samples if s.exemplar}
    assert found == {"0.4": "2", "3.0": "3"}  # 0.18 came after 0.3, and is in the same bucket
