"""How many positions a model has: a token beyond its table is an IndexError, on GPUs an assertion without a name."""

from __future__ import annotations

from typing import Any

# Names of position tables in transformers, learned (GPT-2, OPT, GPT, BERT's kin) or computed once (GPT-J, CTRL).
TABLES = ("wpe", "embed_positions", "positions_embed", "position_embeddings", "position_embedding", "pos_encoding")


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
