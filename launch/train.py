"""Fine-tunes a causal language model with HD-PiSSA on DeepSpeed ZeRO-3.

    deepspeed launch/train.py --ds_config ds_configs/zero3.json --model_name_or_path M --dataset_name D --output_dir O

Also under torchrun or srun, and as one plain `python` process. `main` wires the parts, `fit` is the loop.
Whatever a person can get wrong is found before any weight is read: one line, exit code 2.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch import train_arguments

# ---------------------------------------------------------------------------------------------------
# the loop


def fit(engine: Any, data: Any, evaluator: Any, scheduler: Any, recorder: Any, *, args: Any, total_steps: int) -> None:
    """Trains for `total_steps` optimizer steps; a rank works off its slices' micro-batches in order."""
    accumulation = engine.gradient_accumulation_steps()
    epoch_steps = data.steps_per_epoch
    recorder.start()
    for step in range(total_steps):
        # --- accumulate and step: the engine acts after the last micro-batch
        for slice_id, micro_batch in engine.plan.schedule(accumulation):
            batch = data.batch(step, slice_id, micro_batch)
            loss = engine(**evaluator.to_device(batch)).loss
            engine.backward(loss)
            result = engine.step()
        scheduler.step()
        # --- log
        done = step + 1
        figures = {
            "step": done,
            "epoch": round(done / epoch_steps, 4),
            **{k: v for k, v in asdict(result).items() if k != "step"},
        }
        figures |= {"skipped_steps": engine.skipped_steps, "peak_memory_bytes": evaluator.peak_memory()}
        recorder.step(figures, log=done % args.logging_steps == 0 or done == total_steps)
        recorder.state("running", done)
        # --- evaluate
        if args.eval_steps and done % args.eval_steps == 0 and done < total_steps:
            evaluator.evaluate(engine, recorder, step=done)


# ---------------------------------------------------------------------------------------------------
# the parts


@dataclass
class Evaluator:
    """Loss on held-out rows, weighted by target tokens, and one generated answer."""

    batches: Any  # EvalBatches or None
    tokenizer: Any
    prompt: str | None
    max_new_tokens: int

    def to_device(self, batch: dict) -> dict:
        from hdpissa.engine import zero3

        return {name: tensor.to(zero3.device()) for name, tensor in batch.items()}

    def peak_memory(self) -> int:
        from hdpissa.engine import zero3

        return zero3.peak_memory_bytes()

    def evaluate(self, engine: Any, recorder: Any, *, step: int) -> None:
        """Writes an evaluation row; all ranks take part in every forward."""
        import math

        if self.batches is None:
            return
        loss, tokens = self._mean_loss(engine)
        perplexity = math.exp(min(loss, 700.0))
        recorder.evaluation({"step": step, "eval_loss": loss, "perplexity": perplexity, "eval_tokens": tokens})
        recorder.resume_clock()

    def _mean_loss(self, engine: Any) -> tuple[float, int]:
        import torch
        import torch.distributed as dist

        from hdpissa.engine import zero3
        from hdpissa.engine.batches import count_target_tokens

        total = torch.zeros(2, dtype=torch.float64, device=zero3.device())
        engine.eval()
        with torch.no_grad():
            for batch, real in self.batches:
                loss = engine(**self.to_device(batch)).loss
                tokens = count_target_tokens(batch["labels"])
                if real and tokens:
                    total += torch.stack([loss.double() * tokens, torch.full_like(loss, tokens, dtype=torch.float64)])
        engine.train()
        dist.all_reduce(total)
        loss_sum, tokens = total.tolist()
        return loss_sum / max(tokens, 1), int(tokens)

    def sample(self, engine: Any, recorder: Any, *, title: str) -> None:
        """Prints the greedy answer to the sample prompt; all ranks generate it together."""
        if self.prompt is None:
            return
        engine.eval()
        inputs = self.to_device(dict(self.tokenizer(self.prompt, return_tensors="pt")))
        ids = engine.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        engine.train()
        answer = self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        recorder.say(f"answer {title}:\n" + "\n".join(f"    {line}" for line in answer.strip().splitlines()))
        recorder.save_json(f"sample_{title.replace(' ', '_')}.json", {"prompt": self.prompt, "answer": answer})
        recorder.resume_clock()


def check_output_dir(args: Any) -> None:
    """Refuses a folder that holds another run; every rank looks before any rank writes."""
    folder = Path(args.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output_dir {folder}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--output_dir {folder}: {there} must be writable; give another folder")
    if (folder / "run.json").exists() and not args.overwrite_output_dir:
        raise ConfigError(
            f"--output_dir {folder} holds another run (run.json); give another folder, or --overwrite_output_dir"
        )


def read_model_config(args: Any) -> Any:
    """The model's config.json; ConfigError when there is no such model."""
    from transformers import AutoConfig

    name = args.model_name_or_path
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"--model_name_or_path {name}: no such folder; give a Hugging Face folder or hub name")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model_name_or_path {name}: no usable model there ({reason(error)}); give a Hugging Face folder or name"
        ) from None


def reason(error: Exception) -> str:
    """The start of an error message, on one line."""
    return " ".join(str(error).split())[:200].rstrip(".")


def resolve_ds_config(args: Any, given: frozenset[str], model_config: Any) -> tuple[dict, Any, Any]:
    """(DeepSpeed config with every "auto" filled, hd_pissa config, the values both sides agree on)."""
    from hdpissa.engine import ds_config, zero3

    raw, hd = ds_config.split_section(ds_config.read_ds_config(args.ds_config))
    ds_config.check_ds_config(raw)
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    values = ds_config.TrainValues(
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        world_size=zero3.read_launcher()[1],
        max_grad_norm=args.max_grad_norm,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        hidden_size=getattr(text_config, "hidden_size", None),
        given=given,
    )
    filled, values = ds_config.fill_auto(raw, values)
    return {**filled, "hd_pissa": hd.model_dump(mode="json")}, hd, values


def check_targets(model_config: Any, hd: Any, plan: Any, args: Any) -> int:
    """Finds the targets on an empty (meta) model; returns its number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from hdpissa.engine import adapt

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config), **model_options(args))
    except (ValueError, ImportError) as error:  # no causal language model, or an attention that is not there
        attention = f", --attn_implementation {args.attn_implementation}" if args.attn_implementation else ""
        raise ConfigError(
            f"--model_name_or_path {args.model_name_or_path}{attention}: cannot be built ({reason(error)}); "
            f"give a causal language model, and an attention that it has"
        ) from None
    adapt.find_targets(model, hd, plan)
    if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(f"--gradient_checkpointing: {type(model).__name__} does not support it; leave it out")
    return sum(p.numel() for p in model.parameters())


def model_options(args: Any) -> dict[str, Any]:
    """What the command line says about the model's code."""
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    return {"trust_remote_code": args.trust_remote_code, **attention}


def read_tokenizer(args: Any) -> Any:
    """The model's tokenizer, with the EOS as pad token where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model_name_or_path {args.model_name_or_path}: no usable tokenizer there ({reason(error)}); "
            f"put the model's tokenizer files beside it"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_data(args: Any, tokenizer: Any, template: Any) -> tuple[Any, Any]:
    """(training rows, evaluation rows or None), tokenised. No process group exists yet, so nobody waits in one."""
    import logging

    from hdpissa.engine.data import load_rows, tokenize_rows

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs as an error it raises, too

    def read(name: str, split: str) -> Any:
        rows = load_rows(name, split=split, config_name=args.dataset_config)
        return tokenize_rows(
            rows,
            tokenizer,
            prompt_field=args.prompt_field,
            response_field=args.response_field,
            template=template,
            max_length=args.max_length,
            num_proc=args.preprocessing_num_workers,
        )

    train = read(args.dataset_name, args.dataset_split)
    if not (args.eval_dataset_name or args.eval_split):
        return train, None
    return train, read(args.eval_dataset_name or args.dataset_name, args.eval_split or "train")


def count_steps(args: Any, steps_per_epoch: int) -> int:
    """Optimizer steps of the run; refuses a run of none."""
    if args.max_steps > 0:
        return args.max_steps
    steps = int(args.num_train_epochs * steps_per_epoch)
    if steps == 0:
        raise ConfigError(
            f"--num_train_epochs is {args.num_train_epochs} and an epoch has {steps_per_epoch} steps: not one whole "
            f"step to train; raise it, or give --max_steps"
        )
    return steps


def make_scheduler(args: Any, optimizer: Any, total_steps: int) -> Any:
    """transformers' schedule; step t (from 0) has the learning rate that method.md gives."""
    from transformers import get_scheduler

    warmup = args.warmup_steps if args.warmup_steps is not None else int(args.warmup_ratio * total_steps)
    return get_scheduler(
        args.lr_scheduler_type, optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
    )


def describe_run(args: Any, ds: dict, engine: Any, train: Any, data: Any, total_steps: int) -> dict[str, Any]:
    """run.json: everything that is needed to know, and to repeat, what was run."""
    from importlib.metadata import version

    from hdpissa.engine import zero3

    plan = engine.plan
    return {
        "arguments": asdict(args),
        "ds_config": ds,
        "world_size": plan.world_size,
        "slices": plan.slices,
        "targets": len(engine.targets),
        "total_steps": total_steps,
        "steps_per_epoch": data.steps_per_epoch,
        "rows": {
            "used": len(train.dataset),
            "dropped_without_labels": train.dropped_without_labels,
            "truncated": train.truncated,
            "dropped_at_the_end_of_an_epoch": data.dropped_samples,
        },
        "init": asdict(engine.init_report),
        "memory_bytes": engine.memory_bytes(),
        "device": zero3.accelerator_name(),
        "versions": {name: version(name) for name in ("hdpissa", "torch", "deepspeed", "transformers", "datasets")},
        "git_revision": git_revision(),
    }


def git_revision() -> str | None:
    """Commit of this code, None when it was installed without its repository."""
    import subprocess

    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None


# ---------------------------------------------------------------------------------------------------
# wiring


@dataclass
class Job:
    """What is known of a run before any weight is read."""

    ds: dict
    plan: Any
    weights: int  # parameters of the model
    template: Any
    tokenizer: Any
    train: Any
    held_out: Any  # or None
    data: Any
    total_steps: int


def check(args: Any, given: frozenset[str]) -> Job:
    """Reads everything but weights, on every rank alike; writes nothing and starts no process group."""
    from hdpissa.engine.batches import SliceBatches
    from hdpissa.engine.engine import make_plan
    from hdpissa.engine.prompts import resolve_template

    check_output_dir(args)
    model_config = read_model_config(args)
    ds, hd, values = resolve_ds_config(args, given, model_config)
    plan = make_plan(hd, values.gradient_accumulation_steps)
    weights = check_targets(model_config, hd, plan, args)
    template = resolve_template(args.prompt_template)
    tokenizer = read_tokenizer(args)
    train, held_out = read_data(args, tokenizer, template)
    data = SliceBatches(
        train.dataset,
        slices=plan.slices,
        micro_batches_per_slice=plan.micro_batches_per_slice(values.gradient_accumulation_steps),
        micro_batch_size=values.per_device_train_batch_size,
        seed=args.seed,
        pad_token_id=tokenizer.pad_token_id,
    )
    total_steps = count_steps(args, data.steps_per_epoch)
    return Job(ds, plan, weights, template, tokenizer, train, held_out, data, total_steps)


def make_recorder(args: Any, job: Job) -> Any:
    """Makes the output folder, where nothing of an earlier run counts any more."""
    from hdpissa.engine import zero3
    from hdpissa.engine.metrics import Recorder

    folder = Path(args.output_dir)
    if job.plan.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").unlink(missing_ok=True)
        (folder / "metrics.jsonl").write_text("")
    recorder = Recorder(
        folder,
        total_steps=job.total_steps,
        weights=job.weights,
        device_name=zero3.accelerator_name(),
        devices=job.plan.world_size,
        quiet=job.plan.rank != 0,
    )
    recorder.state("running", 0)
    return recorder


def make_evaluator(args: Any, job: Job) -> Evaluator:
    from hdpissa.engine.batches import EvalBatches

    batches = job.held_out and EvalBatches(
        job.held_out.dataset,
        rank=job.plan.rank,
        world_size=job.plan.world_size,
        batch_size=args.per_device_eval_batch_size,
        pad_token_id=job.tokenizer.pad_token_id,
    )
    prompt = None if args.sample_prompt is None else job.template.render(args.sample_prompt)
    return Evaluator(batches, job.tokenizer, prompt, args.max_new_tokens)


def train(args: Any, job: Job, recorder: Any) -> None:
    """Shard, decompose, train, export."""
    from hdpissa.engine import initialize, load_pretrained

    model = load_pretrained(args.model_name_or_path, job.ds, **model_options(args))
    model.config.use_cache = False  # of no use in training; generate() asks for its own
    if args.gradient_checkpointing:
        # renamed in transformers 5; the old name warns
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    engine = initialize(model=model, config=job.ds)
    evaluator = make_evaluator(args, job)
    recorder.save_json("run.json", describe_run(args, job.ds, engine, job.train, job.data, job.total_steps))
    evaluator.evaluate(engine, recorder, step=0)
    evaluator.sample(engine, recorder, title="before training")
    scheduler = make_scheduler(args, engine.optimizer, job.total_steps)
    fit(engine, job.data, evaluator, scheduler, recorder, args=args, total_steps=job.total_steps)
    evaluator.evaluate(engine, recorder, step=job.total_steps)
    evaluator.sample(engine, recorder, title="after training")
    engine.export(Path(args.output_dir) / "model", dtype=args.export_dtype)
    if job.plan.rank == 0:
        job.tokenizer.save_pretrained(Path(args.output_dir) / "model")
    recorder.state("finished", job.total_steps)
    recorder.say(f"outputs: {args.output_dir}/ (metrics.jsonl, run.json, run_state.json, model/)")


def main(argv: list[str] | None = None) -> None:
    """Checks, then trains; what ends a run early is told in run_state.json."""
    args, given = train_arguments.parse(argv)
    job = check(args, given)

    from hdpissa.engine import zero3

    zero3.init_distributed()
    recorder = make_recorder(args, job)
    try:
        train(args, job, recorder)
    except BaseException as error:
        recorder.failed(error)
        raise
    finally:
        recorder.close()
    zero3.shut_down()


PATIENCE_S = 15.0


def run(argv: list[str] | None = None) -> int:
    """`main` with a user's mistakes as one line and exit code 2.

    Rank 0 speaks for all. Launchers end every rank as soon as one has exited, so the others wait until it
    has spoken; one that is then still there has a mistake of its own (a file that its node lacks).
    """
    try:
        main(argv)
    except ConfigError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank != "0":
            time.sleep(PATIENCE_S)
        print(f"error: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
