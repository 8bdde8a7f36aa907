"""Python's help topics as a text to calibrate on, and another one to measure on."""

from pathlib import Path
from pydoc_data.topics import topics

from loaders.texts.corpus import is_held_out


def split_topics(calibration: Path, characters: int = 60_000) -> str:
    """Writes the training side's first characters to ``calibration``; returns the held-out side."""
    sides = ["", ""]
    for name, topic in topics.items():
        sides[is_held_out(f"topic:{name}")] += f"{topic}\n\n"
    calibration.write_text(sides[0][:characters])
    return sides[1]
