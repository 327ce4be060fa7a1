"""From the records of throughput runs to the rows of a table. Arithmetic only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hdpissa.benchmarks.step import method_models
from hdpissa.launch.common.metrics import peak_flops
from hdpissa.launch.planning import model as plan_model

PHASES = ("forward", "backward", "exchange", "apply")
UPDATE = ("exchange", "apply")
# By the clock, in CPU time, of the update by the clock: what a ratio of two methods is called, and is of.
TIMES = {"": "step_s", "CPU ": "cpu_s", "update ": "update_s"}
COLUMNS = (
    "method", "ranks", "rounds", "step s p50", "step s p90", "CPU s", "update s", "/ frozen", "CPU / frozen",
    *(f"{time}reference / it" for time in TIMES), "tokens/s", "tokens/s/device", "padded tokens/s", "efficiency", "MFU",
    "GFLOP/s/device", "peak MB", "MB received", *(f"{phase} %" for phase in PHASES), "remark",
)  # fmt: skip
IDENTITY = ("method", "ranks")
FLOP_RULE = (
    "Useful FLOP of a real token in a row of L: 4 per weight of the Linears, the output head among them (2 forward, 2 "
    "for the input gradient; weights that are frozen need no more), 6 for `full` (2 more for the weight gradient), and "
    "6 · L · heads' width · layers for causal attention (2 forward, 4 backward). What a method computes on top "
    "(slices, adapters, dense side paths, recomputation, padding) is not useful in this sense and not counted"
)


def model_work(model: str, layers: int | None) -> plan_model.Work:
    """What one token costs in a row of one token, as the plan has it; attention grows with the row."""
    config: Any = method_models.config_of(model, layers)
    built = plan_model.build(config, model, trust_remote_code=False, bf16=True)
    return plan_model.work_per_token(built, [], 1)


def useful_flops(cost: plan_model.Work, method: str, lengths: Sequence[int]) -> float:
    """FLOP of one forward and backward pass over rows of these lengths; see `FLOP_RULE`."""
    per_weight = 3 if method == "full" else 2  # forwards' worth
    linears = per_weight * (cost.forward + cost.head) * sum(lengths)
    return linears + 3 * cost.attention * sum(n * n for n in lengths)


def merge(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One run's ranks as one: a step is over when the slowest rank is; CPU time adds up; bytes are the most of a rank.

    Returns: step_s, cpu_s and update_s (exchange and apply, mean of the ranks) per step, phases (mean over ranks and
        steps, seconds), and the rest as the names say.
    """
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


def row(method: str, ranks: int, rounds: Sequence[Mapping[str, Any]], cost: plan_model.Work) -> dict[str, Any]:
    """The figures of one method at one number of processes that need no other method.

    Args:
        rounds: what `merge` made of each of its runs.
        cost: what a token costs (`model_work`).
    """
    first = rounds[0]
    seconds, cpu, update = ([s for run in rounds for s in run[key]] for key in TIMES.values())
    p50, tokens = statistics.median(seconds), sum(first["lengths"])
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds
    rate, peak = useful_flops(cost, method, first["lengths"]) / p50 / ranks, peak_flops(first["device"])
    phases = {phase: statistics.fmean(run["phases"][phase] for run in rounds) for phase in PHASES}
    return {
        "method": method,
        "ranks": ranks,
        "rounds": len(rounds),
        "step s p50": p50,
        "step s p90": deciles[-1],
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
        "samples": {"step s p50": seconds, "CPU s": cpu, "update s": update},
    }


def compare(found: dict[str, Any], name: str, time: str, numerator: Any, denominator: Any) -> None:
    """Adds the median of the rounds' ratios of their medians to a row: neighbours in time are compared."""
    pairs = zip(numerator, denominator, strict=False)
    ratios = [statistics.median(a[TIMES[time]]) / statistics.median(b[TIMES[time]]) for a, b in pairs]
    found["samples"][f"{time}{name}"] = ratios
    found[f"{time}{name}"] = statistics.median(ratios)


def table(
    runs: Mapping[tuple[int, str], Sequence[Mapping[str, Any]]],
    failures: Mapping[tuple[int, str], str],
    cost: plan_model.Work,
) -> list[dict[str, Any]]:
    """All rows, methods and counts in the order of `runs` and then `failures`.

    Args:
        runs: (number of processes, method) → its rounds as `merge` made them; at least one each.
        failures: the same → why it has no figures, or no more of them than its rounds.
    """
    rows = []
    fewest: dict[str, float] = {}
    for (ranks, method), rounds in sorted(runs.items(), key=lambda item: item[0][0]):
        found = row(method, ranks, rounds, cost)
        found["efficiency"] = found["tokens/s/device"] / fewest.setdefault(method, found["tokens/s/device"])
        if (ranks, "frozen") in runs:
            for time in ("", "CPU "):
                compare(found, "/ frozen", time, rounds, runs[ranks, "frozen"])
        if (ranks, "reference") in runs:
            for time in TIMES:
                compare(found, "reference / it", time, runs[ranks, "reference"], rounds)
        if (ranks, method) in failures:
            found["remark"] = f"then failed, after {len(rounds)} round(s): {failures[ranks, method]}"
        rows.append(found)
    absent = {key: why for key, why in failures.items() if key not in runs}
    rows += [{"method": name, "ranks": ranks, "remark": why} for (ranks, name), why in absent.items()]
    return sorted(rows, key=lambda found: found["ranks"])
