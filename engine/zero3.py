"""The only door to DeepSpeed: nothing else imports it or touches a `ds_*` attribute.

What ZeRO-3 does to frozen weights that change, and what is done about it here:

* Without any trainable parameter DeepSpeed builds no stage-3 optimizer, its `backward` fails and
  gathered copies stay behind, stale. One trainable *anchor* element, outside the graph, removes the
  special case (`attach_anchor`).
* Persistent (small) parameters and interrupted forwards leave gathered copies that an update of the
  shard does not reach: `release_gathered` drops them all before the shard is written.
* Gathers run on a private stream that never waits for the compute stream: `fence` after the update.
* Padding of the last shards is uninitialised memory: `shard_view` cuts it off.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    # Spares every process the detection and its warning; has to be set before the first import.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from .errors import ConfigError

# DeepSpeed 0.19 still calls torch.distributed's older names; nobody who reads the warning can mend it.
warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
# DeepSpeed prints its whole config and more at INFO; a run's own lines would drown in it.
logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())

ANCHOR = "_hdpissa_anchor"


def read_launcher() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the process group if there is one, else from deepspeed or torchrun.

    (0, 1, 0) for a plain process.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), local
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local


def init_distributed() -> None:
    """Starts the default process group (NCCL on GPUs, gloo on CPU) unless one exists already."""
    rank, world, local = read_launcher()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world == 1:
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    # DeepSpeed would compile this op here (a minute, and a compiler) although only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if get_accelerator().device_name() == "cpu":
        share_cores(int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world))
    else:
        get_accelerator().set_device(local)
    deepspeed.init_distributed(verbose=False)


def shut_down() -> None:
    """Ends the process group, so that nothing complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_cores(local_world_size: int) -> None:
    """Splits the cores among the processes of a node; the deepspeed launcher does not."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


def to_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the device this rank computes on."""
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def accelerator_name() -> str:
    """What the run is on, in words, for `run.json`."""
    accelerator = get_accelerator()
    return torch.cuda.get_device_name() if accelerator.device_name() == "cuda" else accelerator.device_name()


def peak_memory_bytes() -> int:
    """Peak device memory of this process; peak resident memory on CPU."""
    if get_accelerator().device_name() == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return get_accelerator().max_memory_allocated()


def fence() -> None:
    """Waits for the update kernels: the stream that gathers parameters does not wait for them itself."""
    get_accelerator().synchronize()


def check_zero_section(section: dict) -> None:
    """Lets DeepSpeed's own schema look at `zero_optimization`; ConfigError in place of its traceback."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))} ({e['msg']})" for e in error.errors()]
        raise ConfigError(f"DeepSpeed config: zero_optimization: {'; '.join(problems)}; see DeepSpeed's keys") from None


# --- building the sharded model -------------------------------------------------------------------


def load_pretrained(folder: str, ds_config: dict, *, loader: Any, **kwargs: Any) -> nn.Module:
    """A Hugging Face model whose weights are sharded while they are read.

    Args:
        folder: local folder or hub name.
        ds_config: the final DeepSpeed config; its dtype is the compute dtype.
        loader: an `Auto…` class with `from_pretrained`.

    Raises:
        ConfigError: the files lack weights of the model.
    """
    from transformers.integrations import HfDeepSpeedConfig

    # transformers keeps only a weak reference; it has to be alive during from_pretrained
    alive = HfDeepSpeedConfig(ds_config)
    dtype = compute_dtype(ds_config)
    model, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    if info["missing_keys"]:  # transformers fills them with random numbers and a warning
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]}): they would be "
            f"random numbers; give the complete checkpoint"
        )
    model._hdpissa_ds_config = alive  # generate() asks transformers whether ZeRO-3 is on
    return model


def compute_dtype(ds_config: dict) -> torch.dtype:
    """bf16 when the config enables it, else fp32."""
    section = ds_config.get("bf16") or ds_config.get("bfloat16") or {}
    return torch.bfloat16 if section.get("enabled") else torch.float32


def is_sharded(model: nn.Module) -> bool:
    """Whether the model was built under `zero.Init`."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def shard_module(model: nn.Module, ds_config: dict, keep: dict[nn.Parameter, slice]) -> dict[int, Tensor]:
    """Shards a model that every rank holds whole; rank 0's values win.

    Args:
        keep: parameter → the flat range whose values are wanted before they are rounded.

    Returns: id of the parameter → those values in fp32.
    """
    dtype, target = compute_dtype(ds_config), device()
    kept = {}
    for p in model.parameters():
        p.data = p.data.to(target)
        dist.broadcast(p.data, 0)
        if p in keep:
            kept[id(p)] = p.data.flatten()[keep[p]].float()
        p.data = p.data.to(dtype)
    for b in model.buffers():
        b.data = b.data.to(target)  # and no cast: rotary frequencies stay fp32
    deepspeed.zero.Init(module=model, config_dict_or_path=ds_config)
    return kept


def attach_anchor(model: nn.Module, ds_config: dict) -> None:
    """Adds the one trainable element that keeps DeepSpeed on its ordinary path.

    It is never part of the graph, so its gradient is zero and AdamW without weight decay leaves it alone.
    """
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        anchor = nn.Linear(1, 1, bias=False)
    model.add_module(ANCHOR, anchor)


def wrap(model: nn.Module, ds_config: dict) -> Any:
    """`deepspeed.initialize` over the model; returns DeepSpeed's engine."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trainable, config=ds_config)[0]


def is_anchor(name: str) -> bool:
    """Whether a parameter or module name belongs to the anchor."""
    return ANCHOR in name.split(".")


# --- shards ---------------------------------------------------------------------------------------


def full_shape(param: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, sharded or not."""
    return getattr(param, "ds_shape", param.shape)


def full_numel(param: nn.Parameter) -> int:
    """Elements of the whole parameter, sharded or not."""
    return full_shape(param).numel()


def shard_view(param: nn.Parameter) -> Tensor:
    """This rank's real elements of the parameter, in place, without the padding.

    Raises:
        RuntimeError: the shard is not the plain, world-wide, resident one this project relies on.
    """
    shard = param.ds_tensor  # type: ignore[attr-defined]
    if hasattr(shard, "ds_quant_scale") or shard.numel() != shard.ds_numel:
        raise RuntimeError(f"unexpected ZeRO-3 shard: {shard.numel()} of {shard.ds_numel} elements, quantised or away")
    if dist.get_world_size(param.ds_process_group) != dist.get_world_size():  # type: ignore[attr-defined]
        raise RuntimeError("a parameter is sharded over a part of the world only")
    start = dist.get_rank() * shard.ds_numel
    valid = max(0, min(shard.ds_numel, param.ds_numel - start))  # type: ignore[attr-defined]
    return shard.data[:valid]


def shard_getter(param: nn.Parameter) -> Callable[[], Tensor]:
    """A function that looks the shard up at every use."""
    return lambda: shard_view(param)


def release_gathered(engine: Any) -> None:
    """Drops every gathered copy; raises when a module still holds one. No communication.

    DeepSpeed's own step, later on, would drop them too; but a copy that cannot be dropped has to be noticed
    before the first shard is written.
    """
    engine.optimizer.empty_partition_cache()


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Raises when gradient checkpointing is on in its reentrant form.

    Under ZeRO-3 it leaves every layer gathered and gives frozen layers no factor gradients, in silence.
    """
    for module in model.modules():
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", None) or {}
        if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant", False):
            raise ConfigError(
                "gradient checkpointing has use_reentrant=True: ZeRO-3 with frozen weights needs the "
                'non-reentrant form; call gradient_checkpointing_enable({"use_reentrant": False})'
            )
