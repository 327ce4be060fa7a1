"""The only file that imports DeepSpeed: nothing else imports it or touches a `ds_*` attribute.

What ZeRO-3 does to frozen weights that change, and what is done about it here:

* Without any trainable parameter DeepSpeed builds no stage-3 optimizer, its `backward` fails and
  gathered copies stay behind, stale. One trainable *anchor* element, outside the graph, removes the
  special case (`wrap`).
* Persistent (small) parameters and interrupted forwards leave gathered copies that an update of the
  shard does not reach: `release_gathered` drops them all before the shard is written.
* Gathers run on a private stream that never waits for the compute stream: `fence` after the update.
* Padding of the last shards is uninitialised memory: `shard_view` cuts it off.
* Under hpZ each host keeps a second copy, of which it gathers, and which for frozen weights is never renewed:
  who gets a shard may write it, so `shard_view` drops that copy. The next gather is of the shards.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    # Spares every process the detection and its warning; has to be set before the first import.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import groups

from ..config import leaf_modules
from ..distributed import heartbeat, rank_status
from ..distributed.launcher import Launch, read_launch
from ..errors import ConfigError

# DeepSpeed 0.19 still calls torch.distributed's older names; users who read the warning cannot fix it.
warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning)
# DeepSpeed prints its whole config and more at INFO; a run's own lines would drown in it.
logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())

ANCHOR = "_hdpissa_anchor"


def read_launcher() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the process group if there is one, else from the launcher's environment.

    (0, 1, 0) for a plain process.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0))
    launch = read_launch(os.environ)
    return launch.rank, launch.world_size, _device_index(launch)


def _device_index(launch: Launch) -> int:
    """The local rank, which is also the number of the GPU."""
    count = 0 if get_accelerator().device_name() == "cpu" else get_accelerator().device_count()
    if count == 1 and launch.launcher == "srun":
        return 0  # with --gpus-per-task each task is shown one GPU, its own
    if 0 < count <= launch.local_rank:
        raise ConfigError(
            f"{launch.launcher}: local rank {launch.local_rank}, but this host shows {count} GPUs; start at most one "
            f"process per GPU"
        )
    return launch.local_rank


def init_distributed(timeout_s: float | None = None) -> None:
    """Starts the default process group (NCCL on GPUs, gloo on CPU) unless one exists already.

    Args:
        timeout_s: of every collective in every group; None is DeepSpeed's default (10 minutes, DEEPSPEED_TIMEOUT).
    """
    prepare_environment()
    if dist.is_initialized() and timeout_s is None:  # its creator has set the time-out
        deepspeed.init_distributed(verbose=False)
        return
    timeout = default_pg_timeout if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    # DeepSpeed gathers in a group of its own, to which it gives no time-out: torch's default of 30 minutes would hold.
    TorchBackend.new_group = lambda self, ranks: dist.new_group(ranks, timeout=timeout)
    deepspeed.init_distributed(verbose=False, timeout=timeout)


def prepare_environment() -> None:
    """Sets what the process group needs, whoever creates it and whatever launched this process."""
    if not dist.is_initialized():
        launch = read_launch(os.environ)
        _set_environment(launch)
        _share_cores(launch.local_world_size)
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this op of inference here, for a minute. On a GPU the look alone starts compilers.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        get_accelerator().set_device(int(os.environ.setdefault("LOCAL_RANK", "0")))


def _set_environment(launch: Launch) -> None:
    """Sets the variables that torch, DeepSpeed and transformers read, whatever launched this process."""
    port = launch.master_port or rank_status.free_port()
    where = {"MASTER_ADDR": launch.master_addr or "127.0.0.1", "MASTER_PORT": str(port)}
    local = {"LOCAL_RANK": str(_device_index(launch)), "LOCAL_WORLD_SIZE": str(launch.local_world_size)}
    os.environ.update(where, RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), **local)
    # A collective that overruns the time-out ends the process; 0 would let it hang for ever.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    if launch.local_world_size < launch.world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Left alone, gloo takes the interface that the host's own name stands for, which often is the loopback one.
        name = rank_status.interface_of(rank_status.own_address(where["MASTER_ADDR"]))
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def connect_ranks(timeout_s: float, hang_s: float) -> rank_status.RankGroup:
    """Starts the status servers by which ranks report which of them is lost or hangs; collective."""
    several = int(os.environ["LOCAL_WORLD_SIZE"]) < dist.get_world_size()
    address = rank_status.own_address(os.environ["MASTER_ADDR"]) if several else "127.0.0.1"
    return rank_status.RankGroup.connect(address, timeout_s, hang_s)


def wait_for_all_ranks() -> None:
    """Waits until every rank has reached the end of the run: one that exits earlier looks lost to the others."""
    heartbeat.beat("end")
    barrier()


def barrier() -> None:
    """Waits for all ranks."""
    dist.barrier()


def shut_down() -> None:
    """Ends the process group, so that nothing complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _share_cores(local_world_size: int) -> None:
    """Splits the cores among the processes of a node; the deepspeed launcher does not."""
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_world_size))


def device() -> torch.device:
    """The device this rank computes on."""
    return torch.device(get_accelerator().current_device_name())


def to_device(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch on the device this rank computes on; what is no tensor (a length) stays as it is."""
    return {name: value.to(device()) if isinstance(value, Tensor) else value for name, value in batch.items()}


def accelerator_name() -> str:
    """The name of the device, for `run.json`."""
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


@contextmanager
def building_without_broadcast() -> Iterator[None]:
    """Within it zero.Init shards each rank's own memory, uninitialised as it is, instead of rank 0's.

    For models whose values are read from files afterwards: DeepSpeed would first send all of the model's
    bytes from rank 0 to everybody, and receivers that lag behind would hold them in memory.
    """
    original = deepspeed.comm.broadcast
    deepspeed.comm.broadcast = lambda *args, **kwargs: None
    try:
        yield
    finally:
        deepspeed.comm.broadcast = original


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


def _make_anchor(ds_config: dict) -> nn.Module:
    """The one trainable element that keeps DeepSpeed on its ordinary path.

    It is never part of the graph, so its gradient is zero and AdamW without weight decay leaves it alone.
    """
    # the group of hpZ, which DeepSpeed would make anew here and refuses to
    group = groups._get_zero_param_intra_parallel_group()
    with deepspeed.zero.Init(config_dict_or_path=ds_config, zero_param_parallel_group=group):
        return nn.Linear(1, 1, bias=False)


def wrap(model: nn.Module, ds_config: dict) -> Any:
    """`deepspeed.initialize` over the model; returns DeepSpeed's engine.

    Where nothing else is trainable the anchor is in the model while DeepSpeed looks for parameters, and no longer:
    whoever lists the model's afterwards (an export, TRL's weight sync) finds the base model's names and no other.
    """
    for module in model.modules():  # an earlier engine's, which would go on gathering in backward, by its own order
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            vars(module).pop(name, None)
    trainable = [p for p in model.parameters() if p.requires_grad]
    config = leaf_modules.fill(ds_config, model, full_numel)
    if trainable:
        return deepspeed.initialize(model=model, model_parameters=trainable, config=config)[0]
    anchor = _make_anchor(ds_config)
    model.add_module(ANCHOR, anchor)
    try:
        return deepspeed.initialize(model=model, model_parameters=list(anchor.parameters()), config=config)[0]
    finally:
        delattr(model, ANCHOR)


# --- what DeepSpeed trains -------------------------------------------------------------------------


def begin_adam(engine: Any) -> None:
    """Makes the AdamW state that torch would make in the first step, so that it can be saved and restored before."""
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        moments = {name: torch.zeros_like(flat, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        engine.optimizer.optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}


def set_adam_step(engine: Any, updates: int) -> None:
    """AdamW's t."""
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(updates)


def set_lr(engine: Any, lr: float) -> None:
    """The learning rate of DeepSpeed's own optimizer."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def trained_state(param: nn.Parameter, key: str | None = None) -> Tensor:
    """This rank's exact fp32 elements of a parameter that DeepSpeed trains, in place; or of a moment of it."""
    if key is None:
        found = deepspeed.utils.safe_get_local_fp32_param(param)
    else:
        found = deepspeed.utils.safe_get_local_optimizer_state(param, key)
    return found.detach()[: shard_view(param).numel()]


def trained_grad(param: nn.Parameter) -> Tensor:
    """The averaged gradient of this rank's elements, fp32, since the last step."""
    return deepspeed.utils.safe_get_local_grad(param)[: shard_view(param).numel()]


def drop_trained_grads(engine: Any) -> None:
    """Zeros: DeepSpeed overwrites gradients, and those of a parameter that a step does not use would stay."""
    engine.optimizer.grad_partitions_flat_buffer.zero_()


# --- shards ---------------------------------------------------------------------------------------


def full_shape(param: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, sharded or not."""
    return getattr(param, "ds_shape", param.shape)


def full_numel(param: nn.Parameter) -> int:
    """Elements of the whole parameter, sharded or not."""
    return full_shape(param).numel()


def shard_view(param: nn.Parameter) -> Tensor:
    """This rank's real elements of the parameter, in place, without the padding. For use between gathers.

    Raises:
        RuntimeError: the shard is not the plain, world-wide, resident one this project relies on.
    """
    shard = param.ds_tensor  # type: ignore[attr-defined]
    if hasattr(shard, "ds_quant_scale") or shard.numel() != shard.ds_numel:
        raise RuntimeError(f"unexpected ZeRO-3 shard: {shard.numel()} of {shard.ds_numel} elements, quantised or away")
    if dist.get_world_size(param.ds_process_group) != dist.get_world_size():  # type: ignore[attr-defined]
        raise RuntimeError("a parameter is sharded over a part of the world only")
    drop_second_copy(param)
    start = dist.get_rank() * shard.ds_numel
    valid = max(0, min(shard.ds_numel, param.ds_numel - start))  # type: ignore[attr-defined]
    return shard.data[:valid]


def drop_second_copy(param: nn.Parameter) -> None:
    """Drops what hpZ would gather in place of the shards; it is made anew when the weight has been gathered."""
    param.ds_secondary_tensor = None  # type: ignore[attr-defined]


def shard_getter(param: nn.Parameter) -> Callable[[], Tensor]:
    """A function that looks the shard up at every use."""
    return lambda: shard_view(param)


def whole_value(param: nn.Parameter) -> Tensor:
    """The whole parameter in fp32 on every rank: of one that DeepSpeed trains its exact copy, else W as it is gathered;
    collective."""
    if param.requires_grad:
        return deepspeed.utils.safe_get_full_fp32_param(param).detach().view(full_shape(param))
    with deepspeed.zero.GatheredParameters([param]):
        return param.data.float().clone()


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
