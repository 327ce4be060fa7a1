"""Epochs are those of the data, also of data that began in the middle of a run (--ignore_data_skip)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from hdpissa.launch import train_arguments
from hdpissa.launch.train_callbacks import Callbacks
from hdpissa.launch.train_checkpoints import Checkpoints
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
        (2, [("begin", 2, 0), ("end", 5, 1), ("begin", 5, 1), ("end", 8, 2), ("begin", 8, 2)], 3),
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


@pytest.mark.parametrize(("offset", "steps"), [(0, [3, 6]), (2, [5, 8]), (3, [6])])
def test_when_it_evaluates_and_saves(tmp_path, offset, steps):
    """The checkpoint that the run goes on from is no end of an epoch of the new data."""
    args = train_arguments.TrainArguments(output_dir=str(tmp_path), eval_strategy="epoch", save_strategy="epoch")
    data = SimpleNamespace(steps_per_epoch=LENGTH, micro_batch_size=1, micro_batches_per_slice=1, identity=dict)
    job = SimpleNamespace(data=data, total_steps=TOTAL, plan=SimpleNamespace(rank=0, slices=1))
    checkpoints = Checkpoints(args, job, None, None)
    checkpoints.data_offset = offset
    found = SimpleNamespace(best=make_best(args, None))
    evaluation = Evaluation(args, None, SimpleNamespace(best=lambda found: None), found, LENGTH, offset)
    assert [step for step in range(max(1, offset), TOTAL) if evaluation.due(step, TOTAL)] == steps
    assert [step for step in range(offset + 1, TOTAL + 1) if checkpoints.due(step)] == [*steps, TOTAL]
    assert not evaluation.missed(offset, TOTAL)
