"""Tiny models of every family, and what one process does with all of them; runs inside `ranks.run_ranks`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from engine_runs import whole_weights
from tiny import ds_settings, tiny_batch

SLICES, R, STEPS, LR = 2, 2, 2, 1e-3

COMMON = {
    "vocab_size": 61, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_experts": 4}
# name: (model_type, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "gemma2": (
        "gemma2",
        {"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 4, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 10, "query_pre_attn_scalar": 10, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_inner": 28, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 12}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 10}),
}
DENSE = [name for name in FAMILIES if not name.endswith(("moe", "mixtral"))]
PACKED = [name for name in FAMILIES if name not in DENSE]
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make_family(name: str, **changes: Any) -> Any:
    """A tiny random model of the family, fp32, with weights large enough to be learned from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **COMMON | settings | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **PLAIN)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    return model


def plain_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers alone makes of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **PLAIN)


def last_logits(model: Any) -> torch.Tensor:
    """Of a fixed batch."""
    with torch.no_grad():
        return model(**tiny_batch(999, 0, 0)).logits.float().clone()


def train_families(root: str) -> dict[str, dict[str, Any]]:
    """Each family loaded from its folder, trained with the default targets, exported; all in this process."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hdpissa").addHandler(handler)
    found = {}
    for name in FAMILIES:  # all of them before the first engine: what is built beside one is sharded, too
        make_family(name).save_pretrained(Path(root) / name / "base")
    for name in FAMILIES:
        said.clear()
        found[name] = train_family(Path(root) / name) | {"said": list(said)}
    return found


def train_family(folder: Path) -> dict[str, Any]:
    from hdpissa.engine import initialize, load_pretrained

    settings = ds_settings(slices=SLICES, accumulation=SLICES, r=R)
    engine = initialize(model=load_pretrained(str(folder / "base"), settings, **PLAIN), config=settings)
    losses = []
    for step in range(STEPS):
        engine.optimizer.param_groups[0]["lr"] = LR
        for slice_id, micro in engine.plan.schedule(engine.gradient_accumulation_steps()):
            engine.backward(engine(**tiny_batch(step, slice_id, micro)).loss)
            result = engine.step()
        losses.append(result.loss)
    logits = last_logits(engine.eval())
    engine.export(folder / "model")
    if any(t.transposed for t in engine.targets):
        engine.export(folder / "adapter", format="peft")
        engine.save_checkpoint(folder, "checkpoint-2")
        engine.save_checkpoint(folder, "small", kind="small")
    return {"losses": losses, "weights": whole_weights(engine), "logits": logits}
