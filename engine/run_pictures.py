"""The pictures of a run: loss, learning rate, throughput, norms per slice, spectra of what was learned.

Each is a function that draws on a figure what a `RunRecord` has; `pictures` says which of them have something to show.
Curves of long runs are thinned (no peak is lost) and have their mean drawn over them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from .pictures import (
    BLUE,
    BROWN,
    DASHES,
    GREEN,
    GREY,
    INK,
    MOST_POINTS,
    ORANGE,
    PINK,
    RED,
    SKY,
    Picture,
    half_window,
    smooth,
    thin,
)
from .run_record import RunRecord, finite

FEW_MARKED = 40  # points; the marks of more would hide the curve
HALF = 5.4  # inches: a picture that has a neighbour on the page
TIGHT: dict[str, Any] = {"frameon": False, "handlelength": 1.6, "handletextpad": 0.5, "columnspacing": 1.0}  # legends
LONG = 200  # steps of a run in which a few wild ones are not what it is about
EACH = 8  # slices that get a curve of their own; of more, the range and the median are drawn
SLICE_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BROWN, GREY)
SLICE_TITLES = {
    "delta_norms": "size of the last update, ‖ΔA, ΔB‖",
    "slice_delta_norms": "size of the update, ‖ΔA, ΔB‖",
    "slice_grad_norms": "gradient norm",
}
FILES = ("training_loss", "learning_rate", "throughput", "slice_norms", "spectra")


def pictures(record: RunRecord) -> list[Picture]:
    """Those that have something to show, in the order of a report."""
    found = [_loss(record), _learning_rate(record), _throughput(record), _slice_norms(record), _spectra(record)]
    return [picture for picture in found if picture is not None]


# --- curves ---------------------------------------------------------------------------------------


def curve(axes: Any, x: Sequence[float], y: Sequence[float], *, colour: str, label: str, dash: str = "-") -> None:
    """A curve; one of many points pale, with its mean over it."""
    half = half_window(len(x))
    if not half:
        axes.plot(x, y, color=colour, label=label, linestyle=dash, marker=".", markersize=5, linewidth=1.4)
        return
    axes.plot(*thin(x, y), color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(*thin(x, smooth(y, half)), color=colour, label=f"{label} (smoothed)", linestyle=dash, linewidth=1.8)


def finish(axes: Any, record: RunRecord, *, last: bool = True) -> None:
    """What all axes over steps have: whole steps from the first to the last, and their name."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    steps = [float(row["step"]) for row in record.rows]
    low, high = min(steps), max(steps)
    margin = max(0.5, 0.01 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    if last:
        axes.set_xlabel("optimizer step")
    else:
        axes.tick_params(labelbottom=False)


def logarithmic(axes: Any) -> None:
    """A logarithmic y axis with few ticks: the small ones take most of the time that a picture takes."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(figure: Any, axes: Any, columns: int = 4) -> None:
    """Beside the title, so that it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper right", ncols=min(columns, len(handles)), **TIGHT)


# --- loss -----------------------------------------------------------------------------------------


def _loss(record: RunRecord) -> Picture | None:
    if not finite(record.column("loss")[1]) and not finite(record.column("eval_loss")[1]):
        return None
    note = "Cross entropy per target token, in nats"
    note += "; the validation loss is over the whole held-out set." if finite(record.column("eval_loss")[1]) else "."
    return Picture("training_loss", "Loss", note, functools.partial(draw_loss, record), (8.5, 3.8))


def draw_loss(record: RunRecord, figure: Any) -> None:
    axes = figure.subplots()
    x, y = record.column("loss")
    if finite(y):
        curve(axes, x, y, colour=BLUE, label="training")
        _limit_outliers(axes, y, record.column("eval_loss")[1])
    x, y = record.column("eval_loss")
    if finite(y):
        style = {"color": RED, "linestyle": "--", "marker": "o", "markersize": 5 if len(x) < FEW_MARKED else 2.5}
        axes.plot(x, y, label="validation", linewidth=1.4, **style)
        best = [i for i, step in enumerate(x) if step == record.state.get("best_global_step")]
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "none", "color": RED}
        if best:
            axes.plot([x[best[-1]]], [y[best[-1]]], label="best", **ring)
    skipped = [row["step"] for row in record.skipped()]
    if skipped:
        bottom = axes.get_xaxis_transform()  # y from 0 to 1
        axes.plot(skipped, [0.02] * len(skipped), "x", transform=bottom, color=INK, label="skipped step", clip_on=False)
    axes.set_ylabel("loss (nats per token)")
    finish(axes, record)
    legend(figure, axes)


def _limit_outliers(axes: Any, training: Sequence[float], validation: Sequence[float]) -> None:
    """A few wild steps must not flatten the rest: the axis covers 99.5 % of the steps of a long run, and validation."""
    known = sorted(finite(training))
    if len(known) < LONG:
        return
    cut = max(1, len(known) // 200)
    low, high = known[cut], known[-1 - cut]
    if known[-1] - known[0] > 3 * (high - low):
        inside = [low, high, *finite(validation)]
        margin = 0.05 * (max(inside) - min(inside))
        axes.set_ylim(min(inside) - margin, max(inside) + margin)
        axes.set_title("the axis leaves out the wildest 1 % of the steps", fontsize=8, loc="left")


# --- learning rate --------------------------------------------------------------------------------


def _learning_rate(record: RunRecord) -> Picture | None:
    if not finite(record.column("learning_rate")[1]):
        return None
    note = "The rate that each step used."
    return Picture("learning_rate", "Learning rate", note, functools.partial(draw_learning_rate, record), (HALF, 2.4))


def draw_learning_rate(record: RunRecord, figure: Any) -> None:
    axes = figure.subplots()
    x, y = record.column("learning_rate")
    marker = {"marker": "."} if len(x) < 40 else {}
    axes.plot(*thin(x, y), color=BLUE, linewidth=1.6, **marker)
    axes.set_ylim(bottom=0, top=1.08 * max(finite(y)) or 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_ylabel("learning rate")
    finish(axes, record)


# --- throughput -----------------------------------------------------------------------------------


def _throughput(record: RunRecord) -> Picture | None:
    if not finite(record.column("tokens_per_second")[1]):
        return None
    note = "Input tokens of all processes without padding. Time for saving, evaluation and generation is left out."
    if finite(record.column("mfu")[1]):
        note += " MFU counts the forward pass and the input gradient, against the device's published dense bf16 peak."
    panels = 1 + _has_memory(record)
    size = (HALF, 1.1 + 1.7 * panels)
    return Picture("throughput", "Throughput", note, functools.partial(draw_throughput, record), size)


def _has_memory(record: RunRecord) -> bool:
    return any(v > 0 for v in finite(record.column("peak_memory_bytes")[1]))


def draw_throughput(record: RunRecord, figure: Any) -> None:
    panels = figure.subplots(1 + _has_memory(record), squeeze=False)[:, 0]
    speed = panels[0]
    x, y = record.column("tokens_per_second")
    curve(speed, x, y, colour=BLUE, label="tokens per second")
    speed.set_ylim(0, 1.1 * max(finite(y)))
    speed.yaxis.set_major_formatter(lambda value, _: _grouped(value))
    speed.set_ylabel("tokens per second")
    _mfu_axis(speed, record)
    if half_window(len(x)):
        legend(figure, speed)
    if len(panels) > 1:
        x, y = record.column("peak_memory_bytes")
        panels[1].plot(*thin(x, [v / 2**30 for v in y]), color=ORANGE, linewidth=1.6)
        panels[1].set_ylim(0, 1.1 * max(finite(y)) / 2**30)
        panels[1].set_ylabel("peak memory of\nrank 0 (GiB)")
    for panel in panels:
        finish(panel, record, last=panel is panels[-1])


def _mfu_axis(axes: Any, record: RunRecord) -> None:
    """MFU is tokens per second times a constant: a second scale, not a second curve."""
    pairs = [(row["tokens_per_second"], row["mfu"]) for row in record.steps if row.get("mfu")]
    if not pairs:
        return
    speed, share = max(pairs)
    percent = 100 * share / speed
    right = axes.secondary_yaxis("right", functions=(lambda v: v * percent, lambda v: v / percent))
    right.set_ylabel("MFU (%)")


def _grouped(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == 0 else f"{value:g}"


# --- slices ---------------------------------------------------------------------------------------


def _slice_norms(record: RunRecord) -> Picture | None:
    fields = _slice_fields(record)
    if not fields:
        return None
    note = (
        "Per slice, over all weights. A slice that stays at 0, or is far from the others, learns nothing or is broken."
    )
    size = (HALF, 0.9 + 1.9 * (len(fields) + bool(finite(record.column("bf16_moved")[1]))))
    return Picture("slice_norms", "Slices", note, functools.partial(draw_slice_norms, record), size)


def _slice_fields(record: RunRecord) -> dict[str, tuple[list[float], list[list[float]]]]:
    fields = record.per_slice()
    if "slice_delta_norms" in fields:  # the same figure, for every step
        fields.pop("delta_norms", None)
    return {name: found for name, found in fields.items() if any(finite(v) for v in found[1])}


def draw_slice_norms(record: RunRecord, figure: Any) -> None:
    fields = _slice_fields(record)
    moved = record.column("bf16_moved")
    panels = figure.subplots(len(fields) + bool(finite(moved[1])), squeeze=False)[:, 0]
    for panel, (name, (steps, rows)) in zip(panels, fields.items(), strict=False):
        slices = list(zip(*rows, strict=True))
        _draw_slices(panel, steps, slices)
        panel.set_ylabel("\n".join(_wrapped(SLICE_TITLES.get(name, name.replace("_", " ")))))
        positive = [v for v in finite(itertools.chain(*slices)) if v > 0]
        if positive and max(positive) > 20 * min(positive):
            logarithmic(panel)
        elif positive:
            panel.set_ylim(0, 1.05 * max(positive))
        finish(panel, record, last=panel is panels[-1])
    if len(panels) > len(fields):
        panels[-1].plot(*thin(moved[0], [100 * v for v in moved[1]]), color=INK, linewidth=1.6)
        panels[-1].set_ylabel("weights that a step\nmoves in bf16 (%)")
        panels[-1].set_ylim(bottom=0)
        finish(panels[-1], record)
    legend(figure, panels[0], columns=EACH if len(slices) <= EACH else 3)


def _draw_slices(panel: Any, steps: list[float], slices: list[tuple[float, ...]]) -> None:
    import numpy as np

    if len(slices) <= EACH:
        marker = {"marker": "."} if len(steps) < FEW_MARKED else {}
        for index, values in enumerate(slices):
            dash = DASHES[index % len(DASHES)]
            colour = SLICE_COLOURS[index % len(SLICE_COLOURS)]
            name = "slice 0" if index == 0 else str(index)
            panel.plot(*thin(steps, values), color=colour, linestyle=dash, linewidth=1.4, label=name, **marker)
        return
    every = -(-len(steps) // (MOST_POINTS // 2))
    steps, values = steps[::every], np.array(slices)[:, ::every]
    known = np.where(np.isfinite(values).any(0), values, 0.0)  # where nothing is known there is nothing to warn of
    low, quarter, middle, three, high = np.nanquantile(known, [0, 0.25, 0.5, 0.75, 1], axis=0)
    panel.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label=f"all {len(slices)} slices")
    panel.fill_between(steps, quarter, three, color=BLUE, alpha=0.3, linewidth=0, label="half of them")
    panel.plot(steps, middle, color=BLUE, linewidth=1.6, label="median")


def _wrapped(text: str, width: int = 26) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]


# --- spectra --------------------------------------------------------------------------------------


def _spectra(record: RunRecord) -> Picture | None:
    weights = _spectra_of(record)
    if not weights:
        return None
    kinds = len({kind_of(w["name"]) for w in weights})
    columns = min(4, kinds)
    size = (max(5.0, 2.5 * columns), 1.0 + 2.2 * math.ceil(kinds / columns))
    note = (
        "Singular values of the whole change of a weight, ΔW, to first order. Dashed: the rank that LoRA with the same "
        "r cannot exceed; dotted: 2·r·S, what one step of HD-PiSSA has."
    )
    left = record.extra.get("spectra", {}).get("left_out")
    if left:
        note += f" Left out to save time or memory: {', '.join(left)}."
    return Picture("spectra", "Spectra of ΔW", note, functools.partial(draw_spectra, record), size)


def _spectra_of(record: RunRecord) -> list[dict[str, Any]]:
    spectra = record.extra.get("spectra")
    weights = spectra.get("weights", []) if isinstance(spectra, dict) else []
    return [w for w in weights if any(v > 0 for v in w["values"])]


def kind_of(name: str) -> str:
    """model.layers.3.mlp.up_proj → up_proj."""
    return name.rsplit(".", 1)[-1]


def place_of(name: str) -> str:
    """model.layers.3.mlp.up_proj → layer 3."""
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return f"layer {numbers[0]}" if numbers else name


def draw_spectra(record: RunRecord, figure: Any) -> None:
    weights = _spectra_of(record)
    kinds = list(dict.fromkeys(kind_of(w["name"]) for w in weights))
    columns = min(4, len(kinds))
    grid = figure.subplots(math.ceil(len(kinds) / columns), columns, squeeze=False, sharey=True)
    panels = list(grid.flat)
    places = sorted({place_of(w["name"]) for w in weights}, key=_natural)
    looks = {place: (SLICE_COLOURS[i % 8], DASHES[i % 4]) for i, place in enumerate(places)}
    shown: dict[str, Any] = {}
    for panel, kind in itertools.zip_longest(panels, kinds):
        if kind is None:
            panel.set_visible(False)
            continue
        for weight in (w for w in weights if kind_of(w["name"]) == kind):
            colour, dash = looks[place_of(weight["name"])]
            values = [v for v in weight["values"] if v > 0]
            (line,) = panel.plot(range(1, len(values) + 1), values, color=colour, linestyle=dash, linewidth=1.5)
            shown.setdefault(place_of(weight["name"]), line)
            _mark_ranks(panel, weight)
        logarithmic(panel)
        panel.set_title(kind, fontsize=10)
    for row in grid:
        row[0].set_ylabel("singular value")
    for index, panel in enumerate(panels[: len(kinds)]):
        if index + columns >= len(kinds):
            panel.set_xlabel("index")
    shown |= _rank_marks(weights)
    names = list(dict.fromkeys(name for name in (*places, *shown) if name in shown))
    lines = [shown[name] for name in names]
    place = "outside upper right" if columns > 2 else "outside lower center"  # a narrow picture's title needs the top
    figure.legend(lines, names, loc=place, ncols=min(6 if columns > 2 else 2 * columns, len(lines)), **TIGHT)


def _rank_marks(weights: list[dict[str, Any]]) -> dict[str, Any]:
    """Entries of the legend for the two marked ranks, with their numbers where all weights have the same."""
    from matplotlib.lines import Line2D

    pairs = {(w["r"], w["slices"]) for w in weights}
    r, step = (
        f" = {n}" if len(pairs) == 1 else "" for n in (weights[0]["r"], 2 * weights[0]["r"] * weights[0]["slices"])
    )
    look: dict[str, Any] = {"color": INK, "linewidth": 0.8, "alpha": 0.6}
    return {f"r{r}": Line2D([], [], linestyle="--", **look), f"2·r·S{step}": Line2D([], [], linestyle=":", **look)}


def _mark_ranks(panel: Any, weight: dict[str, Any]) -> None:
    r, slices = weight["r"], weight["slices"]
    for rank, dash in ((r, "--"), (2 * r * slices, ":")):
        if rank <= len(weight["values"]):
            panel.axvline(rank, color=INK, linestyle=dash, linewidth=0.8, alpha=0.6)


def _natural(text: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in text.split()]
