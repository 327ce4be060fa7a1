"""What options change, seen in one process; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import hashlib
from typing import Any

from launch_runs import prepare_process, train_here
from tiny import build, ds_settings


def look(cases: dict[str, list[str]], cache: str) -> dict[str, dict[str, Any]]:
    """What launch/train.py makes of each command line before it reads weights."""
    import datasets

    prepare_process(cache)
    workers: list[Any] = []
    original = datasets.Dataset.map

    def map_rows(self, *args, **kwargs):
        workers.append(kwargs.get("num_proc"))
        return original(self, *args, **kwargs)

    datasets.Dataset.map = map_rows
    return {name: _look(argv, workers) for name, argv in cases.items()}


def _look(argv: list[str], workers: list[Any]) -> dict[str, Any]:
    from hdpissa.engine import ConfigError
    from hdpissa.engine.ds_config import AGREED
    from hdpissa.launch import train, train_arguments, train_checks

    workers.clear()
    try:
        args, given = train_arguments.parse(argv)
        job = train_checks.check(args, given)
    except ConfigError as error:
        return {"error": str(error)}
    ids, held_out = job.data.dataset["input_ids"], job.rows.held_out
    evaluator = train.make_evaluator(args, job)
    return {
        "error": None,
        "rows": len(ids),
        "held_out": len(held_out.dataset) if held_out else None,
        "longest": max(map(len, ids)),
        "data": hashlib.sha256(repr([list(row) for row in ids]).encode()).hexdigest(),
        "first": job.tokenizer.decode(ids[0]),
        "batch": job.data.batch(0, 0, 0)["input_ids"],
        "total_steps": job.total_steps,
        "ds": job.ds,
        "eval_batches": len(evaluator.batches) if evaluator.batches is not None else None,
        "prompt": evaluator.asked[0].text if evaluator.asked else None,
        "max_new_tokens": evaluator.max_new_tokens,
        "workers": workers[0] if workers else None,
        "model": train_checks.model_options(args),
        "agreed": {name: getattr(args, name) for name in AGREED},
    }


def train_and_record(argv: list[str], cache: str) -> dict[str, Any]:
    """A run, with the keywords of every save, and how the model was set up then: attention, checkpointing."""
    from hdpissa.engine import engine as engine_module

    saves: list[dict[str, Any]] = []
    models: list[tuple[str, bool]] = []
    original = engine_module.HDPissaEngine.save_checkpoint

    def save_checkpoint(self, *args, **kwargs):
        saves.append({key: value for key, value in kwargs.items() if key != "client_state"})
        models.append((self.module.config._attn_implementation, self.module.is_gradient_checkpointing))
        return original(self, *args, **kwargs)

    engine_module.HDPissaEngine.save_checkpoint = save_checkpoint
    return train_here(argv, cache) | {"saves": saves, "models": models}


def sections(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What an engine is like that was made with each `hd_pissa` section."""
    return {name: _section(settings) for name, settings in cases.items()}


def _section(hd_pissa: dict[str, Any]) -> dict[str, Any]:
    from hdpissa.engine import ConfigError, initialize
    from hdpissa.engine import build as build_module

    placed: list[str] = []
    original = build_module.make_shard

    def make_shard(*args, **kwargs):
        placed.append(kwargs["device"])
        return original(*args, **kwargs)

    build_module.make_shard = make_shard
    try:
        engine = initialize(model=build({}), config=ds_settings(bf16=True, **hd_pissa))
    except ConfigError as error:
        return {"error": str(error)}
    finally:
        build_module.make_shard = original
    layer = next(iter(engine.optimizer.store.layers.values()))
    plan = engine.exchange_plan()
    return {
        "error": None,
        "buckets": plan.buckets,
        "kinds": {t.kind for t in engine.targets},
        "memory": engine.memory_bytes(),
        "kernels": (layer.impl, layer.linear),
        "master": set(placed),
    }


def who_decomposes(placements: list[str]) -> list[int]:
    """How many matrices this rank has decomposed, for each `init.placement`."""
    from hdpissa.engine import initialize, svd

    counts = []
    original = svd.top_triplets
    for placement in placements:
        calls: list[None] = []

        def top_triplets(*args, calls=calls, **kwargs):
            calls.append(None)
            return original(*args, **kwargs)

        svd.top_triplets = top_triplets
        initialize(model=build({}), config=ds_settings(slices=2, init={"placement": placement}))
        counts.append(len(calls))
    return counts
