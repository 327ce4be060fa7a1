"""The look of all pictures.

Every axis has a label with its unit; no two lines differ by colour only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, RED, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
LOOK = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


@contextmanager
def picture(target: Path, *, columns: int = 1, width: float = 5.5, height: float = 4.0) -> Iterator[Any]:
    """Axes to draw on, one or a row of them; saved to `target` at the end. Needs no display.

    Args:
        width, height: of one panel, in inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        yield figure.subplots(1, columns)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=130)
