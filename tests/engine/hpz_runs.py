"""What the ranks of the hpZ test do; functions here run inside `ranks.run_ranks`."""

from __future__ import annotations

from engine_runs import train_tiny


def second_copies(engine) -> list[int]:
    """Elements of every second copy that there is."""
    copies = [getattr(p, "ds_secondary_tensor", None) for p in engine.module.parameters()]
    return [copy.numel() for copy in copies if copy is not None]


def train_with_copies(settings, *, keep=False, source=None):
    """`train_tiny` with evaluations in between.

    Args:
        keep: second copies are not dropped when a shard is written: the control.
        source: a checkpoint to start from, read in shards.
    """
    from hdpissa.engine.sharding import zero3

    if keep:
        zero3.drop_second_copy = lambda param: None
    if source:
        import engine_runs

        from hdpissa.engine import load_pretrained

        engine_runs.build = lambda model: load_pretrained(source, settings, attn_implementation="eager")
    return train_tiny(settings, eval_between=True, after=second_copies)
