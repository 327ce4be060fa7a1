"""Colours, markers and names of the methods in all pictures; the look itself is `engine/pictures.py`'s.

Every axis has a label with its unit; nobody has to tell two lines apart by colour alone.
"""

from __future__ import annotations

from typing import Any

from hdpissa.engine.pictures import BLUE, GREEN, GREY, ORANGE, PINK, RED, picture

__all__ = ["LABELS", "STYLES", "line", "picture"]

STYLES = {
    "hd_pissa": (BLUE, "o"),
    "lora": (ORANGE, "s"),
    "pissa": (GREEN, "^"),
    "full": (RED, "D"),
    "frozen": (GREY, "x"),
    "reference": (PINK, "v"),
}
LABELS = {"hd_pissa": "HD-PiSSA", "lora": "LoRA", "pissa": "PiSSA", "full": "full fine-tuning"}


def line(method: str) -> dict[str, Any]:
    """Keyword arguments of `plot` for a method."""
    colour, marker = STYLES[method]
    return {"color": colour, "marker": marker, "label": LABELS.get(method, method), "markersize": 5}
