"""Prints what the demo achieved, from the files that the run left: `python launch/demo_report.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def report(folder: Path) -> str:
    """Evaluation loss and the sample answer before and after, and where everything is."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    before, after = (json.loads((folder / f"sample_{when}_training.json").read_text()) for when in ("before", "after"))
    lines = ["", "prompt", *_indent(before["prompt"])]
    lines += ["answer before training", *_indent(before["answer"]), "answer after training", *_indent(after["answer"])]
    lines += [
        f"evaluation loss {losses[0]:.4f} -> {losses[-1]:.4f} ({losses[-1] / losses[0] - 1:+.1%})",
        f"metrics    {folder}/metrics.jsonl",
        f"run        {folder}/run.json",
        f"model      {folder}/model (AutoModelForCausalLM.from_pretrained loads it)",
    ]
    return "\n".join(lines)


def _indent(text: str) -> list[str]:
    return [f"    {line}" for line in text.strip().splitlines()]


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))
