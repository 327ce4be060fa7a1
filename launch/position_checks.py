"""Rows that are longer than what a model knows of positions.

A table of positions ends: a token beyond it is an IndexError in the first forward pass that meets it, on a GPU an
assertion that names nothing. Rotary positions go on, only the model has not been trained there.
"""

from __future__ import annotations

from typing import Any

from hdpissa.engine.errors import ConfigError
from hdpissa.launch.model_work import size

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


def trained_length(config: Any) -> int:
    """Positions that the model was trained on, as its configuration says; 0 where it says nothing."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    factor, before = rope.get("factor"), rope.get("original_max_position_embeddings")
    stretched = int(factor * before) if factor and before else 0
    return max(size(text, "max_position_embeddings"), stretched)


def longest_row(part: Any) -> int:
    """Tokens of the longest row that is kept; packed rows begin anew, so it is the longest of them, too."""
    return max(map(len, part.dataset["input_ids"]), default=0)


def check_positions(args: Any, model: Any, rows: Any, questions: Any = ()) -> str | None:
    """Refuses rows, and answers, that run over the end of the model's table.

    Args:
        rows: of the run; `train` and `held_out`. questions: that the model is to answer.

    Returns: a note, where a model without a table was not trained on rows as long; else None.
    """
    there = [("rows", rows.train), ("evaluation rows", rows.held_out)]
    lengths = {what: longest_row(part) for what, part in there if hasattr(part, "dataset")}
    if "rows" not in lengths:  # a stream: they are cut there, and nobody knows whether they come that long
        lengths["streamed rows"] = args.max_length
    table = table_size(model)
    if table is None:
        return _beyond_training(lengths, trained_length(model.config))
    for what, longest in lengths.items():
        if longest > table:
            raise ConfigError(
                f"--max_length is {args.max_length} and {what} have up to {longest} tokens: {type(model).__name__} has "
                f"{table} positions; give --max_length {table}"
            )
    asked = max((len(question.ids) for question in questions), default=0)
    room = table - asked + 1  # the last token of an answer is not read any more
    if asked and args.max_new_tokens > room:
        remedy = f"give --max_new_tokens {room}, or shorter prompts" if room > 0 else "give shorter prompts"
        raise ConfigError(
            f"--max_new_tokens is {args.max_new_tokens} and a prompt has {asked} tokens: {type(model).__name__} has "
            f"{table} positions; {remedy}"
        )
    return None


def _beyond_training(lengths: dict[str, int], known: int) -> str | None:
    what, longest = max(lengths.items(), key=lambda item: item[1])
    if not known or longest <= known:
        return None
    return f"{what} have up to {longest} tokens, and the model's max_position_embeddings is {known}"
