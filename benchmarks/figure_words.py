"""What README's table says of each result, in words: from the rows of a result file. Arithmetic and text only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def one(table: Rows, /, **wanted: Any) -> dict[str, Any]:
    """The only row with these values; columns are given with _ in place of what is no letter."""
    plain = {"".join(c if c.isalnum() else "_" for c in key): key for row in table for key in row}
    found = [row for row in table if all(row.get(plain[key]) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows with {wanted}")
    return found[0]


def most_ranks(rows: Rows) -> Rows:
    """Those of the largest number of processes."""
    most = max(row["ranks"] for row in rows)
    return [row for row in rows if row["ranks"] == most]


def tell_aot(rows: Rows) -> str:
    spills = sum(row["spilled"] > 0 for row in rows)
    return f"{len(rows)} variants, {spills or 'none'} with spills"


def ratios(row: Mapping[str, Any], base: Mapping[str, Any]) -> list[float]:
    """CPU time over the base's in each round; a result of older form calls its samples otherwise."""
    seconds = [found["samples"]["median s"] if "samples" in found else found["rounds s"] for found in (row, base)]
    return [a / b for a, b in zip(*seconds, strict=True)]


def tell_cpu_layers(rows: Rows) -> str:
    base = one(rows, variant="frozen")
    told = []
    for variant, name in (("ours", "HD-PiSSA"), ("lora", "PEFT's LoRA")):
        found = ratios(one(rows, variant=variant), base)
        told.append(f"{name} {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return f"{', '.join(told)}: median and range of {len(found)} rounds; the base itself {base['median s']:.3g} s"


def _spread(row: Mapping[str, Any], column: str) -> str:
    """Seconds, with the range of the samples where there are some."""
    samples = (row.get("samples") or {}).get(column)
    return f"{row[column]:.1f} s" + (f" ({min(samples):.1f} to {max(samples):.1f})" if samples else "")


def tell_checkpoint(rows: Rows) -> str:
    told = [
        f"{row['kind']}: {row['files MB']:.0f} MB, stops training for {_spread(row, 'pause at once s')}, in the "
        f"background for {_spread(row, 'pause in background s')}"
        for row in (one(rows, kind=kind) for kind in ("full", "small"))
    ]
    times = "" if "samples" in rows[0] else "; one save of each"
    return "; ".join(told) + times


def tell_init(rows: Rows) -> str:
    every = one(rows, shape="all")
    return (
        f"{every['matrices']} matrices in {every['ours s']:.1f} s, {every['full / ours']:.2f} times as fast as a full "
        f"fp32 SVD of each; largest relative error of σ {every['σ error']:.0e}, largest angle of a slice "
        f"{every['slice angle']:.0e}"
    )


def tell_svd(rows: Rows) -> str:
    chosen = [one(rows, rows=4096, cols=cols, rank=128, spectrum="flat") for cols in (4096, 11008)]
    ratios = [f"{row['full / randomized']:.1f} times at 4096 × {row['cols']}" for row in chosen]
    return f"full fp32 SVD takes {' and '.join(ratios)} as long (flat spectrum)"


def tell_load(rows: Rows) -> str:
    own, whole = (one(rows, ranks=4, path=path) for path in ("own rows", "rank 0 reads all"))
    return (
        f"{own['model MB'] / 1e3:.1f} GB on 4 ranks: {own['peak MB']:.0f} MB and {own['seconds']:.1f} s; through "
        f"rank 0 {whole['peak MB']:.0f} MB and {whole['seconds']:.1f} s"
    )


def tell_export(rows: Rows) -> str:
    within = sum(row["peak MB"] <= row["bound MB"] for row in rows)
    return f"at most {max(row['peak MB'] for row in rows):.0f} MB; {within} of {len(rows)} exports within their bound"


def tell_cache(rows: Rows) -> str:
    told = [f"{row['second / first, slices CPU s']:.1%} on {_number(row['ranks'], 'rank')}" for row in rows]
    return ", ".join(told)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tell_rank(rows: Rows) -> str:
    wide = max(row["min(m, n)"] for row in rows)
    told = []
    for steps in sorted({row["steps"] for row in rows}):
        chosen = [row for row in rows if row["steps"] == steps and row["min(m, n)"] == wide]
        ranks = []
        for method, slices, name in (
            ("lora", "", "LoRA"),
            ("pissa", "", "PiSSA"),
            ("hd_pissa", 8, "HD-PiSSA (S = 8)"),
            ("full", "", "full fine-tuning"),
        ):
            row = one([row for row in chosen if (row.get("S") or "") == slices], method=method)
            ranks.append(f"{name} {row['numerical rank']:g}")
        told.append(f"after {steps} step{'s' if steps > 1 else ''} {', '.join(ranks)}")
    return "; ".join(told) + f" of {wide}"


def _of_rounds(row: Mapping[str, Any], column: str, digits: int = 2) -> str:
    """A median over rounds, with their range where there are several."""
    samples = (row.get("samples") or {}).get(column, ())
    spread = f" ({min(samples):.{digits}f} to {max(samples):.{digits}f})" if len(samples) > 1 else ""
    return f"{row[column]:.{digits}f}{spread}"


def _how_often(rows: Rows) -> str:
    """What the figures of a throughput result are of."""
    rounds = max(len((row.get("samples") or {}).get("CPU / frozen", ())) for row in rows)
    return f"median and range of {rounds} rounds" if rounds > 1 else "one run of each"


def _and_tokens(rows: Rows) -> str:
    """The same, with the real tokens of a step of all processes."""
    tokens = "/".join(str(n) for n in dict.fromkeys(row["real tokens"] for row in rows if "real tokens" in row))
    return f"{_how_often(rows)}, {tokens} tokens a step in all"


def tell_throughput(rows: Rows) -> str:
    names = {
        "hd_pissa": "HD-PiSSA",
        "lora": "LoRA",
        "pissa": "PiSSA",
        "full": "full fine-tuning",
        "reference": "published",
    }
    chosen = [row for row in most_ranks(rows) if row["method"] in names and "CPU / frozen" in row]
    told = ", ".join(f"{names[row['method']]} {_of_rounds(row, 'CPU / frozen')}" for row in chosen)
    same = "; LoRA and PiSSA compute the same, what they differ by is noise"
    control = same if {"lora", "pissa"} <= {row["method"] for row in chosen} else ""
    return f"{told}; {_and_tokens(most_ranks(rows))}{control}"


def tell_published(rows: Rows) -> str:
    row = one(most_ranks(rows), method="hd_pissa")
    frozen = one(most_ranks(rows), method="frozen")
    clock, cpu = "reference / it", "CPU reference / it"
    return (
        f"{_of_rounds(row, clock)} by the clock, {_of_rounds(row, cpu)} in CPU time; with nothing trained "
        f"{_of_rounds(frozen, clock)} and {_of_rounds(frozen, cpu)}; {_and_tokens(most_ranks(rows))}"
    )


def tell_update(rows: Rows) -> str:
    """Of a step what is neither forward nor backward: exchange and apply, waiting for slower processes included."""
    ours, theirs = (one(most_ranks(rows), method=method) for method in ("hd_pissa", "reference"))
    if "update reference / it" in ours:
        ratio, seconds = _of_rounds(ours, "update reference / it", 1), [row["update s"] for row in (theirs, ours)]
    else:  # a result of older form has the phases alone
        seconds = [row["step s p50"] * (row["exchange %"] + row["apply %"]) / 100 for row in (theirs, ours)]
        ratio = f"{seconds[0] / seconds[1]:.1f}"
    return f"{ratio}: {seconds[0]:.2f} s and {seconds[1]:.2f} s; {_how_often(most_ranks(rows))}"


def tell_rates(rows: Rows) -> str:
    fp32, bf16 = ([r["rate"] for r in rows if r["what"] == f"product, {kind}"] for kind in ("float32", "bfloat16"))
    gathers = [row["seconds"] for row in rows if "seconds" in row]
    return (
        f"products {min(fp32):.0f} to {max(fp32):.0f} GFLOP/s in fp32, {min(bf16):.1f} to {max(bf16):.1f} in bf16; all "
        f"weights of SmolLM2-135M gathered in {min(gathers):.2f} to {max(gathers):.2f} s"
    )


def tell_memory(rows: Rows) -> str:
    return ", ".join(f"{row['method']} {row['peak MB']:.0f} MB" for row in most_ranks(rows) if "peak MB" in row)


def tell_counted(rows: Rows) -> str:
    """Figures that are the plan's, and apart from them those that are it only with what the plan leaves out."""
    *most, last = sorted({row["ranks"] for row in rows})
    counts = " and ".join(filter(None, (", ".join(map(str, most)), str(last))))
    exact = [row for row in rows if row["counted"] == row["planned"]]
    told = [f"{len(exact)} of {len(rows)} figures agree exactly"]
    if added := [row for row in rows if row["agrees"] and row["beside the plan"]]:
        told.append(f"{len(added)} after adding what the plan leaves out ({_distinct(added)})")
    if wrong := [row for row in rows if not row["agrees"]]:
        told.append(f"{len(wrong)} do not agree ({_distinct(wrong)})")
    return f"{', '.join(told)}, on {counts} processes"


def _distinct(rows: Rows) -> str:
    return "; ".join(dict.fromkeys(row["what"] for row in rows))
