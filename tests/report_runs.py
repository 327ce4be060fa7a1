"""Output folders as runs leave them, short and long, and what the ranks of the report's tests do."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ARGUMENTS = {
    "model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "dataset_name": "meta-math/MetaMathQA",
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_length": 512,
    "export_format": "both",
}
# What a run in which everything was measured is drawn as.
PICTURES = ["training_loss.png", "learning_rate.png", "throughput.png", "slice_norms.png", "spectra.png"]
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def write_run(folder: Path, *, steps: int, slices: int, gpu: bool = True) -> Path:
    """A folder with everything in it that a run can leave. `gpu`: MFU and memory are known."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(_rows(steps, slices, gpu))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run_state.json").write_text(json.dumps({"state": "finished", "step": steps, "message": ""}))
    run = {
        "arguments": {**ARGUMENTS, "output_dir": str(folder)},
        "ds_config": {"zero_optimization": {"stage": 3}, "hd_pissa": {"r": 16, "slices": "auto"}},
        "world_size": slices,
        "slices": slices,
        "targets": 224,
        "total_steps": steps,
        "steps_per_epoch": steps,
        "rows": {"used": 100_000, "truncated": 12},
        "init": {"residual": 3e-6, "cached": False},
        "exchange": {"factor_targets": 224, "dense_targets": 0, "bytes_per_step": 123_456_789},
        "memory_bytes": {"weights": 17 * 2**30, "buffers": 2**28},
        "device": "NVIDIA H100 80GB HBM3" if gpu else "cpu",
        "versions": {"hdpissa": "0.1.0", "torch": "2.11"},
        "git_revision": "abc123",
    }
    (folder / "run.json").write_text(json.dumps(run))
    samples = [
        {"step": 0, "prompt": "How many <apples> & pears?", "answer": "<script>alert(1)</script>", "reference": "27"},
        {"step": steps // 2, "prompt": "How many <apples> & pears?", "answer": "the middle one"},
        {"step": steps, "prompt": "How many <apples> & pears?", "answer": "14 + 18 - 5 = 27"},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    extra = {"warnings": ["checkpoint-2 could not be saved"], "spectra": _spectra(slices)}
    (folder / "report.json").write_text(json.dumps(extra))
    return folder


def _rows(steps: int, slices: int, gpu: bool):
    chance = random.Random(steps)
    yield {"step": 0, "eval_loss": 2.9, "perplexity": math.exp(2.9), "eval_tokens": 1000}
    for step in range(1, steps + 1):
        seconds = chance.uniform(1.4, 1.8)
        yield {
            "step": step,
            "applied": step != steps // 2,
            "refusal": "" if step != steps // 2 else "rank 1: a loss is not finite",
            "loss": None if step == steps // 2 else 1 + 2 * math.exp(-6 * step / steps) + chance.gauss(0, 0.15),
            "learning_rate": 2e-5 * (1 + math.cos(math.pi * step / steps)) / 2,
            "tokens": 65_536,
            "step_time_s": seconds,
            "tokens_per_second": 65_536 / seconds,
            "mfu": round(0.65 / seconds, 4) if gpu else None,
            "peak_memory_bytes": 61 * 2**30 if gpu else 0,
        }
        if step % max(1, steps // 20) == 0:
            norms = [1e-3 * math.exp(-5 * step / steps) * chance.uniform(0.8, 1.2) for _ in range(slices)]
            yield {"step": step, "slice_grad_norms": [n * 300 for n in norms], "slice_delta_norms": norms}
            yield {"step": step, "bf16_moved": 0.4 * math.exp(-step / steps)}
        if step % max(1, steps // 4) == 0:
            loss = 1.05 + 1.9 * math.exp(-6 * step / steps)
            yield {"step": step, "eval_loss": loss, "perplexity": math.exp(loss), "eval_tokens": 1000}


def _spectra(slices: int) -> dict[str, Any]:
    components = 32 * slices
    weights = [
        {
            "name": f"model.layers.{layer}.{kind}",
            "r": 16,
            "slices": slices,
            "values": [0.01 * (layer + 5) * math.exp(-5 * i / components) for i in range(components)],
        }
        for kind in KINDS
        for layer in (16, 31, 0)
    ]
    return {"weights": weights, "left_out": [], "seconds": 1.0}


class Page(HTMLParser):
    """What a browser would find in a page: elements, ids, what it refers to, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.policy = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img", "input", "hr"):
            self._open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.references += [v or "" for k, v in attributes if k in REFERRING]
        self.styles += [v or "" for k, v in attributes if k in ("style", "clip-path", "fill", "filter")]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self.styles.append(data)
        else:
            self.text += data

    @property
    def unclosed(self) -> list[str]:
        return self._open


REFERRING = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "cite", "manifest")


def text_boxes(picture: Any) -> list[tuple[str, tuple[float, ...]]]:
    """(text, (x0, y0, x1, y1) in hundredths of an inch) of every piece of text that the PNG shows."""
    from unittest import mock

    import matplotlib as mpl
    from matplotlib.text import Text

    from hdpissa.engine.pictures import RUN_STYLE, make_figure

    shown: dict[int, Text] = {}
    draw = Text.draw

    def drawn(text, *args, **kwargs):  # ticks beyond the axes exist, and are not drawn
        if text.get_visible() and text.get_text().strip():
            shown[id(text)] = text
        return draw(text, *args, **kwargs)

    with mpl.rc_context(RUN_STYLE):
        figure = make_figure(*picture.size)
        figure.suptitle(picture.title, x=0.02, ha="left", fontsize=11, fontweight="bold")
        picture.draw(figure)
        figure.set_dpi(100)
        with mock.patch.object(Text, "draw", drawn):
            figure.draw_without_rendering()
        renderer = figure.canvas.get_renderer()
        return [(text.get_text(), tuple(text.get_window_extent(renderer).extents)) for text in shown.values()]


def spectra_here(engine) -> dict[str, Any]:
    """What `spectra.measure` finds in an engine: all weights, without limit of time, with no time, and damaged."""
    from hdpissa.engine import spectra

    store = engine.optimizer.store
    found = spectra.measure(engine.module, store, most=99, most_seconds=1e9)
    none = spectra.measure(engine.module, store, most=99, most_seconds=0.0)
    for _, sum_A, _ in store.state_views("delta_sum", 0):
        sum_A.fill_(float("nan"))
    damaged = spectra.measure(engine.module, store, most=99, most_seconds=1e9)
    return {"found": found, "none": none, "damaged": damaged, "kinds": {t.kind for t in engine.targets}}
