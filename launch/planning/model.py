"""What the plan must know of a model, found without weights: shapes, targets, widths, FLOPs per token.

The model is built on the meta device from its config.json, so that every architecture with plain Linears works, and
its targets are found by the engine's own `find_targets`.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.common import hub
from hdpissa.launch.planning.model_work import products, size

ATTENTION = "hdpissa_plan"  # see plan_trace


@dataclass(frozen=True)
class Model:
    """A model without weights.

    Attributes:
        module: on the meta device, in the compute dtype. family: its class.
        hidden, heads_width, kv_width, ff, layers, vocabulary: widths in elements; heads_width and kv_width are the
            outputs of q_proj and k_proj. 0 where the config has no such thing.
    """

    module: Any
    family: str
    hidden: int
    heads_width: int
    kv_width: int
    ff: int
    layers: int
    vocabulary: int
    checkpointing: bool

    @property
    def parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(p.numel() for p in self.module.parameters())


def read_config(name: str, trust_remote_code: bool) -> Any:
    """The model's configuration: of a folder, a config.json, or a hub name.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoConfig

    option, path = "--model_name_or_path", Path(os.path.expanduser(name))
    hub.check_model(option, name)
    source, remedy = str(path) if path.exists() else name, "give a Hugging Face folder, config.json or name"
    return hub.reading(
        option, name, lambda: AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code), remedy
    )


def build(config: Any, name: str, *, trust_remote_code: bool, bf16: bool, reward: bool = False) -> Model:
    """The model on the meta device; of a reward model one number per sequence stands in place of the logits.

    Raises:
        ConfigError: it is no causal language model.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification

    from hdpissa.launch.planning import trace as plan_trace

    config, kind = copy.deepcopy(config), AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if reward:
        config.num_labels, config.pad_token_id = 1, config.pad_token_id or 0  # as RewardTrainer has them
    AttentionInterface.register(ATTENTION, plan_trace.attention)
    options = {"trust_remote_code": trust_remote_code, "dtype": torch.bfloat16 if bf16 else torch.float32}
    try:
        with torch.device("meta"):
            try:
                module = kind.from_config(copy.deepcopy(config), attn_implementation=ATTENTION, **options)
            except (ValueError, ImportError, KeyError):  # an architecture with an attention of its own
                module = kind.from_config(copy.deepcopy(config), **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"--model_name_or_path {name}: cannot be built ({hub.reason(error)}); give a causal language model"
        ) from None
    module.config.use_cache = False
    return _describe(module)


def _describe(module: Any) -> Model:
    text = module.config.get_text_config() if hasattr(module.config, "get_text_config") else module.config
    hidden = size(text, "hidden_size")
    heads = size(text, "num_attention_heads")
    head_width = size(text, "head_dim") or (hidden // heads if heads else 0)
    return Model(
        module,
        type(module).__name__,
        hidden=hidden,
        heads_width=heads * head_width,
        kv_width=(size(text, "num_key_value_heads") or heads) * head_width,
        ff=size(text, "intermediate_size") or 4 * hidden,
        layers=size(text, "num_hidden_layers"),
        vocabulary=size(text, "vocab_size"),
        checkpointing=bool(getattr(module, "supports_gradient_checkpointing", False)),
    )


@dataclass(frozen=True)
class Work:
    """What one token costs, forward and backward; FLOP, or bytes of device memory.

    Attributes:
        forward: products with all Linears but the head, and with the experts a token meets, 2 per weight.
        head: the same of the output layer.
        attention: of one forward pass, causal; a sequence's mean position sees half of it.
        elementwise: bytes of everything that is no product (norms, activations, residuals, rotations, loss), both
            directions; a third of it belongs to the forward.
        low_rank, low_rank_flops: bytes that the slices read on top, and FLOP of their thin products.
    """

    forward: float
    head: float
    attention: float
    elementwise: float
    low_rank: float
    low_rank_flops: float

    def floor_flops(self, *, recompute: bool, passes: int = 0) -> float:
        """Forward and input gradient: 4 per weight. Flash attention's backward costs 2.5 forwards.

        Args:
            passes: forward passes without gradient beside.
        """
        again = self.forward + self.attention if recompute else 0.0
        beside = passes * (self.forward + self.head + self.attention)
        return 2 * (self.forward + self.head) + 3.5 * self.attention + again + beside

    def floor_bytes(self, *, recompute: bool, passes: int = 0) -> float:
        """Element-wise traffic; the forward's third once more when it is recomputed, and per pass beside."""
        return self.elementwise * (3 + recompute + passes) / 3

    @property
    def useful_flops(self) -> float:
        """What MFU(4N) counts: no weight gradient, nothing that is computed twice."""
        return 2 * (self.forward + self.head) + 3 * self.attention


def work_per_token(model: Model, targets: list, length: int, *, inputs: int | None = None, width: int = 2) -> Work:
    """The work of a token in a sequence of `length`.

    The element-wise traffic per layer is 36 hidden, 12 kv and 9 ff elements, plus 3 of the vocabulary. A slice reads
    x twice (x Aᵀ, gradient of A), Linears with the same x together, and dy once. Its products are x Aᵀ, dY B,
    (dY B)ᵀ X and dYᵀ (X Aᵀ).

    Args:
        inputs: elements of the different inputs that the targets read; default: each its own.
        width: bytes of an activation element.
    """
    linears, head = products(model.module)
    layers = model.layers
    elements = layers * (36 * model.hidden + 12 * model.kv_width + 9 * model.ff) + 3 * model.vocabulary
    read = sum(len(t.modules) * t.cols for t in targets) if inputs is None else inputs
    factors = 2 * read + sum(len(t.modules) * t.rows for t in targets)
    return Work(
        forward=2.0 * linears,
        head=2.0 * head,
        attention=2.0 * length * model.heads_width * layers,
        elementwise=float(width * elements),
        low_rank=float(width * factors),
        low_rank_flops=float(sum(4 * t.r * (t.rows + t.cols) * len(t.modules) for t in targets)),
    )
