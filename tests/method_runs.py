"""What ranks do in the tests of the comparison's methods (test_methods.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from hdpissa.benchmarks.methods import Setting, build


def batch(number: int, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Of a rank's micro-batch; every rank has another one."""
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    ids = torch.randint(0, 512, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def train(names: list[str], setting: dict[str, Any], steps: int = 3) -> dict[str, dict[str, Any]]:
    """For each method what it did: losses, weights before and after, bytes and phases of the last step."""
    return {name: train_one(name, Setting(**setting), steps) for name in names}


def train_one(name: str, setting: Setting, steps: int) -> dict[str, Any]:
    method = build(name, setting)
    found: dict[str, Any] = {"before": dict(method.weights()), "loss": [], "eval": [method.loss(batch(0)).item()]}
    for step in range(steps):
        method.bytes_on_wire()
        for micro in range(setting.accumulation):
            found["loss"].append(method.micro_step(batch(step * setting.accumulation + micro)).item())
        method.step(lr=setting.lr)
        found |= {"sent": method.wire.sent, "phases": method.phases(), "received": method.bytes_on_wire()}
        found["engine"] = getattr(method, "exchange_bytes", None)
    found["eval"].append(method.loss(batch(0)).item())
    found["after"] = dict(method.weights())
    return found


def same_with(setting: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The setting with other values."""
    return dataclasses.asdict(dataclasses.replace(Setting(**setting), **changes))
