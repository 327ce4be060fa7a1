"""The methods under DeepSpeed ZeRO-3: our engine, and what DeepSpeed trains by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hdpissa.benchmarks.step import method_models, plain_engine
from hdpissa.benchmarks.step.method_base import DTYPES, Method, Setting
from hdpissa.engine.config import ds_config
from hdpissa.engine.config.section import DEFAULT_TARGETS
from hdpissa.engine.method import adapt
from hdpissa.engine.sharding import zero3
from hdpissa.launch.common import shipped_configs

CONFIGS = shipped_configs.FOLDER
# Elements of the buffer that DeepSpeed reduces gradients in; its default of 500 million is 2 GB in fp32. The engine has
# the smaller one in its own config.
REDUCED_AT_LEAST, REDUCED_AT_MOST = 10_000, 50_000_000


def zero_config(setting: Setting) -> dict[str, Any]:
    """DeepSpeed's config of all methods: ZeRO-3 as the project's own configs have it, "auto" left to DeepSpeed.

    The CPU config saves memory by forgetting every weight after its use, and so gathers all of them twice per
    micro-batch; here DeepSpeed's own reuse distance counts, as on GPUs, unless `setting.zero` says otherwise.
    """
    file = "zero3.json" if torch.cuda.is_available() else "zero3_cpu.json"
    zero = ds_config.read_ds_config(CONFIGS / file)["zero_optimization"]
    zero.pop("stage3_max_reuse_distance", None)
    return {
        "train_micro_batch_size_per_gpu": setting.micro_batch,
        "gradient_accumulation_steps": setting.accumulation,
        "bf16": {"enabled": setting.dtype == "bf16"},
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"} | setting.zero,
        "log_level": "warning",
    }


def reduce_bucket(net: nn.Module) -> int:
    """A buffer as large as what is trained, within the limits: memory that a method does not need is not its own."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return min(max(trained, REDUCED_AT_LEAST), REDUCED_AT_MOST)


class Slices(Method):
    """hd_pissa: the engine as it ships. A shape's weights have no files, a pretrained model is sharded while read."""

    def __init__(self, setting: Setting) -> None:
        from hdpissa.engine import initialize, load_pretrained

        super().__init__("hd_pissa", setting)
        section = {"r": setting.r, "slices": "auto" if setting.slices is None else setting.slices}
        config = zero_config(setting) | {"hd_pissa": section}
        if method_models.is_shape(setting.model):
            net = method_models.whole_model(setting, DTYPES[setting.dtype])
        else:
            method_models.config_of(setting.model, setting.layers)  # refuses a wrong name in one line
            fewer = {} if setting.layers is None else {"num_hidden_layers": setting.layers}
            net = load_pretrained(setting.model, config, attn_implementation=setting.attention, **fewer)
        method_models.prepare(net, setting, input_grads=True)
        with plain_engine.random_slices() if setting.random_slices else nullcontext():
            self.engine = initialize(model=net, config=config, lr=setting.lr)

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.engine(**batch).loss

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def _step(self) -> None:
        result = self.engine.step()
        assert result is not None
        if not result.applied:
            raise RuntimeError(f"hd_pissa: the step was refused: {result.refusal}")
        self.exchange_bytes = result.bytes_sent

    def _groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        world = dist.get_world_size()
        for target in self.engine.targets:
            assert target.shard is not None
            own = target.own_range(self.engine.plan).numel
            padded = torch.zeros(target.shard_size, device=zero3.device())
            padded[:own] = target.shard.read(0, own)
            every = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(every, padded)
            numel = target.rows * target.cols
            yield f"{target.name}.weight", torch.cat(every)[:numel].view(target.rows, target.cols).cpu()


class Stock(Method):
    """lora, pissa, full and frozen: DeepSpeed's own stage-3 optimizer over torch's AdamW."""

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        # PiSSA takes its singular vectors from the numbers that the files have; sharding rounds them afterwards
        dtype = torch.float32 if name == "pissa" else DTYPES[setting.dtype]
        net = method_models.whole_model(setting, dtype)
        method_models.prepare(net, setting, input_grads=name != "full")
        if name == "full":
            net.requires_grad_(True)
        elif name == "frozen":
            adapt.freeze(net)
        else:
            net = with_adapters(net, setting, "pissa" if name == "pissa" else "lora")
        config = zero_config(setting)
        config["zero_optimization"] |= {"reduce_bucket_size": reduce_bucket(net)}
        adam = {"lr": setting.lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
        # torch's: DeepSpeed's FusedAdam would be compiled at start
        config["optimizer"] = {"type": "AdamW", "params": adam | {"torch_adam": True, "fused": True}}
        zero3.shard_module(net, config, {})
        self.ds = zero3.wrap(net, config)
        self.ds.train()

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.ds(**batch).loss

    def _backward(self, loss: Tensor) -> None:
        self.ds.backward(loss)
        if self._taken + 1 < self.setting.accumulation:
            self.ds.step()  # counts the micro-batch, and acts only at the last one

    def _step(self) -> None:
        self.ds.step()

    def _groups(self) -> list[dict[str, Any]]:
        return self.ds.optimizer.param_groups

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self.ds.module.named_modules():
            if isinstance(module, LoraLayer):
                layers = (module.get_base_layer(), module.lora_A["default"], module.lora_B["default"])
                W, A, B = (zero3.whole_value(adapt.matrix(layer)) for layer in layers)
                merged = W + module.scaling["default"] * (B @ A)
                yield f"{name.removeprefix('base_model.model.')}.weight", merged.cpu()
            elif isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in DEFAULT_TARGETS:
                yield f"{name}.weight", zero3.whole_value(adapt.matrix(module)).cpu()


def with_adapters(net: nn.Module, setting: Setting, kind: str) -> nn.Module:
    """Stock PEFT on the same Linears that hd_pissa trains; adapters in the compute dtype, as DeepSpeed needs them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.r,
        lora_alpha=setting.r,
        target_modules=list(DEFAULT_TARGETS),
        lora_dropout=0.0,
        init_lora_weights=setting.pissa if kind == "pissa" else True,  # type: ignore[arg-type]
    )
    torch.manual_seed(setting.seed)
    return get_peft_model(net, config, autocast_adapter_dtype=False).train()  # type: ignore[arg-type]
