"""Where a step that is skipped has gone wrong: which rank, which weight, which factor, or the loss.

Asked only after the vote has refused a step, so it may cost what it likes: one pass over the gradients and one
collective. Backward runs from the loss to the input, and what is not finite spreads on the way: the weight that
backward met first, the last one of the model, is nearest to the cause and is named.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .. import consensus
from .factors import FactorStore


def locate(store: FactorStore, module: nn.Module, loss: Tensor, modules: Sequence[str] = ()) -> str:
    """The end of a sentence about a refused step: ": on rank 1 the gradient of A of layers.1.mlp.up_proj, …".

    Empty where everything is finite (the step was refused for another reason). Collective.

    Args:
        loss: this rank's own sum over the step.
        modules: parameters of `modules_to_save` whose gradient is not finite in this rank's shard. They are averages,
            so they do not say on which rank it began.
    """
    reports = consensus.gather(_describe(store, module, loss, modules))
    found = {rank: text for rank, text in enumerate(reports) if text}
    if not found:
        return ""
    first = min(found)
    ranks = [r for r, text in found.items() if text == found[first]]
    where = f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {found[first]}"
    others = [str(r) for r in found if r not in ranks]
    return f": {where}" + (f"; also on rank{'s' * (len(others) > 1)} {', '.join(others)}" if others else "")


def _describe(store: FactorStore, module: nn.Module, loss: Tensor, modules: Sequence[str]) -> str:
    gradients = ((t.name, factor, g) for t, A, B in store.views(store.grads) for factor, g in (("A", A), ("B", B)))
    bad = {name: factor for name, factor, grad in gradients if not grad.isfinite().all()}
    parts = [] if loss.isfinite().all() else [f"the loss is {loss.item()}"]
    if bad:
        last = [name for name, _ in module.named_modules() if name in bad][-1]
        many = f"gradients of {len(bad)} of {len(store.targets)} weights"
        parts.append(f"{many}, in backward's order first {last}'s (of {bad[last]})")
    if modules:
        parts.append(f"the averaged gradient of {modules[-1]}")
    return " and ".join(parts)
