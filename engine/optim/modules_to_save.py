"""Parameters that are trained in full: norms, embeddings, the output layer, biases.

PEFT calls them `modules_to_save`. They are ordinary parameters to DeepSpeed, trained by its own ZeRO-3 AdamW: gradients
from all micro-batches of all ranks, averaged as in plain data parallel; fp32 weights and moments in shards; no weight
decay; the betas and eps of the slices. This module finds them, takes part in the vote on a step, and knows their
state. The step itself is `DeepSpeedEngine.step`, which the engine calls right after the slices' and only then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..method.pretrained import names_by_param
from ..method.targets import Target
from ..sharding import zero3
from ..sharding.slicing import ShardRange


def find(model: nn.Module, wanted: Sequence[str], targets: Sequence[Target]) -> dict[str, nn.Parameter]:
    """The parameters that `modules_to_save` names, in model order; a tied one once, under its first name.

    An entry is a name, or a part of names between dots: "norm", "lm_head", "q_proj.bias", "bias".

    Raises:
        ConfigError: an entry that matches nothing, or a weight that slices train.
    """
    names, sliced = names_by_param(model), {id(t.param): t.name for t in targets}
    found: dict[str, nn.Parameter] = {}
    idle = list(wanted)
    for name, param in model.named_parameters():
        keys = [key for key in wanted if any(f".{key}." in f".{n}." for n in names[id(param)])]
        if not keys:
            continue
        if id(param) in sliced:
            raise ConfigError(
                f'hd_pissa.modules_to_save: "{keys[0]}" matches {name}, which the slices of {sliced[id(param)]} train: '
                f'name it in hd_pissa.exclude_modules, or be more precise here (of a bias "q_proj.bias")'
            )
        if not param.is_floating_point():
            raise ConfigError(f'hd_pissa.modules_to_save: "{keys[0]}" matches {name}, whose numbers are integers')
        found[name] = param
        idle = [key for key in idle if key not in keys]
    if idle:
        roots = sorted({n.split(".")[-2] for n, p in model.named_parameters() if id(p) not in sliced and "." in n})
        raise ConfigError(
            f'hd_pissa.modules_to_save: "{idle[0]}" matches no parameter of {type(model).__name__}: correct or remove '
            f"it (it has {', '.join(roots)})"
        )
    return found


class ModulesToSave:
    """This rank's shards of the parameters that DeepSpeed trains; made after `deepspeed.initialize`.

    Args:
        params: by name.
        ds: DeepSpeed's engine.
        lr: peak learning rate.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], ds: object, *, lr: float) -> None:
        self.params, self.lr, self._ds = dict(params), lr, ds
        zero3.begin_adam(ds)

    def __str__(self) -> str:
        numels, first = self.numels, next(iter(self.params))
        more = f" and {len(numels) - 1} more" if len(numels) > 1 else ""
        return f"modules_to_save: {first}{more}, {sum(numels.values()):,} weights, by DeepSpeed's AdamW at {self.lr:g}"

    def square(self) -> Tensor:
        """‖own shards' gradient‖² of the step that is being voted on, float64."""
        parts = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in self._grads()]
        return torch.stack(parts).sum()

    def unreached(self) -> list[bool]:
        """For each parameter whether its own shard has got no gradient but zeros."""
        return [not bool(g.any()) for g in self._grads()]

    def nonfinite(self) -> list[str]:
        """Names of those whose gradient is not finite in the own shard."""
        return [n for n, g in zip(self.params, self._grads(), strict=True) if not bool(g.isfinite().all())]

    def _grads(self) -> Iterator[Tensor]:
        return (zero3.trained_grad(p) for p in self.params.values())

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step."""
        zero3.set_lr(self._ds, lr)

    def zero_grad(self) -> None:
        """Drops the gradients of the step that is over."""
        zero3.drop_trained_grads(self._ds)

    # --- state ---------------------------------------------------------------------------------------

    @property
    def numels(self) -> dict[str, int]:
        """Name → elements of the whole parameter."""
        return {name: zero3.full_numel(p) for name, p in self.params.items()}

    @property
    def nbytes(self) -> int:
        """This rank's fp32 weights and moments."""
        return sum(v.nbytes for _, _, v in self.views())

    def own_range(self, name: str, rank: int, world_size: int) -> ShardRange:
        """A rank's flat range of one parameter."""
        return ShardRange.of(rank, world_size, zero3.full_numel(self.params[name]), 1)

    def views(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name, weight, exp_avg or exp_avg_sq, this rank's elements in place)."""
        for name, param in self.params.items():
            for state in ("weight", "exp_avg", "exp_avg_sq"):  # as checkpoints name them
                yield name, state, zero3.trained_state(param, None if state == "weight" else state)

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets Adam's moments; the weights stay."""
        for _, state, values in self.views():
            if state != "weight":
                values.zero_()
        self.restored(0)

    def restored(self, updates: int) -> None:
        """Call when the views have been written: the compute weights follow, and Adam's t."""
        for param in self.params.values():
            zero3.shard_view(param).copy_(zero3.trained_state(param))
        zero3.set_adam_step(self._ds, updates)
