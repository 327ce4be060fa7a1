"""The methods that the comparison scripts set side by side, behind one interface, all on DeepSpeed ZeRO-3.

    method = build("hd_pissa", Setting(model="path/or/name", slices=8, accumulation=8))
    for batch in micro_batches:
        loss = method.micro_step(batch)
    method.step(lr=2e-5)

`hd_pissa` is our engine; `lora` and `pissa` are stock PEFT, `full` is every weight, all three with DeepSpeed's AdamW
without weight decay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdpissa.engine import initialize, load_pretrained, zero3
from hdpissa.engine.config import DEFAULT_TARGETS
from hdpissa.engine.errors import ConfigError

METHODS = ("hd_pissa", "lora", "pissa", "full")


@dataclass(frozen=True)
class Setting:
    """What a method is built with.

    Attributes:
        model: Hugging Face folder or hub name. dtype: "fp32" or "bf16", of compute.
        r: of a slice or an adapter; lora_alpha is r. slices: None is one per rank.
        micro_batch: rows of a micro-batch. accumulation: micro-batches of a rank per optimizer step.
        seed: of an adapter's random initialisation.
    """

    model: str
    dtype: str = "fp32"
    r: int = 16
    slices: int | None = None
    lr: float = 2e-5
    micro_batch: int = 1
    accumulation: int = 1
    seed: int = 0

    def ds_config(self) -> dict[str, Any]:
        """DeepSpeed's config, the same for all methods."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "bf16": {"enabled": self.dtype == "bf16"},
            "zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0},
            "log_level": "warning",
        }


class Method:
    """One process's handle on a method; `build` makes it."""

    def __init__(self, name: str, ds: Any, setting: Setting) -> None:
        self.name, self.setting, self._ds = name, setting, ds
        self._seconds = dict.fromkeys(("forward", "backward", "apply"), 0.0)
        self._last = dict(self._seconds)

    def micro_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward and backward of a micro-batch; its mean loss on this rank, detached."""
        batch = zero3.to_device(batch)
        start = time.perf_counter()
        loss = self._ds(**batch).loss
        zero3.fence()
        middle = time.perf_counter()
        self._ds.backward(loss)
        zero3.fence()
        self._seconds["forward"] += middle - start
        self._seconds["backward"] += time.perf_counter() - middle
        self._after_backward()
        return loss.detach()

    def _after_backward(self) -> None:
        """Nothing, where the step comes after the last micro-batch."""

    def step(self, lr: float | None = None) -> None:
        """The optimizer step after `accumulation` micro-batches, at the learning rate given or the one of before."""
        for group in self._ds.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        start = time.perf_counter()
        self._apply()
        zero3.fence()
        self._last = {**self._seconds, "apply": time.perf_counter() - start}
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    def _apply(self) -> None:
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss of a batch in evaluation mode; changes nothing."""
        self._ds.eval()
        with torch.no_grad():
            found = self._ds(**zero3.to_device(batch)).loss
        self._ds.train()
        return found.detach()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the base model, whole trained weight in effect, fp32 on the CPU); collective."""
        raise NotImplementedError

    def phases(self) -> dict[str, float]:
        """Seconds of the last optimizer step by phase."""
        return dict(self._last)


class SliceMethod(Method):
    """Our engine."""

    def _apply(self) -> None:
        result = self._ds.step()
        assert result is not None, "fewer micro-batches than setting.accumulation"
        if not result.applied:
            raise FloatingPointError(f"{self.name}: {result.refusal}")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for target in self._ds.targets:
            owned = target.own_range(self._ds.plan)
            exact = target.shard.read(0, owned.numel)
            yield f"{target.name}.weight", _whole(exact, target.shard_size, (target.rows, target.cols))


class StockMethod(Method):
    """What DeepSpeed trains by itself: adapters, or every weight."""

    _taken = 0

    def _after_backward(self) -> None:
        self._taken += 1
        if self._taken < self.setting.accumulation:  # DeepSpeed counts calls of step, too
            self._ds.step()

    def _apply(self) -> None:
        assert self._taken == self.setting.accumulation, "another number of micro-batches than setting.accumulation"
        self._ds.step()
        self._taken = 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.name == "full":
            yield from ((name, _gather(p)) for name, p in self._ds.module.named_parameters())
            return
        for name, module in self._ds.module.named_modules():
            if hasattr(module, "base_layer"):
                A_RI, B_OR = (_gather(part["default"].weight) for part in (module.lora_A, module.lora_B))
                merged = _gather(module.base_layer.weight) + module.scaling["default"] * (B_OR @ A_RI)
                yield name.removeprefix("base_model.model.") + ".weight", merged


def _gather(param: nn.Parameter) -> Tensor:
    shape = zero3.full_shape(param)
    return _whole(zero3.shard_view(param).detach(), -(-shape.numel() // dist.get_world_size()), tuple(shape))


def _whole(own: Tensor, size: int, shape: tuple[int, ...]) -> Tensor:
    """All ranks' ranges put together."""
    padded = own.new_zeros(size, dtype=torch.float32)
    padded[: own.numel()] = own.float()
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    numel = 1
    for n in shape:
        numel *= n
    return torch.cat(parts)[:numel].view(shape).cpu()


def build(name: str, setting: Setting) -> Method:
    """The method over a freshly loaded model; collective."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is none of {', '.join(METHODS)}; give one of these")
    zero3.init_distributed()
    torch.manual_seed(setting.seed)
    if name == "hd_pissa":
        slices = "auto" if setting.slices is None else setting.slices
        config = {**setting.ds_config(), "hd_pissa": {"r": setting.r, "slices": slices}}
        model = load_pretrained(setting.model, config)
        model.config.use_cache = False
        return SliceMethod(name, initialize(model=model, config=config, lr=setting.lr), setting)
    return StockMethod(name, _stock(name, setting), setting)


def _stock(name: str, setting: Setting) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of a method built before; PEFT initialises whole weights
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    model.config.use_cache = False
    if name != "full":
        from peft import LoraConfig, get_peft_model

        how = {"r": setting.r, "lora_alpha": setting.r, "init_lora_weights": "pissa" if name == "pissa" else True}
        model = get_peft_model(model, LoraConfig(target_modules=list(DEFAULT_TARGETS), lora_dropout=0.0, **how))
    adam = {"lr": setting.lr, "weight_decay": 0.0, "torch_adam": not torch.cuda.is_available()}
    config = {**setting.ds_config(), "optimizer": {"type": "AdamW", "params": adam}}
    config["zero_optimization"] |= {"reduce_bucket_size": 50_000_000}
    model.train()
    return zero3.wrap(model, config)
