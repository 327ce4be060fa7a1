"""Epochs are those of the data, also of data that began in the middle of a run (--ignore_data_skip)."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest
from transformers import TrainerCallback

from hdpissa.engine.batches import SHUFFLED, SliceBatches
from hdpissa.launch import train_arguments, train_checkpoints
from hdpissa.launch.train_callbacks import Callbacks
from hdpissa.launch.train_checkpoints import Checkpoints, count_from_the_data
from hdpissa.launch.train_checks import Job
from hdpissa.launch.train_data import Rows, tell_rows
from hdpissa.launch.train_evaluation import Evaluation, make_best

LENGTH, TOTAL = 3, 9


class Seen(TrainerCallback):
    def __init__(self):
        self.epochs = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append(("begin", state.global_step, state.epoch))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append(("end", state.global_step, state.epoch))


@pytest.mark.parametrize(
    ("offset", "epochs", "count"),
    [
        (0, [("begin", 0, 0), ("end", 3, 1), ("begin", 3, 1), ("end", 6, 2), ("begin", 6, 2), ("end", 9, 3)], 3),
        (2, [("begin", 2, 0), ("end", 5, 1), ("begin", 5, 1), ("end", 8, 2), ("begin", 8, 2), ("end", 9, 7 / 3)], 3),
    ],
)
def test_what_callbacks_see(monkeypatch, offset, epochs, count):
    monkeypatch.setattr(Callbacks, "_agree", lambda self: None)  # with other ranks
    seen, engine = Seen(), SimpleNamespace(module=None, optimizer=None, global_steps=offset)
    job = SimpleNamespace(
        data=SimpleNamespace(steps_per_epoch=LENGTH), tokenizer=None, total_steps=TOTAL, plan=SimpleNamespace(rank=0)
    )
    args = train_arguments.TrainArguments(max_steps=TOTAL)
    callbacks = Callbacks([seen], args, job, engine=engine, scheduler=None, data_offset=offset)
    assert (callbacks.state.epoch, callbacks.state.num_train_epochs) == (0, count)
    for step in range(offset, TOTAL):
        callbacks.step_begin(step)
        callbacks.step_end(step + 1, 10)
    assert seen.epochs == epochs
    assert callbacks.state.epoch == (TOTAL - offset) / LENGTH


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_begins_it(monkeypatch):
    """As in Trainer: whoever measures an epoch's time from on_epoch_begin has it in this process, too."""
    monkeypatch.setattr(Callbacks, "_agree", lambda self: None)
    seen, engine = Seen(), SimpleNamespace(module=None, optimizer=None, global_steps=1)
    job = SimpleNamespace(
        data=SimpleNamespace(steps_per_epoch=LENGTH), tokenizer=None, total_steps=TOTAL, plan=SimpleNamespace(rank=0)
    )
    callbacks = Callbacks([seen], train_arguments.TrainArguments(), job, engine=engine, scheduler=None)
    for step in (1, 2, 3):
        callbacks.step_begin(step)
        callbacks.step_end(step + 1, 10)
    callbacks.train_end()  # a callback has ended it
    assert seen.epochs == [("begin", 1, 1 / 3), ("end", 3, 1), ("begin", 3, 1), ("end", 4, 4 / 3)]


@pytest.mark.parametrize("max_steps", [0, 7])
def test_how_many_steps_data_that_begin_anew_make(monkeypatch, max_steps):
    """Whole epochs of them; --max_steps counts from the run's beginning."""
    job = Job({}, None, 0, None, None, SimpleNamespace(steps_per_epoch=LENGTH), max_steps or 2 * LENGTH, [], [], [])
    args = train_arguments.TrainArguments(max_steps=max_steps, num_train_epochs=2, ignore_data_skip=True)
    reader = SimpleNamespace(manifest=SimpleNamespace(step=4, client_state={"data": {"seed": 0}, "data_offset": 1}))
    monkeypatch.setattr(train_checkpoints, "describe_data", lambda args, job: {"seed": seed, "order": SHUFFLED})
    seed = 7
    assert count_from_the_data(args, job, reader).total_steps == (max_steps or 4 + 2 * LENGTH)
    seed = 0  # the run after that one
    assert count_from_the_data(args, job, reader).total_steps == (max_steps or 1 + 2 * LENGTH)
    assert count_from_the_data(args, job, None).total_steps == (max_steps or 2 * LENGTH)


@pytest.mark.parametrize(("offset", "steps"), [(0, [3, 6]), (2, [5, 8]), (3, [6])])
def test_when_it_evaluates_and_saves(tmp_path, offset, steps):
    """The checkpoint that the run goes on from is no end of an epoch of the new data."""
    args = train_arguments.TrainArguments(output_dir=str(tmp_path), eval_strategy="epoch", save_strategy="epoch")
    data = SimpleNamespace(steps_per_epoch=LENGTH, micro_batch_size=1, micro_batches_per_slice=1, identity=dict)
    job = SimpleNamespace(data=data, total_steps=TOTAL, plan=SimpleNamespace(rank=0, slices=1))
    job.rows = SimpleNamespace(stops=[], template=SimpleNamespace(text="{instruction}"))
    checkpoints = Checkpoints(args, job, None, None)
    checkpoints.data_offset = offset
    found = SimpleNamespace(best=make_best(args, None))
    evaluation = Evaluation(args, None, SimpleNamespace(best=lambda found: None), found, LENGTH, offset)
    assert [step for step in range(max(1, offset), TOTAL) if evaluation.due(step, TOTAL)] == steps
    assert [step for step in range(offset + 1, TOTAL + 1) if checkpoints.due(step)] == [*steps, TOTAL]
    assert not evaluation.missed(offset, TOTAL)


@pytest.mark.parametrize(
    ("rows", "line"), [(8, None), (11, "an epoch: 2 steps of 4 samples; 3 more fill no whole step")]
)
def test_rows_that_fill_no_whole_step_are_told(rows, line):
    """They are the same ones in every epoch, so they are never trained on."""
    dataset = datasets.Dataset.from_dict({"input_ids": [[n] * 3 for n in range(rows)], "labels": [[1] * 3] * rows})
    batches = SliceBatches(
        dataset, slices=2, micro_batches_per_slice=1, micro_batch_size=2, pad_token_id=0, seed=1, flat=False
    )
    told = tell_rows(Rows(SimpleNamespace(dataset=dataset), None, None), batches)
    assert [text.startswith(str(line)) for text in told] == ([True] if line else [])
    seen = [{row["input_ids"][0] for s in (0, 1) for (row,) in batches.units(step, s, 0)} for step in range(4)]
    assert seen[:2] == seen[2:]
    assert len(seen[0] | seen[1]) == 8
