"""What the ranks of tests/cli/test_train_script.py do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from launch_runs import captured_stderr, forbid_weights, prepare_process, train_here


def values(argv: list[str], names: list[str], cache: str) -> dict[str, Any]:
    """The values of options after the whole command line and the JSON were read."""
    from hdpissa.launch.training import script_arguments

    prepare_process(cache)
    found = script_arguments.parse(argv)
    known = {**vars(found.script), **vars(found.training)}
    return {name: getattr(known[name], "value", known[name]) for name in names} | {
        "section": found.training.deepspeed["hd_pissa"]
    }


def steps(cases: dict[Any, list[str]], cache: str) -> dict[Any, dict[str, Any]]:
    """For each command line one step of an engine of what it and its JSON say, of a tiny model on random tokens."""
    prepare_process(cache)
    return {name: _step(argv) for name, argv in cases.items()}


def _step(argv: list[str]) -> dict[str, Any]:
    from tiny import tiny_batch

    from hdpissa.engine import initialize, load_pretrained
    from hdpissa.engine.config import ds_config
    from hdpissa.engine.sharding import zero3
    from hdpissa.launch.training import script_arguments

    _, found = script_arguments.read(argv)
    asked = ds_config.TrainValues(**{name: found[name] for name in ds_config.AGREED}, world_size=1, hidden_size=32)
    ds = ds_config.fill_auto(found["deepspeed"], asked)[0]
    engine = initialize(model=load_pretrained(found["model_name_or_path"], ds), config=ds)
    for slice_id, micro_batch in engine.plan.schedule(engine.gradient_accumulation_steps()):
        engine.backward(engine(**tiny_batch(0, slice_id, micro_batch)).loss)
        result = engine.step()
    return {
        "applied": result.applied,
        "r": engine.targets[0].r,
        "slices": engine.plan.slices,
        "dtype": str(zero3.shard_view(engine.targets[0].param).dtype),
        "param_device": (ds["zero_optimization"].get("offload_param") or {}).get("device"),
    }


def reference_choices(argv: list[str], cache: str) -> list[bool]:
    """Whether DPO precomputes: on a GPU as its plan, a byte smaller, on CPUs, where the user refuses, of a stream."""
    from hdpissa.launch.planning import memory as plan_memory
    from hdpissa.launch.training import checks as run_checks
    from hdpissa.launch.training import reference as plan_reference
    from hdpissa.launch.training import script_arguments

    prepare_process(cache)
    found = []

    def choose(less: int | None, *more: str, rows: Any = ()) -> None:
        arguments = script_arguments.parse([*argv, *more])
        with run_checks._without_zero_init(arguments.training):
            enough = plan_memory.memory(
                plan_reference.planned(arguments.script.model_name_or_path, arguments.training)
            ).peak
            told = plan_reference.choose(arguments, rows, None if less is None else enough - less)
        assert bool(told) == (arguments.training.precompute_ref_log_probs and len(more) == 0)
        found.append(arguments.training.precompute_ref_log_probs)

    choose(0)
    choose(1)
    choose(None)
    choose(1, "--precompute_ref_log_probs", "false")
    choose(1, rows=iter(()))
    return found


def refusals(cases: list[list[str]], cache: str) -> list[dict[str, Any]]:
    """Exit code, or what came out of `run`, and standard error of each command line; none may read a weight."""
    from hdpissa.launch import train

    prepare_process(cache)
    forbid_weights("a weight was read")
    found = []
    for argv in cases:
        with captured_stderr() as told:
            try:
                code: Any = train.run(argv)
            except Exception as error:  # a weight was read, or a refusal is no ConfigError
                code = repr(error)
        found.append({"code": code, "stderr": "".join(told)})
    return found


def stopped(argv: list[str], cache: str, output: str) -> dict[str, Any]:
    """`train_here` of a run that gets SIGTERM once its third step is recorded."""

    def kill() -> None:
        metrics = Path(output, "metrics.jsonl")
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()
    return train_here(argv, cache)


def printed(argv: list[str], cache: str) -> tuple[int, str]:
    """Exit code and standard output, of a run that reads no weights."""
    from hdpissa.launch import train

    prepare_process(cache)
    forbid_weights("a weight was read")
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = train.run(argv)
    return code, told.getvalue()


def encoded(folder: str) -> tuple[list[dict[str, list]], list[list[int]], list[list[int]]]:
    """(rows of the encoder, ids of prompt + answer + line break + EOS, ids of the prompt)."""
    from transformers import AutoTokenizer

    from hdpissa.launch.common.prompts import resolve_template
    from hdpissa.launch.training.alpaca import AlpacaEncoder

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = resolve_template("alpaca")
    batch = {"q": ["2 + 3?", "1 + 1?"], "a": [":) 5", "\n2"]}  # answers whose first characters can join the prompt's
    prompts = [template.render(q) for q in batch["q"]]
    texts = [p + a + "\n" + tokenizer.eos_token for p, a in zip(prompts, batch["a"], strict=True)]
    found = AlpacaEncoder(tokenizer, template, "q", "a")(batch)
    return found, tokenizer(texts)["input_ids"], tokenizer(prompts)["input_ids"]


def short(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward for GRPO, found by its import path."""
    return [-float(len(text)) for text in completions]
