"""`HDPissaEngine`: one rank's handle on a run. Composes the parts, owns no mathematics; `api.initialize` makes one."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checkpointing, trained_model
from .checkpoint.manifest import Base
from .checkpoint.writer import Saver
from .directions.decompose import InitReport
from .distributed import faults, heartbeat
from .method.targets import Target
from .optim import nonfinite
from .optim.optimizer import SliceOptimizer, Vote
from .resolved_config import ResolvedConfig
from .results import ExchangePlan, StepResult
from .sharding import zero3

logger = logging.getLogger(__name__)

TALLIES = 4  # numbers of the engine in the vote: loss, tokens, ranks that were asked to stop, ranks with a failed save


class HDPissaEngine:
    """An engine with the names of DeepSpeed's, which it holds (it is not a subclass: DeepSpeed's internals change).

        engine = initialize(model=model, config="ds_configs/zero3.json")
        for batch in batches:             # this rank's micro-batches, in the order of engine.plan.schedule(...)
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()                 # acts at the end of an accumulation, as DeepSpeed's does

    The phases of `step`, what each sends, and what it needs besides the state (G: ranks of an exchange group):

        reduce   ranks that share a slice sum its gradients: an all-reduce of 4 bytes per factor element, in place;
                 nothing where each rank has slices of its own
        vote     one all-reduce of 8 bytes per number (7 or 8 numbers): take the step, or skip it, on all ranks
        apply    per bucket: Adam gives ΔA, ΔB of the own slices, then
                 factor  all-gather of ΔA, (G − 1) · own slices · R · I elements; all-to-all of the rows of ΔB that
                         each shard touches
                 dense   reduce-scatter of the own slices' dense delta, (G − 1) · shard elements
                 and one kernel per weight writes this rank's shard of W. Buffers: at most `delta.bucket_bytes` per
                 bucket, freed before the next; then DeepSpeed steps `modules_to_save`, if any
        finish   counters, `StepResult`, gradients cleared

    `exchange_plan().bytes_per_step` predicts the bytes, `StepResult.bytes_sent` counts them, and both are equal.

    Attributes:
        module: the model, its weights sharded. `optimizer`: a torch Optimizer for schedulers and `lr`.
        config: what `initialize` resolved. plan: slices and ranks. targets: the trained weights.
        init_report: residual of the decomposition. base: checksums of the model before training.
        global_steps, skipped_steps: optimizer steps done, and those of them that changed nothing;
            skipped_in_a_row: those since the last that did. last_step: what the last one reported.
        micro_batches: backward passes since the last step. saver: writes checkpoints.
    """

    def __init__(
        self, ds: Any, optimizer: SliceOptimizer, config: ResolvedConfig, *, report: InitReport, base: Base
    ) -> None:
        self.ds, self.optimizer, self.config, self.plan = ds, optimizer, config, config.plan
        self.init_report, self.base = report, base
        self.saver = Saver(self.plan.rank, self.plan.world_size)
        self.global_steps = self.skipped_steps = self.skipped_in_a_row = 0
        self.last_step: StepResult | None = None
        self.micro_batches = 0
        self._accumulation = config.values.gradient_accumulation_steps
        self._stop_requested = False
        self._boundary: bool | None = None  # None: the accumulation is counted
        self._loss = torch.zeros((), dtype=torch.float64, device=zero3.device())
        self._tokens = torch.zeros((), dtype=torch.float64, device=zero3.device())

    @property
    def module(self) -> nn.Module:
        return self.ds.module

    @property
    def targets(self) -> list[Target]:
        return self.optimizer.store.targets

    # --- forward and backward ------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Micro-batches belong to the slice whose turn it is: `backward` passes the turn on."""
        heartbeat.beat("step.forward" if self.module.training else "eval")
        if self.module.training:
            self.count_tokens(kwargs)
        return self.ds(*args, **kwargs)

    def count_tokens(self, batch: dict[str, Any]) -> None:
        """Adds a micro-batch to `StepResult.tokens`; for callers that run the model themselves and not this engine."""
        self._tokens += _count_tokens(batch)

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> Tensor:
        """Accumulates factor gradients of the slice whose turn it is, and passes the turn on.

        Args:
            loss: of the micro-batch.
            scale_wrt_gas: divide it by the accumulation steps, as DeepSpeed does; False: the caller has.

        Raises:
            RuntimeError: the accumulation is complete and `step` was not called.
        """
        if self.micro_batches == self._accumulation:
            raise RuntimeError(
                f"backward was called {self.micro_batches + 1} times without step(): call step() after each backward"
            )
        if self.micro_batches == 0:
            zero3.refuse_reentrant_checkpointing(self.module)
        heartbeat.beat("step.backward")
        loss = faults.corrupted("loss", loss)
        scaled = self.ds.backward(loss, scale_wrt_gas=scale_wrt_gas)
        self.optimizer.store.end_of_backward()
        whole = loss.detach() if scale_wrt_gas else loss.detach() * self._accumulation
        self._loss += faults.corrupted("loss.value", whole)
        self.micro_batches += 1
        self._pass_turn()
        return scaled

    def _pass_turn(self) -> None:
        """A rank works off its slices one after another; what is recomputed in backward still has the turn."""
        per_slice = self._accumulation // self.plan.slices_per_rank
        self.optimizer.store.active.index = min(self.micro_batches, self._accumulation - 1) // per_slice

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` acts."""
        return self.micro_batches == self._accumulation if self._boundary is None else self._boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Sets, until the next step, whether `step` acts, as in DeepSpeed: an accumulation may end early.

        The loss of a shorter one is divided by the caller (`scale_wrt_gas=False`).
        """
        self._boundary = is_boundary

    def zero_grad(self) -> None:
        """Drops what was accumulated since the last step."""
        self.optimizer.zero_grad()
        self.micro_batches, self._boundary = 0, None
        self._pass_turn()
        self._loss.zero_()
        self._tokens.zero_()

    # --- the step ------------------------------------------------------------------------------------

    def step(self) -> StepResult | None:
        """One optimizer step at the end of an accumulation; None, and nothing done, before that.

        Raises:
            RuntimeError: in the first step, when a target has got no gradient on any rank; in any, when results
            of an earlier step were not finite (see `check_weights`); when the accumulation ends early and this
            rank's slices would have learned from unequal numbers of micro-batches.
        """
        if not self.is_gradient_accumulation_boundary():
            return None
        self._refuse_unequal_slices()
        if self.global_steps == 0:
            self._refuse_unreached()
        self.optimizer.exchange.reset_count()
        self.optimizer.reduce()
        vote = self._vote()
        if vote.refusal:
            vote = self._skip(vote)
        else:
            self._apply()
        return self._finish(vote)

    def _refuse_unequal_slices(self) -> None:
        if self.micro_batches < self._accumulation and self.plan.slices_per_rank > 1:
            raise RuntimeError(
                f"a step after {self.micro_batches} of {self._accumulation} micro-batches: {self.plan.slices_per_rank} "
                f"slices take turns on this rank and some would get none; drop the incomplete accumulation"
            )

    def _refuse_unreached(self) -> None:
        """A weight that gets no gradient anywhere would be left out in silence for the whole run."""
        names, modules = self.optimizer.store.unreached(), self.optimizer.modules_to_save
        trained = {t.name: t.name in names for t in self.targets}
        if modules is not None:
            trained |= dict(zip(modules.params, modules.unreached(), strict=True))
        missing = torch.tensor([float(silent) for silent in trained.values()], device=zero3.device())
        dist.all_reduce(missing)
        silent = [name for name, n in zip(trained, missing.tolist(), strict=True) if n == self.plan.world_size]
        if silent:
            raise RuntimeError(
                f"{len(silent)} of {len(trained)} targets got no gradient in the first step (first: {silent[0]}): "
                "the loss does not depend on them, or checkpointing is reentrant; exclude them or fix the model"
            )

    def _vote(self) -> Vote:
        mean_loss = self._loss / (self._accumulation * self.plan.world_size)
        # filled on the device: a tensor made of a list would be copied there, and the host wait for it
        flags = [self._loss.new_full((), flag) for flag in (self._stop_requested, self.saver.failed)]
        return self.optimizer.vote(torch.stack([mean_loss, self._tokens, *flags]))

    def _apply(self) -> None:
        zero3.release_gathered(self.ds)
        self.optimizer.step()
        zero3.fence()
        self.ds.step()
        self.skipped_in_a_row = 0

    def _skip(self, vote: Vote) -> Vote:
        """The vote with the place that went wrong in its refusal; collective."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        modules = self.optimizer.modules_to_save.nonfinite() if self.optimizer.modules_to_save else ()
        where = nonfinite.locate(self.optimizer.store, self.module, self._loss, modules)
        vote = replace(vote, refusal=vote.refusal + where)
        if self.plan.rank == 0:
            logger.warning("step %d is skipped: %s", self.global_steps + 1, vote.refusal)
        self.ds.optimizer.zero_grad()
        return vote

    def _finish(self, vote: Vote) -> StepResult:
        self.global_steps += 1
        exchange = self.optimizer.exchange
        result = StepResult(
            step=self.global_steps,
            applied=not vote.refusal,
            refusal=vote.refusal,
            loss=vote.tallies[0],
            grad_norm=vote.grad_norm,
            learning_rate=self.get_lr()[0],
            tokens=int(vote.tallies[1]),
            bytes_sent=exchange.bytes_sent,
            collectives=exchange.collectives,
            interrupted=vote.tallies[2] > 0,
            failed_save=checkpointing.finish_failed_save(self) if vote.tallies[3] else "",
        )
        self.zero_grad()
        self.last_step = result
        if result.interrupted:
            self._stop_requested = False  # every rank knows by now
        return result

    def request_stop(self) -> None:
        """Asks all ranks to stop: the next `StepResult.interrupted` is true everywhere. For signal handlers."""
        self._stop_requested = True

    def restart(self) -> None:
        """Begins another run on the weights as they are: step 0, fresh moments, the same directions.

        The running sums stay: they hold how far W is from the base model.
        """
        self.optimizer.restart()
        self.zero_grad()
        self.set_progress(0, 0, 0)

    def set_progress(self, steps: int, skipped: int, skipped_in_a_row: int) -> None:
        """Sets the counters, when another run begins or one is resumed."""
        self.global_steps, self.skipped_steps, self.skipped_in_a_row = steps, skipped, skipped_in_a_row
        self.last_step = None

    # --- names of DeepSpeed's engine -----------------------------------------------------------------

    def train(self, mode: bool = True) -> HDPissaEngine:
        self.ds.train(mode)
        return self

    def eval(self) -> HDPissaEngine:
        return self.train(False)

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_global_grad_norm(self) -> float | None:
        """`StepResult.grad_norm` of the last step; None before the first."""
        return None if self.last_step is None else self.last_step.grad_norm

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.ds.train_micro_batch_size_per_gpu()

    # --- checkpoints and results: functions of the engine, in the modules named ----------------------

    save_checkpoint = checkpointing.save_checkpoint
    wait_for_checkpoint = checkpointing.wait_for_checkpoint
    load_checkpoint = checkpointing.load_checkpoint
    resume_from = checkpointing.resume_from
    export = trained_model.export
    generate = trained_model.generate

    # --- figures -------------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """Raises RuntimeError on all ranks when a step had results that were not finite; collective.

        Such results are never written, but W is not what the method says without them. `step` notices those of
        earlier steps by itself; this looks at the last one, too. `export` calls it.
        """
        self.optimizer.check_weights()

    def exchange_plan(self) -> ExchangePlan:
        """How the update travels, and what that costs per step."""
        kinds = [t.kind for t in self.targets]
        return ExchangePlan(
            factor_targets=kinds.count("factor"),
            dense_targets=kinds.count("dense"),
            buckets=len(self.optimizer.store.buckets),
            collectives=self.optimizer.collectives,
            bytes_per_step=self.optimizer.predicted_bytes(TALLIES),
        )

    def memory_bytes(self) -> dict[str, int]:
        """This rank's bytes: weights (all ZeRO-3 shards), master, factors, slice state (gradients, moments, sums)

        and `buffers`, which a step allocates at most in addition and frees again.
        """
        params = list(self.module.parameters())
        store, modules = self.optimizer.store, self.optimizer.modules_to_save
        return {
            "weights": sum(zero3.shard_view(p).nbytes for p in params),
            "master": sum(t.shard.nbytes for t in self.targets if t.shard is not None),
            "factors": store.nbytes_factors,
            "slice_state": store.nbytes_state,
            "buffers": self.optimizer.buffer_bytes,
        } | ({} if modules is None else {"modules_to_save": modules.nbytes})


def _count_tokens(batch: dict[str, Any]) -> Tensor | int:
    """Input tokens of a micro-batch: the attention mask's ones; without a mask all that is no padding, else all ids.

    Packed rows have no mask. Their padding is rows of one token, real rows have more, so a position 0 that no 1
    follows is padding.
    """
    mask, ids, positions = (batch.get(name) for name in ("attention_mask", "input_ids", "position_ids"))
    if mask is not None:
        return mask.sum()
    if ids is None:
        return 0
    if positions is None:
        return ids.numel()
    following = torch.cat([positions[:, 1:], torch.zeros_like(positions[:, :1])], dim=1)
    return ((positions != 0) | (following == 1)).sum()
