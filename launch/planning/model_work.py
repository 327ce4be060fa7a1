"""How many weights a token is multiplied with: what the plan forecasts with, and what a run's MFU counts.

Counted on a model of empty (meta) weights. Embeddings are looked up, not multiplied with; the output layer is, also
where it shares its weight with the embedding; of a layer's experts a token meets those that the router gives it.
"""

from __future__ import annotations

from typing import Any

# Names of position tables in transformers, learned (GPT-2, OPT, GPT, BERT's kin) or computed once (GPT-J, CTRL).
TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings", "position_embedding", "pos_encoding")


def products(module: Any) -> tuple[float, int]:
    """(weights that a token is multiplied with, but for the head; the head's)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = module.get_output_embeddings()
    head = output.weight.numel() if isinstance(output, nn.Linear) else 0
    always, experts = 0, sum(p.numel() for p in module.parameters() if p.dim() == 3)  # stacked ones
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer is not output:
            if "experts" in name.split("."):  # one by one, as models with code of their own have them
                experts += layer.weight.numel()
            else:
                always += layer.weight.numel()
    return always + experts * _share_of_experts(module.config), head


def active_weights(module: Any) -> int:
    """All of them."""
    return round(sum(products(module)))


def _share_of_experts(config: Any) -> float:
    """The part of a layer's experts that a token meets."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = size(text, "num_experts_per_tok")
    there = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := size(text, key))), 0)
    return chosen / there if chosen and there else 1.0


def size(config: Any, name: str) -> int:
    """A whole number of a configuration; 0 where it has none of that name."""
    value = getattr(config, name, None)
    return value if type(value) is int else 0


def table_size(model: Any) -> int | None:
    """Positions that the model's table has; None where it has no table.

    Args:
        model: its weights may be empty (meta).
    """
    from torch import nn

    text = model.get_decoder() if hasattr(model, "get_decoder") else model  # a vision tower counts patches
    found = [
        m.num_embeddings - getattr(m, "offset", 0) - (0 if m.padding_idx is None else m.padding_idx + 1)
        for name, m in text.named_modules()
        if isinstance(m, nn.Embedding) and name.rpartition(".")[2] in TABLES
    ]
    tables = [t for name, t in text.named_buffers() if name.rpartition(".")[2] in TABLES and t.dim() == 2]
    return min([*found, *(len(table) for table in tables)], default=None)
