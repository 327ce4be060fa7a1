"""What the plan's tests share: shapes of known models, and what ranks do to measure what a plan predicts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny import build

# hidden, kv heads, intermediate, layers, heads, vocabulary, tied
SHAPES = {
    "SmolLM2-135M": (576, 3, 1536, 30, 9, 49152, True),
    "Qwen2.5-0.5B": (896, 2, 4864, 24, 14, 151936, True),
    "Qwen2.5-7B": (3584, 4, 18944, 28, 28, 152064, False),
    "Llama-2-7B": (4096, 32, 11008, 32, 32, 32000, False),
    "Llama-3-70B": (8192, 8, 28672, 80, 64, 128256, False),
}


def shape_config(name: str) -> dict:
    hidden, kv, ff, layers, heads, vocabulary, tied = SHAPES[name]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "num_key_value_heads": kv, "intermediate_size": ff, "num_hidden_layers": layers,
        "num_attention_heads": heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
    }  # fmt: skip


def write_configs(folder: Path) -> Path:
    """A config.json for each of them, by its name."""
    for name in SHAPES:
        (folder / f"{name}.json").write_text(json.dumps(shape_config(name)))
    return folder


def measure(settings: list[tuple[dict, bool]], model: dict, length: int) -> list[dict[str, Any]]:
    """For each (DeepSpeed config, checkpointing): persistent bytes, bytes of a step, and ZeRO-3's gathers."""
    return [measure_one(config, model, checkpointing, length) for config, checkpointing in settings]


def measure_one(config: dict, model: dict, checkpointing: bool, length: int) -> dict[str, Any]:
    from deepspeed.utils import groups

    from hdpissa.engine import initialize

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's group of the case before, which DeepSpeed keeps for good
    net = build(model)
    if checkpointing:
        net.activation_checkpointing_enable({"use_reentrant": False})
    engine = initialize(model=net, config=config)
    copies = count_second_copies()
    ids = torch.zeros(config["train_micro_batch_size_per_gpu"], length, dtype=torch.long)
    seen = Gathers(engine)
    for _ in range(3):  # DeepSpeed records the order of modules in the first, and follows it from the third on
        seen.start()
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            result = engine.step()
    seen.stop()
    return {
        "copies": copies[-1],
        "memory": engine.memory_bytes(),
        "bytes_sent": result.bytes_sent,
        "gathered": seen.gathered,
        "first": seen.first,
        "again": seen.again,
        "again_of_copies": seen.again_of_copies,
        "peak": seen.peak,
    }


def count_second_copies() -> list[int]:
    """A list that every update adds to: bytes of all second copies (hpZ) before it changes the first weight."""
    from hdpissa.engine.sharding import zero3

    found, release = [], zero3.release_gathered

    def count(ds: Any) -> None:
        release(ds)
        copies = [getattr(p, "ds_secondary_tensor", None) for p in ds.module.parameters()]
        found.append(sum(copy.nbytes for copy in copies if copy is not None))

    zero3.release_gathered = count
    return found


def memory_of_pretrained(folder: str, config: dict) -> dict[str, int]:
    """Singular vectors are not looked at here, so none are computed: half a minute."""
    from hdpissa.engine import initialize, load_pretrained

    torch.linalg.eigh = lambda M: torch.return_types.linalg_eigh((M.new_zeros(len(M)), torch.eye(len(M)).to(M)))
    config["hd_pissa"]["init"] = {"method": "gram", "tol": 1e9}
    return initialize(model=load_pretrained(folder, config), config=config).memory_bytes()


def measure_dpo(model: str, folder: str, zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What HDPissaDPOTrainer gathers in a step and holds gathered, in elements; and the bytes of its reference."""
    import datasets
    import trainer_runs
    from transformers import TrainerCallback

    from hdpissa.launch import trainers

    trainer_runs.prepare_trl(folder)
    rows = datasets.load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train", cache_dir=f"{folder}/cache")
    settings = {"max_steps": 3, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": True}
    settings |= {"per_device_train_batch_size": 2, "gradient_checkpointing": False, **more}
    ds = trainer_runs.config() | {"zero_optimization": {"stage": 3, **zero}}
    args = trainers.HDPissaDPOConfig(folder, deepspeed=ds, **settings)
    trainer = trainers.HDPissaDPOTrainer(model=model, args=args, train_dataset=rows)
    reference, seen = trainer.ref_model, {}

    class EachStep(TrainerCallback):  # DeepSpeed records the order of modules in the first, and follows it later
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not seen and reference is not None:
                seen["reference"] = Gathers(SimpleNamespace(module=reference.module, ds=reference))
            if "policy" not in seen:
                seen["policy"] = Gathers(trainer.engine)
            for each in seen.values():
                each.start()

    trainer.add_callback(EachStep())
    trainer.train()
    held = [p.ds_tensor.nbytes for p in reference.module.parameters()] if reference is not None else []
    return {"shards": sum(held)} | {name: (each.peak, each.gathered) for name, each in seen.items()}


class Gathers:
    """Elements that ZeRO-3 gathers in micro-batches, those of them that it gathers of the shards of all ranks, those
    that it gathers after an update (`again`), and the most that it holds at a time; looks into DeepSpeed."""

    def __init__(self, engine: Any) -> None:
        from deepspeed.runtime.zero import partition_parameters
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        self.params = [p for n, p in engine.module.named_parameters() if "_hdpissa" not in n]
        self.own = {id(p) for p in self.params}  # beside a reference, say
        self.flying = engine.module.ds_inflight_param_registry
        self.start()
        self.persistent, step = engine.ds.optimizer.persistent_parameters, engine.ds.step
        engine.ds.step = lambda: (self._count_again(), step())
        self._patched = [
            (PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__all_gather_params_", self._gather),
            (partition_parameters.AllGatherCoalescedHandle, "wait", self._wait),
        ]
        self._patched = [(owner, name, getattr(owner, name), hook) for owner, name, hook in self._patched]
        for owner, name, original, hook in self._patched:
            setattr(owner, name, self._wrap(original, hook))

    @staticmethod
    def _wrap(original, hook):
        return lambda *args, **kwargs: hook(original, *args, **kwargs)

    def start(self) -> None:
        self.gathered = self.first = self.peak = self.again = self.again_of_copies = 0

    def stop(self) -> None:
        for owner, name, original, _ in self._patched:
            setattr(owner, name, original)

    def _gather(self, original, coordinator, params, *args, **kwargs):
        missing = [p for p in params if p.ds_status.name == "NOT_AVAILABLE" and id(p) in self.own]
        self.gathered += sum(p.ds_numel for p in missing)
        self.first += sum(p.ds_numel for p in missing if p.ds_secondary_tensor is None)
        result = original(coordinator, params, *args, **kwargs)
        self._look()
        return result

    def _count_again(self) -> None:
        """What is kept gathered and is not there after an update: DeepSpeed gathers it in its step, in one go."""
        missing = [p for p in self.persistent if p.ds_status.name == "NOT_AVAILABLE"]
        copied = [p for p in missing if p.ds_secondary_tensor is not None]
        self.again += sum(p.ds_numel for p in missing)
        self.again_of_copies += sum(p.ds_numel for p in copied)

    def _wait(self, original, handle, *args, **kwargs):
        result = original(handle, *args, **kwargs)
        self._look()
        return result

    def _look(self) -> None:
        """Every storage that holds gathered elements, once: of parameters, and of buffers that several arrive in."""
        tensors = [p.data for p in self.params if p.ds_status.name != "NOT_AVAILABLE" and p.data.numel()]
        for handle in set(self.flying.values()):
            for part in getattr(handle, "handles", [handle]):
                tensors += getattr(part, "partitions", None) or []
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in tensors}
        self.peak = max(self.peak, sum(held.values()))
