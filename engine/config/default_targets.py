"""The default of `target_modules`: one list, and the names of model types whose modules are called otherwise.

The names are those of transformers' modelling code: every Linear of a decoder layer, attention and MLP alike, as the
method has it for Llama. Knows no torch: a table, and the rules of when it counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from .section import DEFAULT_TARGETS

_FUSED_ATTENTION = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

# model_type of config.json: what stands for the default list there. Names that a variant lacks do no harm.
BY_MODEL_TYPE: dict[str, tuple[str, ...]] = {
    "bloom": _FUSED_ATTENTION,
    "codegen": ("qkv_proj", "out_proj", "fc_in", "fc_out"),
    "deepseek_v2": (*DEFAULT_TARGETS, "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "deepseek_v3": (*DEFAULT_TARGETS, "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "falcon": _FUSED_ATTENTION,
    "glm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt-sw3": ("c_attn", "c_proj", "c_fc"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_bigcode": ("c_attn", "c_proj", "c_fc"),
    "gpt_neo": ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"),
    "gpt_neox": _FUSED_ATTENTION,
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "lfm2": ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
    "mpt": ("Wqkv", "out_proj", "up_proj", "down_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}


def is_default(targets: Sequence[str] | str) -> bool:
    """Whether `target_modules` is the list that serves many models, written out or not."""
    return not isinstance(targets, str) and tuple(targets) == DEFAULT_TARGETS


def resolve(targets: Sequence[str] | str, model_type: str | None) -> Sequence[str] | str:
    """What `target_modules` means in a model of this type; the default list means the family's own names."""
    return BY_MODEL_TYPE.get(model_type or "", DEFAULT_TARGETS) if is_default(targets) else targets
