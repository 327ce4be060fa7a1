"""Fine-tunes a language model with HD-PiSSA: TRL's trainers on DeepSpeed ZeRO-3.

    deepspeed launch/train.py --ds_config zero3 --model_name_or_path M --dataset_name D --output_dir O
    deepspeed launch/train.py --trainer dpo --config run.yaml

Also under torchrun, srun, mpirun, `accelerate launch`, and as one plain process. Options are those of TRL's SFTConfig,
DPOConfig, … with the defaults of docs/training.md, those of script_arguments.py, and the keys of `hd_pissa`. A mistake
ends in one line, exit code 2, before a weight is read; lost ranks in one line, exit code 1; a run that was asked to
stop has saved and exits with 143.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from hdpissa.engine.distributed.launcher import speaking_rank
from hdpissa.engine.errors import ConfigError, LostError, StopError

if TYPE_CHECKING:
    from hdpissa.launch.training.results import RunEnds
    from hdpissa.launch.training.rows import Rows
    from hdpissa.launch.training.script_arguments import Arguments, ScriptArguments

PREEMPTED, STOPPED = 143, 1
PATIENCE_S, GRACE_S = 15.0, 3.0


def main(argv: list[str] | None = None) -> bool:
    """Checks, trains, exports; False when the run was asked to stop before its end."""
    from hdpissa.engine.sharding import zero3
    from hdpissa.launch.training import checks as run_checks
    from hdpissa.launch.training import script_arguments
    from hdpissa.launch.training.results import RunEnds
    from hdpissa.launch.training.rows import read_rows

    arguments = script_arguments.parse(list(sys.argv[1:] if argv is None else argv))
    script, args = arguments.script, arguments.training
    empty = run_checks.check(arguments)
    tokenizer = run_checks.read_tokenizer(str(script.model_name_or_path), script.model_revision, args.trust_remote_code)
    if arguments.kind == "grpo":
        rewards(script)  # misspelt names are refused before rows are read
    rows = read_rows(arguments, tokenizer)
    if arguments.kind == "sft" and args.cross_entropy is None:
        args.cross_entropy = "model" if rows.template else "chunked"
    if arguments.kind == "dpo":
        run_checks.choose_reference(arguments, rows.train)
    ends = RunEnds(arguments, rows, tokenizer)
    make = functools.partial(make_trainer, arguments, rows, tokenizer, callbacks(arguments, ends))
    if script.preview:
        with tempfile.TemporaryDirectory() as args.output_dir:  # Trainer would make the real one
            trainer = make(empty) if arguments.kind == "sft" else None
            preview(trainer, rows, tokenizer, script.preview, args.process_index)
        return True
    trainer = ends.trainer = make(script.model_name_or_path)
    trainer.run_record.describe(**ends.description())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    zero3.wait_for_all_ranks()  # a launcher ends all ranks when one has left
    zero3.shut_down()
    return not trainer.preempted


def make_trainer(arguments: Arguments, rows: Rows, tokenizer: Any, callbacks: list[Any], model: Any) -> Any:
    """The trainer of `--trainer`; what TRL refuses is the user's mistake."""
    from hdpissa.launch.training import checks as run_checks

    args, script = arguments.training, arguments.script
    if isinstance(model, str):
        named = {"revision": script.model_revision, "attn_implementation": script.attn_implementation}
        given: Any = args.model_init_kwargs or {}
        args.model_init_kwargs = {k: v for k, v in named.items() if v} | given
    more = {"reward_funcs": rewards(script)} if arguments.kind == "grpo" else {}
    try:
        return run_checks.trainer_class(arguments.kind)(
            model=model,
            args=args,
            train_dataset=rows.train,
            eval_dataset=rows.held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
            **more,
        )
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def callbacks(arguments: Arguments, ends: RunEnds) -> list[Any]:
    """What happens at the ends of the run, its pictures, and early stopping where it is asked for."""
    from transformers import EarlyStoppingCallback

    from hdpissa.launch.trainers.pictures import RunPictures

    patience = arguments.script.early_stopping_patience
    return [ends, RunPictures(ends), *([EarlyStoppingCallback(patience)] if patience else [])]


def rewards(script: ScriptArguments) -> list[Any]:
    """GRPO's reward functions and model; raises ConfigError for a name that is none."""
    import importlib

    import trl.rewards

    known = [name for name in dir(trl.rewards) if name.endswith("_reward") and not name.startswith("get_")]
    found: list[Any] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or ():
        module, _, function = name.rpartition(".")
        if module:
            sys.path.insert(0, os.getcwd())
        try:
            found.append(getattr(importlib.import_module(module) if module else trl.rewards, function))
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"--reward_funcs {name}: not found ({error}); give package.module.function, or one of trl.rewards: "
                f"{', '.join(known)}"
            ) from error
    if not found:
        raise ConfigError("--trainer grpo without rewards: give --reward_funcs, or --reward_model_name_or_path")
    return found


def preview(trainer: Any, rows: Rows, tokenizer: Any, count: int, rank: int) -> None:
    """The first rows in the order of training, as the model would see them."""
    from hdpissa.launch.training.alpaca import show_rows

    shown: Any = rows.train
    if trainer is not None:
        shown = trainer.train_dataset
        if hasattr(shown, "__len__"):
            shown = (trainer.train_dataset[at] for at in trainer._get_train_sampler())
    if rank == 0:
        show_rows(iter(shown), tokenizer, count)


def run(argv: list[str] | None = None) -> int:
    """`main` with mistakes as one line and exit code 2, lost peers and what all gave up for as one line and 1.

    Rank 0 speaks for all. Launchers end every rank as soon as one has exited, so the others wait until it has spoken;
    one that is then still there has a mistake of its own (a file that its node lacks).
    """
    try:
        finished = main(argv)
    except (ConfigError, StopError) as error:
        rank = speaking_rank(os.environ)
        if rank != "0":
            time.sleep(PATIENCE_S)
        print(f"error: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)
        return STOPPED if isinstance(error, StopError) else 2
    except LostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
        return STOPPED
    return 0 if finished else PREEMPTED


if __name__ == "__main__":
    code = run()
    sys.stdout.flush()
    if code in (STOPPED, 2):  # a process group whose peers are gone would wait for them on the way out, or abort
        os._exit(code)
    sys.exit(code)
