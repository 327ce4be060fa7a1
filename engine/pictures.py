"""The look of all pictures: one style, colours that colour-blind readers tell apart, PNG for files and SVG for pages.

A figure is drawn once and comes out in two ways. In the SVG the colours are CSS variables and the text is text, so that
a page shows it dark or light and a reader can search it. matplotlib's global state is not touched beyond its settings,
and those only while a figure is drawn; no display is needed.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY, BROWN = "#CC79A7", "#56B4E9", "#666666", "#7B4B1E"
PALETTE = {
    "blue": BLUE,
    "orange": ORANGE,
    "green": GREEN,
    "red": RED,
    "pink": PINK,
    "sky": SKY,
    "grey": GREY,
    "brown": BROWN,
}
INK = "#1F2328"
DASHES = ("-", "--", ":", "-.")
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
RUN_STYLE = {**STYLE, **dict.fromkeys(_INKED, INK), "grid.color": INK, "grid.alpha": 0.13, "svg.fonttype": "none"}

MOST_POINTS = 1200  # of a curve: about two per pixel of a page
FEW = 20  # points that are shown as they are


@dataclass(frozen=True)
class Picture:
    """A figure that can be drawn.

    Attributes:
        name: of its file, without the ending. title: above it. note: a sentence for the page below it.
        draw: puts it on an empty matplotlib Figure. size: inches.
    """

    name: str
    title: str
    note: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (7.0, 3.6)

    def render(self, png: Path) -> str:
        """Writes the PNG file, whole or not at all, and returns the same as <svg> that refers to nothing outside."""
        import matplotlib as mpl

        temporary = png.with_name(f".{png.name}.partial")
        svg = io.StringIO()
        with mpl.rc_context({**RUN_STYLE, "svg.hashsalt": self.name}):
            figure = make_figure(*self.size)
            title = figure.suptitle(self.title, x=0.02, ha="left", fontsize=11, fontweight="bold")
            self.draw(figure)
            figure.savefig(temporary, format="png", dpi=130)
            title.set_visible(False)  # a page has its own
            figure.set_layout_engine("none")  # it stays as it is; finding it takes as long as drawing
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
        os.replace(temporary, png)
        return _for_page(svg.getvalue(), self.name, self.title)


def make_figure(width: float, height: float) -> Any:
    """A figure of so many inches that belongs to nobody's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def picture(target: Path, *, columns: int = 1, width: float = 5.5, height: float = 4.0) -> Iterator[Any]:
    """Axes to draw on, one or a row of them; saved to `target` at the end. Needs no display.

    Args:
        width, height: of one panel, in inches.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = make_figure(width * columns, height)
        yield figure.subplots(1, columns)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)


def _for_page(svg: str, name: str, title: str) -> str:
    """matplotlib's file as an element: no header, a label for screen readers, colours as variables of the page."""
    element = svg[svg.index("<svg") :]
    for word, colour in PALETTE.items():
        element = re.sub(colour, f"var(--{word})", element, flags=re.IGNORECASE)
    element = re.sub(INK, "currentColor", element, flags=re.IGNORECASE)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    element = re.sub(r' xmlns(:xlink)?="[^"]*"', "", element)  # of no use within HTML
    element = re.sub(r'(id="|#)((?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PathC|LineC|FillB)\w*)',
                     rf"\g<1>{name}-\g<2>", element)  # fmt: skip
    return element.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).replace("xlink:href", "href")


# --- long runs ------------------------------------------------------------------------------------


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """A curve of at most so many points that looks the same: of each stretch the lowest and the highest, in order."""
    if len(x) <= most:
        return list(x), list(y)
    kept: list[int] = []
    stretches = most // 2
    for k in range(stretches):
        here = range(k * len(x) // stretches, (k + 1) * len(x) // stretches)
        known = [i for i in here if math.isfinite(y[i])] or [here[0]]
        kept += sorted({min(known, key=lambda i: y[i]), max(known, key=lambda i: y[i])})
    return [x[i] for i in kept], [y[i] for i in kept]


def half_window(count: int) -> int:
    """Neighbours on each side that a smoothed point is the mean of; 0 for a curve too short to smooth."""
    return 0 if count < FEW else max(1, count // 40)


def smooth(y: Sequence[float], half: int) -> list[float]:
    """Means over each point and its neighbours, twice: a bell-shaped window, and no lag. nan counts for none."""
    import numpy as np

    values = np.asarray(y, dtype=float)
    for _ in range(2):
        known = np.isfinite(values)
        sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(known, values, 0.0), known))
        at = np.arange(len(values))
        low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
        with np.errstate(invalid="ignore"):
            values = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return values.tolist()
