"""Draws the page of a run from the files in its output folder: needs no GPU and reads no model.

`report.html` has the loss and what only HD-PiSSA has to show: norms per slice, and spectra of what was learned, with
the rank of LoRA and that of one step. Its pictures are embedded, it has no script, and its policy forbids the browser
to fetch anything. `training_loss.png` is the first of them. Also for a run that is going on, was killed or failed.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hdpissa.engine.files import atomic
from hdpissa.launch.common.metrics import RunFiles, read_json

PAGE, LOSS, SPECTRA = "report.html", "training_loss.png", "spectra.json"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Okabe and Ito's palette, which colour-blind readers tell apart, too: https://jfly.uni-koeln.de/color/
BLUE, RED = "#0072B2", "#D55E00"
COLOURS = (BLUE, RED, "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#7B4B1E", "#666666")
DASHES = ("-", "--", ":", "-.")
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
SMOOTHED = 50  # points of a curve that gets its moving mean
MANY = 2000  # points of a curve that is kept as pixels
NORMS = {"slice_grad_norms": "gradient norm", "slice_delta_norms": "size of the update, ‖ΔA, ΔB‖"}


@dataclass(frozen=True)
class Picture:
    """A drawn figure with what stands above and below it on the page."""

    title: str
    note: str
    figure: Any

    @property
    def url(self) -> str:
        content = io.BytesIO()
        with _style():
            self.figure.savefig(content, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def write_report(folder: Path, state: str | None = None) -> list[str]:
    """Writes the page and the picture of the loss; returns the names of the files.

    Args:
        state: in place of run_state.json's, which is "running" until everything is written.
    """
    from jinja2 import Environment, StrictUndefined

    record, weights = RunFiles.read(folder), read_json(folder / SPECTRA).get("weights", [])
    spectra = [spectrum(weight) for weight in weights if weight["values"][0] > 0]
    with _style():
        loss = draw_loss(record)
        drawn = [loss, draw_slices(record), draw_spectra(spectra)]
        if loss is not None:
            with atomic.replacing(folder / LOSS) as draft:
                loss.figure.savefig(draft, format="png", dpi=130)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(
        title=folder.resolve().name,
        state=state or record.state.get("state", "unknown"),
        pictures=[picture for picture in drawn if picture is not None],
        spectra=spectra,
    )
    atomic.write_text(folder / PAGE, page)
    return [PAGE, LOSS] if loss is not None else [PAGE]


def column(record: RunFiles, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have this field, nan where it was not finite; lists of S numbers: (N, S)."""
    rows = record.having(name)
    return np.array([row["step"] for row in rows], dtype=float), np.array([row[name] for row in rows], dtype=float)


# --- pictures --------------------------------------------------------------------------------------


def draw_loss(record: RunFiles) -> Picture | None:
    steps, losses = column(record, "loss")
    evaluated_at, evaluated = column(record, "eval_loss")
    if not (np.isfinite(losses).any() or np.isfinite(evaluated).any()):
        return None
    figure, axes = _axes(9.0, 3.6)
    smoothed = len(steps) >= SMOOTHED
    look = {"alpha": 0.3, "linewidth": 0.8} if smoothed else {"marker": ".", "linewidth": 1.4, "label": "training"}
    axes.plot(steps, losses, color=BLUE, rasterized=len(steps) > MANY, **look)
    if smoothed:
        axes.plot(steps, moving_mean(losses), color=BLUE, linewidth=1.8, label="training, moving mean")
    if len(evaluated):
        axes.plot(evaluated_at, evaluated, color=RED, linestyle="--", marker="o", markersize=4, label="evaluation")
    if skipped := [row["step"] for row in record.having("loss") if row.get("applied") is False]:
        bottom = axes.get_xaxis_transform()
        axes.plot(skipped, [0.02] * len(skipped), "kx", transform=bottom, label="skipped step")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend(frameon=False)
    return Picture("Loss", "Training loss as logged, and the mean over all target tokens of the evaluation.", figure)


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Over a twentieth of all points (odd), around each; nan counts for nothing."""
    window, known = np.ones(2 * (len(values) // 40) + 1), np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.convolve(np.where(known, values, 0), window, "same") / np.convolve(known, window, "same")


def draw_slices(record: RunFiles) -> Picture | None:
    found = {name: column(record, name) for name in NORMS if record.having(name)}
    if not found:
        return None
    figure, panels = _axes(9.0, 3.2, columns=len(found))
    for panel, (name, (steps, norms)) in zip(np.atleast_1d(panels), found.items(), strict=True):
        _draw_norms(panel, steps, norms)
        positive = norms[norms > 0]
        if positive.size and positive.max() > 20 * positive.min():
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.set(xlabel="optimizer step", title=NORMS[name])
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    note = "Of each slice, over all weights. One that stays at 0 or far from the others learns nothing, or is broken."
    return Picture("Slices", note, figure)


def _draw_norms(panel: Any, steps: np.ndarray, norms: np.ndarray) -> None:
    """Norms (N × S): a curve for each of few slices, of many how they are spread."""
    if norms.shape[1] <= len(COLOURS):
        marker = "." if len(steps) < SMOOTHED else ""
        for index, values in enumerate(norms.T):
            look = {"color": COLOURS[index], "linestyle": DASHES[index % 4], "marker": marker}
            panel.plot(steps, values, label=f"slice {index}", linewidth=1.3, rasterized=len(steps) > MANY, **look)
        return
    low, quarter, middle, three, high = np.quantile(norms, [0, 0.25, 0.5, 0.75, 1], axis=1)
    panel.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label=f"all {norms.shape[1]} slices")
    panel.fill_between(steps, quarter, three, color=BLUE, alpha=0.3, linewidth=0, label="half of them")
    panel.plot(steps, middle, color=BLUE, linewidth=1.6, label="median")


def draw_spectra(weights: Sequence[Mapping[str, Any]]) -> Picture | None:
    """A panel for each kind of weight, a curve for each of its layers."""
    if not weights:
        return None
    kinds = list(dict.fromkeys(weight["kind"] for weight in weights))
    layers = sorted({weight["layer"] for weight in weights}, key=lambda text: (len(text), text))
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure, panels = _axes(9.0, 0.8 + 2.1 * rows, rows=rows, columns=columns, sharey=True)
    panels = list(np.atleast_1d(panels).flat)
    for weight in weights:
        panel, at = panels[kinds.index(weight["kind"])], layers.index(weight["layer"])
        values, look = [v for v in weight["values"] if v > 0], {"color": COLOURS[at % 8], "linestyle": DASHES[at % 4]}
        panel.semilogy(range(1, len(values) + 1), values, linewidth=1.5, label=layers[at], **look)
        for rank, dash, name in ((weight["r"], (0, (5, 3)), "r"), (weight["step_rank"], (0, (1, 2)), "2·r·S")):
            panel.axvline(rank, color="black", linewidth=1, linestyle=dash, label=name)
    for panel, kind in itertools.zip_longest(panels, kinds):
        panel.set_title(kind, fontsize=10)
        panel.set_visible(kind is not None)
    figure.supylabel("singular value of ΔW", fontsize=10)
    labels = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = [*layers, "r", "2·r·S"]
    figure.legend([labels[name] for name in order], order, loc="outside upper right", ncols=8, frameon=False)
    note = (
        "Singular values of what training has changed in a weight, to first order: LoRA of rank r has r, a step 2·r·S."
    )
    return Picture("Spectra of ΔW", note, figure)


def spectrum(weight: Mapping[str, Any]) -> dict[str, Any]:
    """With how much of ‖ΔW‖² a matrix of rank r can hold at best (`held`), and which `rank` holds 99 % of it."""
    *_, kind = parts = weight["name"].split(".")
    shares = np.cumsum(np.square(weight["values"]))
    return {
        **weight,
        "norm": f"{math.sqrt(shares[-1]):.3g}",
        "step_rank": 2 * weight["r"] * weight["slices"],
        "kind": kind,
        "layer": next((f"layer {part}" for part in parts if part.isdecimal()), weight["name"]),
        "held": f"{shares[min(weight['r'], len(shares)) - 1] / shares[-1]:.1%}",
        "rank": int(np.searchsorted(shares, 0.99 * shares[-1])) + 1,
    }


def _style() -> Any:
    import matplotlib as mpl

    return mpl.rc_context({**STYLE, "svg.hashsalt": "report"})  # the same file for the same run


def _axes(width: float, height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Any, Any]:
    """A figure (inches) that belongs to no global state, with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **more)
