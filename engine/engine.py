"""`HDPissaEngine`: composes the parts, owns no mathematics. `build.initialize` makes one.

    engine = initialize(model=model, config="ds_configs/zero3.json")
    for batch in batches:                 # a rank's micro-batches, in the order of engine.plan.schedule(...)
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()                     # acts at the end of an accumulation, like DeepSpeed's

DeepSpeed's engine is held, not subclassed: four public methods of it are used, and its internals change often.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import directory
from .checkpoint import state as checkpoint
from .checkpoint.format import Base, CheckpointReader, Kind
from .checkpoint.writer import Job, SaveError, Saver
from .config.section import HDPissaConfig
from .directions import decompose
from .distributed import faults, heartbeat
from .errors import ConfigError
from .export import hf as export
from .export import peft_export
from .export.report import ExportReport
from .method.targets import Target
from .optim import nonfinite
from .optim.optimizer import SliceOptimizer, Vote
from .results import ExchangePlan, StepResult
from .sharding import zero3
from .sharding.slicing import SlicePlan

logger = logging.getLogger(__name__)

TALLIES = 4  # numbers of the engine in the vote: loss, tokens, ranks that were asked to stop, ranks with a failed save


class HDPissaEngine:
    """One rank's handle on an HD-PiSSA run; made by `initialize`.

    Attributes:
        module: the model, its weights sharded. `optimizer`: a torch Optimizer for schedulers and `lr`.
        plan: slices and ranks. targets: the trained weights. init_report: residual of the decomposition.
        global_steps, skipped_steps: optimizer steps done, and those of them that changed nothing;
            skipped_in_a_row: those since the last that did. last_step: what the last one reported.
    """

    def __init__(
        self,
        ds: Any,
        optimizer: SliceOptimizer,
        plan: SlicePlan,
        *,
        config: tuple[dict, HDPissaConfig],
        accumulation: int,
        report: decompose.InitReport,
        base: Base,
    ) -> None:
        self.ds, self.optimizer, self.plan = ds, optimizer, plan
        self.init_report, self.base = report, base
        self.config = config  # what `initialize` made it from: DeepSpeed's, and the section
        self._saver, self._stop_requested = Saver(plan.rank, plan.world_size), False
        self.global_steps = self.skipped_steps = self.skipped_in_a_row = 0
        self._accumulation = accumulation
        self._per_slice = accumulation // plan.slices_per_rank
        self.last_step: StepResult | None = None
        self._micro = 0  # backward passes since the last step
        self._boundary: bool | None = None  # None: the accumulation is counted
        self._loss = torch.zeros((), dtype=torch.float64, device=zero3.device())
        self._tokens = torch.zeros((), dtype=torch.float64, device=zero3.device())

    # --- what DeepSpeed's users know -----------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        return self.ds.module

    @property
    def targets(self) -> list[Target]:
        return self.optimizer.store.targets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. Micro-batches belong to the slice whose turn it is: `backward` passes the turn on."""
        heartbeat.reach("step.forward" if self.module.training else "eval")
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
        if self._micro == self._accumulation:
            raise RuntimeError(
                f"backward was called {self._micro + 1} times without step(): call step() after each backward"
            )
        if self._micro == 0:
            zero3.refuse_reentrant_checkpointing(self.module)
        heartbeat.reach("step.backward")
        loss = faults.spoilt("loss", loss)
        scaled = self.ds.backward(loss, scale_wrt_gas=scale_wrt_gas)
        self.optimizer.store.end_of_backward()
        whole = loss.detach() if scale_wrt_gas else loss.detach() * self._accumulation
        self._loss += faults.spoilt("loss.value", whole)
        self._micro += 1
        self._pass_turn()
        return scaled

    def _pass_turn(self) -> None:
        """A rank works off its slices one after another; what is recomputed in backward still has the turn."""
        self.optimizer.store.active.index = min(self._micro, self._accumulation - 1) // self._per_slice

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step` acts."""
        return self._micro == self._accumulation if self._boundary is None else self._boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Says, until the next step, whether `step` acts, as in DeepSpeed: an accumulation may end early.

        The loss of a shorter one is divided by the caller (`scale_wrt_gas=False`).
        """
        self._boundary = is_boundary

    def step(self) -> StepResult | None:
        """One optimizer step at the end of an accumulation; None, and nothing done, before that.

        Raises:
            RuntimeError: in the first step, when a target has got no gradient on any rank; in any, when results
            of an earlier step were not finite (see `check_weights`); when the accumulation ends early and this
            rank's slices would have learned from unequal numbers of micro-batches.
        """
        if not self.is_gradient_accumulation_boundary():
            return None
        if self._micro < self._accumulation and self.plan.slices_per_rank > 1:
            raise RuntimeError(
                f"a step after {self._micro} of {self._accumulation} micro-batches: {self.plan.slices_per_rank} slices "
                f"take turns on this rank and some would get none; drop the incomplete accumulation"
            )
        if self.global_steps == 0:
            self._refuse_unreached()
        self.optimizer.exchange.reset_count()
        self.optimizer.reduce()
        vote = self._vote()
        if not vote.refusal:
            zero3.release_gathered(self.ds)
            self.optimizer.step()
            zero3.fence()
            self.ds.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            beside = self.optimizer.beside.bad() if self.optimizer.beside else ()
            where = nonfinite.locate(self.optimizer.store, self.module, self._loss, beside)
            vote = replace(vote, refusal=vote.refusal + where)
            if self.plan.rank == 0:
                logger.warning("step %d is skipped: %s", self.global_steps + 1, vote.refusal)
            self.ds.optimizer.zero_grad()
        return self._finish(vote)

    def _vote(self) -> Vote:
        mean_loss = self._loss / (self._accumulation * self.plan.world_size)
        # filled on the device: a tensor made of a list would be copied there, and the host wait for it
        flags = [self._loss.new_full((), flag) for flag in (self._stop_requested, self._saver.failed)]
        return self.optimizer.vote(torch.stack([mean_loss, self._tokens, *flags]))

    def _refuse_unreached(self) -> None:
        """A weight that gets no gradient anywhere would be left out in silence for the whole run."""
        names = self.optimizer.store.unreached()
        trained = {t.name: t.name in names for t in self.targets} | self._beside_unreached()
        missing = torch.tensor([float(silent) for silent in trained.values()], device=zero3.device())
        dist.all_reduce(missing)
        silent = [name for name, n in zip(trained, missing.tolist(), strict=True) if n == self.plan.world_size]
        if silent:
            raise RuntimeError(
                f"{len(silent)} of {len(trained)} targets got no gradient in the first step (first: {silent[0]}): "
                "the loss does not depend on them, or checkpointing is reentrant; exclude them or mend the model"
            )

    def _beside_unreached(self) -> dict[str, bool]:
        beside = self.optimizer.beside
        return {} if beside is None else dict(zip(beside.params, beside.unreached(), strict=True))

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
            failed_save=self._end_failed_save() if vote.tallies[3] else "",
        )
        self.zero_grad()
        self.last_step = result
        if result.interrupted:
            self._stop_requested = False  # it has been told
        return result

    def get_global_grad_norm(self) -> float | None:
        """`StepResult.grad_norm` of the last step; None before the first."""
        return None if self.last_step is None else self.last_step.grad_norm

    def _end_failed_save(self) -> str:
        """All ranks come here together: one that does not know of the failure yet is about to learn of it."""
        try:
            self._saver.wait()
        except SaveError as error:
            return str(error)
        return ""

    def request_stop(self) -> None:
        """Asks all ranks to stop: the next `StepResult.interrupted` is true everywhere. For signal handlers."""
        self._stop_requested = True

    def zero_grad(self) -> None:
        """Drops what was accumulated since the last step."""
        self.optimizer.zero_grad()
        self._micro, self._boundary = 0, None
        self._pass_turn()
        self._loss.zero_()
        self._tokens.zero_()

    def restart(self) -> None:
        """Begins another run on the weights as they are: step 0, fresh moments, the same directions.

        The running sums stay: they say how far W is from the base model.
        """
        self.optimizer.restart()
        self.zero_grad()
        self.global_steps = self.skipped_steps = self.skipped_in_a_row = 0
        self.last_step = None

    def train(self, mode: bool = True) -> HDPissaEngine:
        self.ds.train(mode)
        return self

    def eval(self) -> HDPissaEngine:
        return self.train(False)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """`module.generate`; all ranks must call it together, because each forward gathers weights."""
        kwargs.setdefault("synced_gpus", self.plan.world_size > 1)  # a rank that has finished goes on gathering
        heartbeat.reach("generate")
        with torch.no_grad():
            return self.module.generate(*args, **kwargs)  # type: ignore[operator]

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.ds.train_micro_batch_size_per_gpu()

    # --- checkpoints ---------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        *,
        kind: Kind = "full",
        async_save: bool = False,
        save_total_limit: int | None = None,
        best: bool = False,
        extra_files: Mapping[str, str] | None = None,
    ) -> Path:
        """Saves the run as `save_dir`/`tag` and points `save_dir`/latest to it; collective, between two steps.

        Args:
            tag: default "checkpoint-N" after N steps.
            client_state: JSON-serialisable; `load_checkpoint` returns it.
            kind: "full", exact; or "small", without weights (see `checkpoint`).
            async_save: returns when the state is copied to host memory. A failure then shows in
                `StepResult.failed_save`, or is raised by `wait_for_checkpoint`; call that before the end.
            save_total_limit: how many `checkpoint-N` to keep; None: all.
            best: it is the best so far: `save_dir`/best names it, and it is kept whatever the limit.
            extra_files: name (`….json`) → text of files that belong to the checkpoint; rank 0's are written.

        Raises:
            SaveError: on all ranks alike; earlier checkpoints are intact.
            RuntimeError: gradients are accumulated that a checkpoint would lose.
        """
        if self._micro:
            raise RuntimeError(f"save_checkpoint after {self._micro} micro-batches: save right after a step")
        heartbeat.reach("save", slow=True)
        self.check_weights()
        folder = Path(save_dir) / directory.check_tag(tag or f"checkpoint-{self.global_steps}")
        store, residual = self.optimizer.store, None
        if kind == "small" and not checkpoint.sums_are_exact(self.optimizer):
            residual = peft_export.measure_sums(self.module, store, updates=self.optimizer.updates)[0]
        files = checkpoint.own_files(kind, self.optimizer, extra_files or {})
        manifest = checkpoint.make_manifest(
            kind,
            self.optimizer,
            self.base,
            steps=(self.global_steps, self.skipped_steps, self.skipped_in_a_row),
            report=self.init_report,
            residual=residual.overall if residual else None,
            client_state=client_state or {},
            extra_files=list(extra_files or ()),
        )
        self._saver.save(Job(folder, files, manifest, save_total_limit, best), background=async_save)
        heartbeat.reach("saved")
        return folder

    def wait_for_checkpoint(self) -> None:
        """Until no checkpoint is being saved; raises SaveError when one has failed."""
        heartbeat.reach("save.wait", slow=True)
        self._saver.wait()
        heartbeat.reach("saved")

    def load_checkpoint(self, load_dir: str | Path, tag: str | None = None) -> tuple[Path, dict[str, Any]]:
        """Goes on where a checkpoint was saved, at any number of ranks; collective. Nothing changes if it cannot.

        Args:
            load_dir: a checkpoint, or the folder of several: then `tag`, or what `latest` names.

        Returns: (the checkpoint's folder, its client_state).

        Raises:
            CheckpointError: on all ranks alike: damaged, or of another run.
        """
        reader = self.resume_from(Path(load_dir) / directory.check_tag(tag) if tag else Path(load_dir))
        return reader.folder, reader.manifest.client_state

    def resume_from(self, source: CheckpointReader | str | Path) -> CheckpointReader:
        """`load_checkpoint` of a folder, or of a checkpoint that was opened before; the reader, closed."""
        if failed := self._end_failed_save():  # what is being saved is read until then
            logger.warning("%s", failed)
        reader = source if isinstance(source, CheckpointReader) else checkpoint.open_checkpoint(source)
        store = self.optimizer.store
        beside = self.optimizer.beside.numels if self.optimizer.beside else {}
        checkpoint.refuse_others(reader, store, self.optimizer.rule, self.base, beside)
        checkpoint.refuse_changed(reader, self.optimizer)
        self.init_report = checkpoint.fill_factors(reader, store, self.optimizer.exchange)
        self.restore(reader)
        return reader

    def restore(self, reader: CheckpointReader) -> None:
        """Takes the state of a checkpoint that fits and whose factors are in place; collective."""
        zero3.release_gathered(self.ds)
        checkpoint.restore(reader, self.optimizer)
        zero3.fence()
        self.zero_grad()
        manifest = reader.manifest
        self.global_steps, self.skipped_steps = manifest.step, manifest.skipped_steps
        self.skipped_in_a_row = manifest.skipped_in_a_row
        self.last_step = None
        self._saver.adopt(reader.folder, manifest.files)
        reader.close()

    # --- results -------------------------------------------------------------------------------------

    def export(
        self, folder: str | Path, *, format: str = "hf", dtype: str = "auto", rank: int | None = None
    ) -> ExportReport:
        """Writes the trained model and verifies what was written; collective.

        Args:
            format: "hf", a Hugging Face folder, or "peft", a LoRA adapter for the unmodified base.
            dtype: "bf16", "fp32" (targets exact), or "auto": the compute dtype, of an adapter fp32.
            rank: of an adapter, cuts it to at most this rank; None for all of it, 2·r·S.
        """
        if format not in ("hf", "peft"):
            raise ConfigError(f"export format is {format!r}: must be 'hf' or 'peft'")
        if format == "hf" and rank is not None:
            raise ConfigError(f"export rank is {rank} with format 'hf': only an adapter has a rank; leave it out")
        self.check_weights()
        step = self.global_steps
        if format == "hf":
            return export.export_hf(self.module, self.targets, self.plan, Path(folder), dtype=dtype, step=step)
        peft_export.refuse_beside(self.optimizer.beside.params if self.optimizer.beside else ())
        store, updates = self.optimizer.store, self.optimizer.updates
        return peft_export.export_peft(
            self.module, store, Path(folder), dtype=dtype, rank=rank, step=step, updates=updates
        )

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

        and `buffers`, which a step allocates at most beside these and frees again.
        """
        params = list(self.module.parameters())
        store = self.optimizer.store
        return {
            "weights": sum(zero3.shard_view(p).nbytes for p in params),
            "master": sum(t.shard.nbytes for t in self.targets if t.shard is not None),
            "factors": store.nbytes_factors,
            "slice_state": store.nbytes_state,
            "buffers": self.optimizer.buffer_bytes,
        } | ({} if self.optimizer.beside is None else {"modules_to_save": self.optimizer.beside.nbytes})


def _count_tokens(batch: dict[str, Any]) -> Tensor | int:
    """Input tokens of a micro-batch: the attention mask's ones; of packed rows what is no padding; else all ids.

    Packed rows have no mask. Their padding is rows of one token (`data_packing.collate_packed`), real rows have more,
    so a position 0 that no 1 follows is padding.
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
