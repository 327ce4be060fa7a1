"""Fine-tunes a causal language model with HD-PiSSA on DeepSpeed ZeRO-3.

    deepspeed launch/train.py --ds_config ds_configs/zero3.json --model_name_or_path M --dataset_name D --output_dir O

Also under torchrun, srun and mpirun, on one host or many (launch/nodes/), and as one plain `python` process.
`fit` is the loop, `train` wires the parts. Whatever a person can get wrong is found before any weight is read
(train_checks.py): one line, exit code 2. Peers that are lost on the way: one line, exit code 1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError, LostError, StopError
from hdpissa.engine.launcher import speaking_rank
from hdpissa.launch import train_arguments
from hdpissa.launch.train_callbacks import Callbacks
from hdpissa.launch.train_checkpoints import (
    PREEMPTED,
    Checkpoints,
    count_from_the_data,
    describe_start,
    find_checkpoint,
    resumptions,
    stopping_on_signals,
)
from hdpissa.launch.train_checks import Job, check, export_folders
from hdpissa.launch.train_description import describe_run
from hdpissa.launch.train_evaluation import Evaluation, make_evaluator
from hdpissa.launch.train_guard import Guard
from hdpissa.launch.train_lock import lock_folder
from hdpissa.launch.train_model import load_model
from hdpissa.launch.train_preview import show_rows
from hdpissa.launch.train_questions import stop_at_turns
from hdpissa.launch.train_record import make_recorder, take_over
from hdpissa.launch.train_schedule import make_scheduler

# ---------------------------------------------------------------------------------------------------
# the loop


def fit(
    engine: Any,
    data: Any,
    evaluation: Any,
    scheduler: Any,
    recorder: Any,
    checkpoints: Any,
    guard: Any,
    callbacks: Any,
    *,
    args: Any,
    total_steps: int,
) -> bool:
    """Trains up to `total_steps` optimizer steps; a rank works off its slices' micro-batches in order.

    Returns: whether it got there, or ended early: nothing improved, or a callback said that this is enough. False
        when the run was asked to stop.
    """
    from hdpissa.engine import pulse, zero3

    accumulation = engine.gradient_accumulation_steps()
    recorder.start()
    callbacks.train_begin()
    if engine.global_steps == 0:
        callbacks.evaluate(evaluation.before(engine), evaluation.best)
    if evaluation.missed(engine.global_steps, total_steps):
        callbacks.evaluate(evaluation.evaluate(engine, engine.global_steps), evaluation.best)
    for step in range(engine.global_steps, total_steps):
        if evaluation.stops:
            break
        pulse.at_step(step + 1)
        callbacks.step_begin(step)
        # --- accumulate; the engine steps after the last micro-batch
        for slice_id, micro_batch in engine.plan.schedule(accumulation):
            at = step - checkpoints.data_offset, slice_id, micro_batch
            loss = engine(**zero3.to_device(data.batch(*at))).loss
            engine.backward(loss * data.loss_weight(*at) if args.loss_normalization == "tokens" else loss)
            result = engine.step()
        scheduler.step()
        # --- what is to be done now: by the arguments, and by callbacks
        done, due = step + 1, checkpoints.due(step + 1)
        wanted = callbacks.step_end(
            done,
            result.tokens,
            should_log=is_logged(args, done, total_steps),
            should_evaluate=evaluation.due(done, total_steps),
            should_save=due,
        )
        # --- log
        figures = {**report(result), "epoch": round((done - checkpoints.data_offset) / data.steps_per_epoch, 4)}
        figures |= {"skipped_steps": engine.skipped_steps, "peak_memory_bytes": zero3.peak_memory_bytes()}
        row = recorder.step(figures, log=wanted.should_log)
        if wanted.should_log:
            callbacks.log(row)
        # --- refuse to go on
        guard.after(result, engine.skipped_in_a_row, recorder)
        # --- leave, where that was asked for: an evaluation may take longer than there is time
        if result.failed_save:
            checkpoints.failed(result.failed_save)
        if result.interrupted and done < total_steps:
            return False
        # --- evaluate
        if callbacks.wants("should_evaluate") or wanted.should_evaluate:
            callbacks.evaluate(evaluation.evaluate(engine, done), evaluation.best)
        evaluation.ask(engine, done, total_steps)
        # --- save
        if callbacks.wants("should_save") or wanted.should_save or (checkpoints.due(done) and not due):
            checkpoints.save(engine, done)
            callbacks.save()
        if callbacks.should_stop():
            break
    callbacks.evaluate(evaluation.last(engine), evaluation.best)
    if callbacks.wants("should_save"):
        checkpoints.save(engine, engine.global_steps)
        callbacks.save()
    callbacks.train_end()
    return True


def is_logged(args: Any, done: int, total_steps: int) -> bool:
    """Whether a step has its line and its row."""
    return done % args.logging_steps == 0 or done == total_steps or (done == 1 and args.logging_first_step)


def report(result: Any) -> dict[str, Any]:
    """What of a step's result is for the record."""
    return {name: value for name, value in asdict(result).items() if name not in ("interrupted", "failed_save")}


# ---------------------------------------------------------------------------------------------------
# the parts


def meet(args: Any, job: Job) -> Any:
    """Starts the process group and makes the ranks known to each other.

    Raises:
        LostError: they did not all come.
    """
    from hdpissa.engine import peers, zero3

    try:
        zero3.init_distributed(args.ddp_timeout)
        return zero3.meet(args.ddp_timeout, args.hang_s)
    except RuntimeError as error:
        if not peers.is_loss(error):
            raise
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostError(
            f"rank {job.plan.rank} of {job.plan.world_size}: the ranks did not all meet at {where} within "
            f"--ddp_timeout {args.ddp_timeout} s ({peers.reason(error)}); start the launcher on every host, with this "
            f"address and a port that is free there"
        ) from error


# ---------------------------------------------------------------------------------------------------
# wiring


def train(args: Any, job: Job, recorder: Any, reader: Any) -> bool:
    """Shard, decompose or resume, train, export; False when the run was asked to stop before its end."""
    from transformers import set_seed

    from hdpissa.engine import initialize, zero3
    from hdpissa.launch import train_report
    from hdpissa.launch.train_data import record_stream, refuse_leaks, tell_rows

    set_seed(args.seed + job.plan.rank)  # dropout, where a model has any
    model = load_model(args, job.ds)
    use_cache, model.config.use_cache = model.config.use_cache, False  # of no use in training
    engine = initialize(model=model, config=job.ds, resume_from=reader, progress=recorder.slices)
    start = engine.global_steps
    if args.packing:
        refuse_leaks(engine, job)
    take_over(args, job, recorder, reader)
    for line in [*tell_rows(job.rows, job.data), *stop_at_turns(model, job.tokenizer, job.rows)]:
        recorder.say(line)
    recorder.say(describe_start(args, engine, reader, job.total_steps))
    recorder.say(str(engine.exchange_plan()))
    if engine.optimizer.beside:
        recorder.say(str(engine.optimizer.beside))
    described = describe_run(args, engine, job, resumptions(reader, args))
    recorder.describe(described)
    scheduler = make_scheduler(args, engine.optimizer, job.total_steps, start)
    checkpoints = Checkpoints(args, job, recorder, reader)
    data_began = job.data.steps_per_epoch, checkpoints.data_offset
    evaluation = Evaluation(args, make_evaluator(args, job), recorder, checkpoints, *data_began)
    guard = Guard(engine, args)
    told = {"engine": engine, "scheduler": scheduler, "data_offset": checkpoints.data_offset}
    callbacks = Callbacks(job.callbacks, args, job, **told)
    for name in callbacks.never_called():
        recorder.say(f"warning: {name} is never called: there is no such event here")
    parts = engine, job.data, evaluation, scheduler, recorder, checkpoints, guard, callbacks
    with stopping_on_signals(engine):
        try:
            finished = fit(*parts, args=args, total_steps=job.total_steps)
        except StopError:  # which every rank raises; what is being saved is still worth something
            checkpoints.finish(engine)
            raise
        checkpoints.finish(engine)
        if not finished:
            stopped = checkpoints.last_save(engine)
            recorder.state("preempted", engine.global_steps, "" if stopped.saved else stopped.words)
            recorder.say(stopped.words)
            record_stream(job.data, described, recorder)
            train_report.write(args, engine, recorder, spectra=False)
            zero3.part()  # a launcher ends all ranks when one has left
            return False
    last = engine.global_steps
    record_stream(job.data, described, recorder)
    evaluation.end(engine)
    model.config.use_cache = use_cache  # the export is configured as its base
    exported = export(args, job, engine, recorder)
    recorder.state("finished", last)
    drawn = train_report.write(args, engine, recorder, spectra=True)
    zero3.part()
    also = [name for name in ("samples.jsonl", "report.json") if (Path(args.output_dir) / name).exists()]
    outputs = ["metrics.jsonl, run.json, run_state.json", *also, *exported, *drawn]
    recorder.say(f"outputs: {args.output_dir}/ ({', '.join(outputs)})")
    return True


def export(args: Any, job: Job, engine: Any, recorder: Any) -> list[str]:
    """Writes what --export_format says; returns the names of the folders."""
    from hdpissa.engine import pulse
    from hdpissa.launch import train_report

    folders = export_folders(args.export_format)
    for format, name in folders.items():
        folder = Path(args.output_dir) / name
        cut = {"rank": args.export_rank} if format == "peft" else {}
        exported = engine.export(folder, format=format, dtype=args.export_dtype, **cut)
        recorder.say(str(exported))
        if job.plan.rank == 0:
            with pulse.alone("tokenizer"):
                job.tokenizer.save_pretrained(folder)
            train_report.write_card(args, job, recorder, folder, exported)
    for name in set(export_folders("both").values()) - set(folders.values()):
        if (Path(args.output_dir) / name).exists():
            recorder.say(f"warning: {args.output_dir}/{name}/ is an earlier run's, not this one's")
    return [f"{name}/" for name in folders.values()]


def main(argv: list[str] | None = None, *, callbacks: Sequence[Any] = ()) -> bool:
    """Checks, then trains; what ends a run early is told in run_state.json. False when it was asked to stop.

    Args:
        callbacks: instances of transformers' TrainerCallback, after those of --callbacks.
    """
    args, given = train_arguments.parse(argv)
    job = check(args, given)
    if speaks := speaking_rank(os.environ) == "0":
        for note in job.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    if args.preview:
        if speaks:
            show_rows(args, job)
        return True
    job.callbacks += callbacks

    from hdpissa.engine import zero3
    from hdpissa.engine.peers import is_loss
    from hdpissa.engine.watch import Watch

    others = meet(args, job)
    try:
        if args.resume_from_checkpoint is not None:  # before looking at what another run may still be writing
            lock_folder(Path(args.output_dir), job.plan.rank)
        reader = find_checkpoint(args, job)
        job = count_from_the_data(args, job, reader)
        recorder = make_recorder(args, job, reader)
    except ConfigError:  # which every rank raises
        raise
    except BaseException as error:  # rank 0's disk; the others would wait for it
        others.tell_failure(error)
        raise
    watch = Watch(others, lambda: os._exit(say_and_wait(give_up(others, recorder))))
    watch.start()
    try:
        finished = train(args, job, recorder, reader)
    except BaseException as error:
        watch.stop()
        if is_loss(error):
            raise give_up(others, recorder, error) from error
        recorder.failed(error)
        if not isinstance(error, StopError):  # which every rank raises
            others.tell_failure(error)
        raise
    finally:
        watch.stop()
        recorder.close()
    zero3.shut_down()
    return finished


def give_up(others: Any, recorder: Any, error: BaseException | None = None) -> LostError:
    """Finds out which peers are lost, and has it in run_state.json: by the lowest rank that is left on a host."""
    if not others.may_speak():  # the watch is about to end this process
        time.sleep(60)
    lost = others.explain(recorder.steps_done, error)
    if not others.is_first_here():  # one that is will find the same in a moment
        time.sleep(GRACE_S / 2)
    recorder.failed(lost, lost=True)
    return lost


def say_and_wait(lost: LostError) -> int:
    """Exit code, after one line, and after the neighbours had time for theirs: launchers end them when one exits."""
    print(f"error: {lost}", file=sys.stderr, flush=True)
    time.sleep(GRACE_S)
    return LOST


PATIENCE_S, GRACE_S = 15.0, 3.0
LOST = STOPPED = 1


def run(argv: list[str] | None = None, **more: Any) -> int:
    """`main` with a user's mistakes as one line and exit code 2; lost peers and what all gave up for: one line, 1.

    Rank 0 speaks for all. Launchers end every rank as soon as one has exited, so the others wait until it
    has spoken; one that is then still there has a mistake of its own (a file that its node lacks).
    """
    try:
        finished = main(argv, **more)
    except (ConfigError, StopError) as error:
        rank = speaking_rank(os.environ)
        if rank != "0":
            time.sleep(PATIENCE_S)
        print(f"error: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)
        return STOPPED if isinstance(error, StopError) else 2
    except LostError as error:
        return say_and_wait(error)
    return 0 if finished else PREEMPTED


if __name__ == "__main__":
    code = run()
    if code == LOST:  # a process group that has lost its peers would wait for them on the way out, or abort
        os._exit(code)
    sys.exit(code)
