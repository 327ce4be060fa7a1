"""report.html: a run on one page that needs nothing but a browser, and the PNG files beside it.

Made from the files of the output folder only, so it can be made again at any time (`launch/report.py`). The page has
its pictures inside as SVG, no script, and a policy that forbids the browser to fetch anything.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import pulse
from .pictures import PALETTE
from .run_pictures import FILES, pictures
from .run_record import EXTRA, SAMPLES, RunRecord, counted, finite, number

PAGE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
OF_THE_LAUNCHER = ("local_rank",)  # no choice of anybody's
WIDE = 8.0  # inches; such a picture gets the whole width of the page
MOST_TEXT = 20_000  # characters of a prompt or an answer that a page shows
# On a dark page: the same hues, lighter, so that a line has a contrast of at least 3 to the background.
DARK = {
    "blue": "#58a6e8",
    "orange": "#f0b429",
    "green": "#2cc295",
    "red": "#ff8a4c",
    "pink": "#e29ac4",
    "sky": "#8ccbf2",
    "grey": "#a0a6ad",
    "brown": "#c79a6b",
}


@dataclass(frozen=True)
class Table:
    """Names and values under a title; `folded`: shown on demand."""

    title: str
    rows: list[tuple[str, str]]
    folded: bool = False


def write_report(folder: Path, *, defaults: Mapping[str, Any] | None = None) -> list[str]:
    """Writes the pictures and the page of a run; returns the names of the files.

    Args:
        defaults: of the arguments; those that differ are shown first.
    """
    record = RunRecord.read(folder)
    drawn = pictures(record)
    for name in FILES:
        if name not in {p.name for p in drawn}:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier run
    shown: list[dict[str, Any]] = []
    for picture in drawn:
        file = folder / f"{picture.name}.png"
        shown.append({"title": picture.title, "note": picture.note, "svg": picture.render(file), "file": file.name})
        shown[-1]["wide"] = picture.size[0] > WIDE
        pulse.tick()
    _replace(folder / PAGE, render(record, shown, defaults or {}))
    return [*(s["file"] for s in shown), PAGE]


def add_extra(folder: Path, *, warnings: list[str], spectra: dict[str, Any] | None) -> None:
    """Adds to report.json what only a running process knows; an earlier part of the same run stays in it."""
    extra = RunRecord.read(folder).extra
    before = [text for text in extra.get("warnings", []) if text not in warnings]
    content = {**extra, "warnings": before + warnings}
    if spectra is not None:
        content["spectra"] = spectra
    _replace(folder / EXTRA, json.dumps(content, indent=1) + "\n")


def clear(folder: Path) -> None:
    """Removes the report of an earlier run, and its samples."""
    for name in (PAGE, EXTRA, *SAMPLES, *(f"{stem}.png" for stem in FILES)):
        (folder / name).unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def render(record: RunRecord, shown: list[dict[str, Any]], defaults: Mapping[str, Any]) -> str:
    """The page, with pictures by their title, note and svg."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=record.folder.resolve().name,
        state=str(record.state.get("state", "unknown")),
        summary=summary(record),
        tiles=tiles(record),
        warnings=record.warnings(),
        pictures=shown,
        samples=_samples(record),
        tables=list(tables(record, defaults)),
        light=PALETTE,
        dark=DARK,
    )


# --- what is told ---------------------------------------------------------------------------------


def summary(record: RunRecord) -> str:
    """Model, data, method, in one line."""
    args, run = record.arguments, record.run
    section = run.get("ds_config", {}).get("hd_pissa", {}) if isinstance(run.get("ds_config"), dict) else {}
    parts = [short_name(args.get("model_name_or_path")), short_name(args.get("dataset_name"))]
    if "r" in section and "slices" in run:
        parts.append(f"HD-PiSSA, {counted(run['slices'], 'slice')} of rank {section['r']}")
    if "world_size" in run:
        parts.append(f"{run['world_size']} × {run.get('device', '?')}")
    return " · ".join(part for part in parts if part)


def short_name(name: Any) -> str:
    """A folder's own name, a hub's full one."""
    text = str(name or "")
    return Path(text).name if os.sep in text and (text.startswith(("/", ".", "~")) or text.count("/") > 1) else text


def tiles(record: RunRecord) -> list[tuple[str, str]]:
    """The figures that a person looks for first: (value, what it is)."""
    found = list(_loss_tiles(record))
    steps = record.steps
    if steps:
        total = record.run.get("total_steps")
        found.append((f"{steps[-1]['step']:,}" + (f" of {total:,}" if total else ""), "optimizer steps"))
    speeds = finite(record.column("tokens_per_second")[1])
    if speeds:
        found.append((f"{statistics.median(speeds):,.0f}", "tokens per second (median)"))
    shares = finite(record.column("mfu")[1])
    if shares:
        found.append((f"{statistics.median(shares):.1%}", "MFU (median)"))
    seconds = finite(record.column("step_time_s")[1])
    if seconds and steps:  # rows may be of every n-th step only
        found.append((duration(statistics.mean(seconds) * steps[-1]["step"]), "in optimizer steps"))
    memory = finite(record.column("peak_memory_bytes")[1])
    if memory and max(memory) > 0:
        found.append((size(max(memory)), "peak memory of rank 0"))
    return found


def _loss_tiles(record: RunRecord) -> Iterator[tuple[str, str]]:
    _, losses = record.column("eval_loss")
    if len(losses) > 1:
        yield f"{losses[0]:.4f} → {losses[-1]:.4f}", "validation loss, first and last"
        perplexities = record.column("perplexity")[1]
        if perplexities:
            yield f"{perplexities[0]:.2f} → {perplexities[-1]:.2f}", "perplexity"
    elif losses:
        step = record.column("eval_loss")[0][0]
        yield f"{losses[0]:.4f}", f"validation loss {'before training' if step == 0 else f'after step {step}'}"
    matches = finite(record.column("eval_exact_match")[1])
    if matches:
        yield " → ".join(f"{m:.1%}" for m in dict.fromkeys((matches[0], matches[-1]))), "right answers (exact match)"
    training = finite(record.column("loss")[1])
    if training:
        last = training[-max(1, len(training) // 20) :]
        words = f"training loss, mean of the last {len(last)} rows" if len(last) > 1 else "training loss, last row"
        yield f"{statistics.mean(last):.4f}", words


def _samples(record: RunRecord) -> list[dict[str, Any]]:
    """Per prompt its answers: the first and the last, where there are many."""
    prompts: dict[str, list[Any]] = {}
    for sample in record.samples:
        prompts.setdefault(sample.prompt, []).append(sample)
    found = []
    for prompt, samples in prompts.items():
        ends = samples if len(samples) <= 2 else [samples[0], samples[-1]]
        answers = [{"when": s.when, "text": s.answer[:MOST_TEXT]} for s in ends]
        if samples[0].reference:
            answers.append({"when": "reference", "text": samples[0].reference[:MOST_TEXT]})
        found.append({"prompt": prompt[:MOST_TEXT], "answers": answers, "more": len(samples) - len(ends)})
    return found


def tables(record: RunRecord, defaults: Mapping[str, Any]) -> Iterator[Table]:
    """All that run.json and the exports say."""
    run = record.run
    args = {name: value for name, value in record.arguments.items() if name not in OF_THE_LAUNCHER}
    given = {k: v for k, v in args.items() if k not in defaults or v != defaults[k]}
    config = run.get("ds_config") if isinstance(run.get("ds_config"), dict) else {}
    section = config.get("hd_pissa") or {}  # type: ignore[union-attr]
    rest = {k: _or_config(v, section.get(k)) for k, v in args.items() if k not in given}
    if given:
        yield Table("Arguments" + (" that differ from the defaults" if rest else ""), _rows(given))
    if rest:
        yield Table(f"The other {len(rest)} arguments", _rows(rest), folded=True)
    if isinstance(run.get("rows"), dict):
        yield Table("Rows of the data", _rows(_data({**run["rows"], "steps per epoch": run.get("steps_per_epoch")})))
    method: dict[str, Any] = {k: run[k] for k in ("world_size", "slices", "targets", "total_steps") if k in run}
    if method:
        yield Table("Run", _rows({**method, "device": run.get("device")}))
    if isinstance(run.get("init"), dict):
        yield Table("Decomposition of the weights", _rows(run["init"]))
    if isinstance(run.get("exchange"), dict):
        yield Table("Exchange of the update", _rows(run["exchange"]))
    if isinstance(run.get("memory_bytes"), dict):
        yield Table("Memory of rank 0", [(k, size(v)) for k, v in run["memory_bytes"].items()])
    for name, report in record.exports.items():
        yield Table(f"Export {name}/", _rows(_flat({k: v for k, v in report.items() if k not in ("files", "unknown")})))
    if isinstance(run.get("versions"), dict):
        yield Table("Versions", _rows({**run["versions"], "git revision": run.get("git_revision")}))
    if run.get("ds_config"):
        yield Table("DeepSpeed config", [("", json.dumps(run["ds_config"], indent=2))], folded=True)


def _or_config(value: Any, config: Any) -> Any:
    """An argument's value; of one that was not given, what the config has."""
    if value is not None:
        return value
    return "not given" if config is None else f"{text(config)} (by the config)"


def _data(rows: dict[str, Any]) -> dict[str, Any]:
    """The counts, and a row of its own for each dataset, in words."""
    sources = rows.pop("sources", None)
    for source in sources if isinstance(sources, list) else []:
        told = dict(source)
        name = f"{told.pop('use', '')} data {told.pop('name', '')}".strip()
        words = [str(told.pop("format", "")), *(f"{k.replace('_', ' ')} {text(v)}" for k, v in told.items() if v != 0)]
        rows[name] = "; ".join(word for word in words if word)
    return rows


def _flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """{"residual": {"worst": 1}} → {"residual, worst": 1}."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner = _flat(value) if isinstance(value, Mapping) else None
        found |= {f"{name}, {k}": v for k, v in inner.items()} if inner is not None else {name: value}
    return found


def _rows(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name).replace("_", " ") if " " in str(name) else str(name), text(v)) for name, v in content.items()]


def text(value: Any) -> str:
    """A value for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def size(value: Any) -> str:
    """Bytes for people."""
    amount, units = number(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:,.0f} B" if units[0] == "B" else f"{amount:,.2f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
