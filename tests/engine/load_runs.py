"""What the ranks of the loading tests do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor


def whole(param: Tensor) -> Tensor:
    """The full tensor of a sharded parameter, by ZeRO-3's own gather."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def load(settings, folder, *, count_reads=False):
    """(parameters and buffers by name, warnings, rows read per tensor, whether transformers' own reader ran)."""
    from hdpissa.engine import load_pretrained
    from hdpissa.engine.sharding import sharded_load

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hdpissa").addHandler(handler)
    rows: dict[str, int] = {}
    original = sharded_load._copy_shard

    def counted(stored, shape, shard):
        class Seen:
            def __getitem__(self, index):
                key = str(tuple(shape))
                rows[key] = max(rows.get(key, 0), index.stop - index.start)
                return stored[index]

        original(Seen(), shape, shard)

    if count_reads:
        sharded_load._copy_shard = counted
    model = load_pretrained(folder, settings)
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_input_embeddings().weight]
    values = {n: whole(p) for n, p in model.named_parameters()}
    values |= {n: b.clone() for n, b in model.named_buffers()}
    return {
        "values": values if dist.get_rank() == 0 else None,
        "warnings": messages,
        "rows": rows,
        "tied": tied,
        "training": model.training,
        "generation": model.generation_config.to_diff_dict(),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
    }


def refused(settings, folder):
    """The message of the refusal; {rank} in `folder` is the rank."""
    from hdpissa.engine import ConfigError, load_pretrained
    from hdpissa.engine.sharding import zero3

    zero3.init_distributed()
    try:
        load_pretrained(folder.format(rank=dist.get_rank()), settings)
    except ConfigError as error:
        return str(error)
    return None


def load_and_generate(settings, folder):
    """Greedy tokens of the loaded model, which needs its configs as much as its weights."""
    from hdpissa.engine import initialize, load_pretrained

    engine = initialize(model=load_pretrained(folder, settings), config=settings)
    engine.eval()
    ids = torch.arange(1, 8)[None]
    return engine.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
