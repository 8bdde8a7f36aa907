"""The result of ``plan_internet_scale.py`` in Markdown, and as a picture."""

from pathlib import Path
from typing import Any

FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
_NAMES = ("TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms", "ITL p99, ms")


_TEXT = """\
# {replicas:,} replicas over a day

Made by `scripts/plan_internet_scale.py`; [planning.md](../planning.md#thousands-of-replicas) says how, and
within which limits. A replica is {precision} of {model} on one core with batches of {slots} and serves at
most {capacity:.2f} requests a second of {prompt} + {tokens} tokens.

Assumed: mean traffic between a third of the peak (08:00) and the peak (20:00), {peak_per_second:,.0f}
requests a second, which is {peak_load:.0%} of the fleet's capacity; each minute's varies by
{minute_spread:.0%}; a replica fails once in {days_between_failures:g} days and serves again after
{restart_seconds:g} s; at 20:30 {outage_share:.0%} of the replicas fail together.

## The day

{day}

![latencies and replicas over the day]({plot})

## The chain beside the event simulation

16 replicas, 100 s from the first request, chain / events:

{checks}
"""


def document(result: dict[str, Any]) -> str:
    tables = {"day": _table(_day(result)), "checks": _table(_checks(result)), "plot": result["plot"]}
    return _TEXT.format(**result["assumptions"], **result["replica"], **tables)


def _day(result: dict[str, Any]) -> list[list[str]]:
    heads = ["policy", "requests", "sent again", "refused", "worst 10 minutes", "TTFT p99 then, ms"]
    rows = [[*heads, "TTFT p99 at 20:00, ms", "at 08:00, ms"]]
    for policy, run in result["day"].items():
        windows = run["windows"]
        worst = max(windows, key=lambda window: float(window["ttft_p99_ms"]))
        clock = f"{int(worst['hour']):02}:{round(worst['hour'] % 1 * 60):02}"
        refused = f"{run['refused'] / run['requests']:.3%}"
        at = {round(window["hour"], 2): f"{window['ttft_p99_ms']:.0f}" for window in windows}
        counts = f"{run['requests']:,}", f"{run['retried']:,}", refused
        rows.append([policy, *counts, clock, f"{worst['ttft_p99_ms']:.0f}", at[20.0], at[8.0]])
    return rows


def _checks(result: dict[str, Any]) -> list[list[str]]:
    rows = [["policy", "load", *_NAMES]]
    for row in result["check"]:
        both = (f"{row['chain'][name]:.0f} / {row['events'][name]:.0f}" for name in FIGURES)
        rows.append([row["policy"], f"{row['load']:g}", *both])
    return rows


def _table(cells: list[list[str]]) -> str:
    head, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join((head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rows))


def plot(result: dict[str, Any], file: Path) -> None:
    """Arrivals and capacity, and both latencies of each policy, over the day."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "bitdial"
    figure, (traffic, first, between) = plt.subplots(3, 1, figsize=(9, 9), sharex=True)
    windows = next(iter(result["day"].values()))["windows"]
    hours = [window["hour"] for window in windows]
    capacity = result["replica"]["capacity"]
    traffic.plot(hours, [window["arrivals_per_second"] for window in windows], label="arrivals")
    serving = [window["serving"] * capacity for window in windows]
    traffic.plot(hours, serving, label="capacity of the replicas that serve")
    for policy, run in result["day"].items():
        for axes, name in ((first, "ttft_p99_ms"), (between, "itl_p99_ms")):
            axes.plot(hours, [window[name] for window in run["windows"]], label=policy)
    traffic.set_ylabel("requests per second")
    first.set_ylabel("time to first token, p99, ms")
    first.set_yscale("log")
    between.set_ylabel("between tokens, p99, ms")
    between.set_xlabel("hour of the day")
    for axes in (traffic, first, between):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
