"""From the records of throughput runs to the rows of a table, and to pictures. Arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpissa.benchmarks.common import plots
from hdpissa.benchmarks.step import throughput_work
from hdpissa.launch.common.metrics import peak_flops

PHASES = ("forward", "backward", "exchange", "apply")
UPDATE = ("exchange", "apply")
COLUMNS = (
    "method", "ranks", "rounds", "step s p50", "step s p90", "CPU s", "update s", "/ frozen", "CPU / frozen",
    "reference / it", "CPU reference / it", "update reference / it",
    "tokens/s", "tokens/s/device", "padded tokens/s", "efficiency", "MFU", "GFLOP/s/device",
    "peak MB", "MB received", *(f"{phase} %" for phase in PHASES), "remark",
)  # fmt: skip
IDENTITY = ("method", "ranks")
SHADES = {"forward": "#0072B2", "backward": "#56B4E9", "exchange": "#D55E00", "apply": "#F0E442"}


def percentile(values: Sequence[float], percent: int) -> float:
    """Between the two nearest values where it falls between them."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def merge(record: Mapping[str, Any]) -> dict[str, Any]:
    """One run's ranks as one: a step is over when the slowest rank is; CPU time adds up; bytes are the most of a rank.

    Returns: step_s, cpu_s and update_s (exchange and apply, mean of the ranks) per step, phases (mean over ranks and
        steps, seconds), and the rest as the names say.
    """
    ranks = record["ranks"]
    steps = list(zip(*(rank["steps"] for rank in ranks), strict=True))
    every = [figures for step in steps for figures in step]
    return {
        "step_s": [max(f["step_s"] for f in step) for step in steps],
        "cpu_s": [sum(f["cpu_s"] for f in step) for step in steps],
        "update_s": [statistics.fmean(sum(f["phases"][phase] for phase in UPDATE) for f in step) for step in steps],
        "phases": {phase: statistics.fmean(f["phases"][phase] for f in every) for phase in PHASES},
        "sent": max(f["sent"] for f in steps[-1]),
        "received": max(f["received"] for f in steps[-1]),
        "collectives": steps[-1][0]["calls"],
        "loss": statistics.fmean(f["loss"] for f in steps[-1]),
        "peak_bytes": [rank["peak_bytes"] for rank in ranks],
        "lengths": [length for rank in ranks for length in rank["lengths"]],
        "padded_tokens": sum(rank["padded_tokens"] for rank in ranks),
        "build_s": max(rank["build_s"] for rank in ranks),
        "exchange_bytes": ranks[0]["exchange_bytes"],
        "device": ranks[0]["device"],
    }


def row(method: str, ranks: int, rounds: Sequence[Mapping[str, Any]], cost: Any) -> dict[str, Any]:
    """The figures of one method at one number of processes that need no other method.

    Args:
        rounds: what `merge` made of each of its runs.
        cost: what a token costs (`throughput_work.model_work`).
    """
    first = rounds[0]
    seconds = [s for run in rounds for s in run["step_s"]]
    cpu = [s for run in rounds for s in run["cpu_s"]]
    update = [s for run in rounds for s in run["update_s"]]
    p50, tokens = statistics.median(seconds), sum(first["lengths"])
    rate = throughput_work.useful_flops(cost, method, first["lengths"]) / p50 / ranks
    peak = peak_flops(first["device"])
    phases = {phase: statistics.fmean(run["phases"][phase] for run in rounds) for phase in PHASES}
    return {
        "method": method,
        "ranks": ranks,
        "step s p50": p50,
        "step s p90": percentile(seconds, 90),
        "CPU s": statistics.median(cpu),
        "update s": statistics.median(update),
        "tokens/s": tokens / p50,
        "tokens/s/device": tokens / p50 / ranks,
        "padded tokens/s": first["padded_tokens"] / p50,
        "MFU": rate / peak if peak else "",
        "GFLOP/s/device": rate / 1e9,
        "peak MB": max(n for run in rounds for n in run["peak_bytes"]) / 1e6,
        "MB received": first["received"] / 1e6,
        **{f"{phase} %": 100 * spent / sum(phases.values()) for phase, spent in phases.items()},
        "bytes received": first["received"],
        "bytes sent": first["sent"],
        "bytes sent by engine.exchange": first["exchange_bytes"],
        "collectives": first["collectives"],
        "build s": first["build_s"],
        "loss of the last step": first["loss"],
        "peak bytes of ranks": first["peak_bytes"],
        "real tokens": tokens,
        "padded tokens": first["padded_tokens"],
        "rounds": len(rounds),
        "samples": {"step s p50": seconds, "CPU s": cpu, "update s": update},
    }


def ratios(numerator: Sequence[Mapping[str, Any]], denominator: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Of each round that both have, the quotient of their medians: neighbours in time are compared."""
    pairs = zip(numerator, denominator, strict=False)
    return [statistics.median(a[key]) / statistics.median(b[key]) for a, b in pairs]


TIMES = ("step_s", "cpu_s", "update_s")


def compare(found: dict[str, Any], names: tuple[str, ...], numerator: Any, denominator: Any) -> None:
    """Writes into a row the median of the rounds' ratios by the clock, in CPU time, and of the update by the clock, as
    far as there are names for them; the ratios themselves are samples."""
    for name, key in zip(names, TIMES, strict=False):
        found["samples"][name] = ratios(numerator, denominator, key)
        found[name] = statistics.median(found["samples"][name])


def table(
    runs: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]], failures: Mapping[tuple[int, str], str], cost: Any
) -> list[dict[str, Any]]:
    """All rows, methods and counts in the order of `runs` and then `failures`.

    Args:
        runs: (number of processes, method) → its rounds as `merge` made them; at least one each.
        failures: the same → why it has no figures, or no more of them than its rounds.
    """
    rows = []
    fewest: dict[str, tuple[int, float]] = {}
    for (ranks, method), rounds in sorted(runs.items(), key=lambda item: item[0][0]):
        found = row(method, ranks, rounds, cost)
        fewest.setdefault(method, (ranks, found["tokens/s/device"]))
        found["efficiency"] = found["tokens/s/device"] / fewest[method][1]
        if (ranks, "frozen") in runs:
            compare(found, ("/ frozen", "CPU / frozen"), rounds, runs[ranks, "frozen"])
        if (ranks, "reference") in runs:
            names = tuple(f"{time}reference / it" for time in ("", "CPU ", "update "))
            compare(found, names, runs[ranks, "reference"], rounds)
        if (ranks, method) in failures:
            found["remark"] = f"then failed, after {len(rounds)} round(s): {failures[ranks, method]}"
        rows.append(found)
    absent = {key: why for key, why in failures.items() if key not in runs}
    rows += [{"method": name, "ranks": ranks, "remark": why} for (ranks, name), why in absent.items()]
    return sorted(rows, key=lambda found: found["ranks"])


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> list[str]:
    """The pictures of a table: tokens/s and efficiency over counts, and phases as bars; their file names."""
    measured = [found for found in rows if "step s p50" in found]
    if not measured:
        return []
    phases = _phases(measured, folder / f"{name}_phases.png")
    if len({found["ranks"] for found in measured}) == 1:  # nothing to compare
        return [phases]
    return [_scaling(measured, folder / f"{name}_scaling.png"), phases]


def _scaling(rows: Sequence[Mapping[str, Any]], target: Path) -> str:
    counts = sorted({found["ranks"] for found in rows})
    with plots.picture(target, columns=2) as panels:
        for panel, column, label in zip(panels, ("tokens/s", "efficiency"), _LABELS, strict=True):
            for method in dict.fromkeys(found["method"] for found in rows):
                points = [(found["ranks"], found[column]) for found in rows if found["method"] == method]
                panel.plot(*zip(*points, strict=True), **plots.line(method))
            panel.set(xlabel="processes, one device each", ylabel=label, xscale="log", xticks=counts)
            panel.set_xticklabels(counts)
            panel.minorticks_off()
        panels[0].set_yscale("log")
        panels[1].axhline(1, color="black", linewidth=0.8)
        panels[1].set_ylim(bottom=0)
        panels[0].legend()
    return target.name


_LABELS = ("real tokens per second, all devices", "tokens/s per device, relative to the fewest devices")


def _phases(rows: Sequence[Mapping[str, Any]], target: Path) -> str:
    """At the largest number of processes; a bar is a step, in milliseconds."""
    most = max(found["ranks"] for found in rows)
    shown = [found for found in rows if found["ranks"] == most]
    names = [plots.LABELS.get(found["method"], found["method"]) for found in shown]
    with plots.picture(target, width=7) as axes:
        left = [0.0] * len(shown)
        for phase in PHASES:
            wide = [found["step s p50"] * 1e3 * found[f"{phase} %"] / 100 for found in shown]
            axes.barh(names, wide, left=left, label=phase, color=SHADES[phase], edgecolor="black", linewidth=0.5)
            left = [a + b for a, b in zip(left, wide, strict=True)]
        axes.set(xlabel=f"milliseconds of an optimizer step (median), {most} processes")
        axes.invert_yaxis()
        axes.legend()
    return target.name
