"""The models of the comparison scripts: pretrained folders, or random weights in the shape of a known model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdpissa.benchmarks.step.method_base import Setting
from hdpissa.engine.errors import ConfigError
from hdpissa.engine.sharding import zero3

# hidden, intermediate, layers, heads, key and value heads, vocabulary, tied embeddings: Llama's architecture with the
# sizes of the models' own config.json files (0.5b and 1.5b are Qwen2.5's).
Sizes = tuple[int, int, int, int, int, int, bool]
SHAPES: dict[str, Sizes] = {
    "tiny": (96, 192, 3, 4, 2, 512, False),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, False),
}
# Standard deviation of a product's random weights times the root of its inputs; torch's own default is 0.58.
SPREAD = 0.6


def is_shape(model: str) -> bool:
    """Whether it names random weights."""
    return model in SHAPES


def llama_config(sizes: Sizes) -> Any:
    """The transformers config of a shape."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads, kv, vocabulary, tied = sizes
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        use_cache=False,
    )


def config_of(model: str, layers: int | None = None) -> Any:
    """The transformers config of a model, without its weights.

    Raises:
        ConfigError: no shape, and no usable config.json at that folder or name; or it has fewer layers.
    """
    from hdpissa.launch.planning.model import read_config

    if is_shape(model):
        config = llama_config(SHAPES[model])
    else:
        try:
            config = read_config(model, False)
        except ConfigError as error:
            raise ConfigError(f"{error}, or one of {', '.join(SHAPES)}") from None
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise ConfigError(f"--layers {layers}: {model} has {config.num_hidden_layers}; give at most as many")
        cut_layers(config, layers)
    return config


def cut_layers(config: Any, layers: int) -> None:
    """Keeps the first decoder layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def whole_model(setting: Setting, dtype: torch.dtype) -> nn.Module:
    """The model whole, on this process's device; the same numbers in every process."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of a method built before: it would shard this one
    config = config_of(setting.model, setting.layers)
    if is_shape(setting.model):
        return random_model(config, dtype, zero3.device(), attention=setting.attention, seed=setting.seed)
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": setting.attention}
    net: Any = AutoModelForCausalLM.from_pretrained(setting.model, config=config, **how)
    return net.to(zero3.device())


def random_model(
    config: Any, dtype: torch.dtype, device: torch.device, *, attention: str = "sdpa", seed: int = 0
) -> nn.Module:
    """Random weights, made where they are needed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        net = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for p in net.parameters():  # the default is so small that nothing is learned, nor a slice's gradient seen
            if p.dim() == 2:
                p.normal_(std=SPREAD / p.shape[1] ** 0.5)
    return net


def prepare(net: nn.Module, setting: Setting, *, input_grads: bool) -> nn.Module:
    """No cache, training mode, and what is the same for every method."""
    net.config.use_cache = False  # type: ignore[union-attr]
    if setting.checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if input_grads:
        net.enable_input_require_grads()  # type: ignore[operator]
    return net.train()


def name_of(model: str, layers: int | None = None) -> str:
    """The model in a table: a folder's last part."""
    short = model if is_shape(model) or not Path(model).exists() else Path(model).resolve().name
    return short if layers is None else f"{short}, {layers} layers"
