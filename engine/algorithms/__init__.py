"""The methods that change W by thin deltas: one file each, found by its name, `hd_pissa.method`.

A file has the two functions of `Algorithm`. A new method is a new file here; nothing else names it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ..comm.exchange import FactorExchange
    from ..config.section import HDPissaConfig
    from ..directions.decompose import InitReport
    from ..method.delta import DeltaRule
    from ..optim.factors import FactorStore


class Algorithm(Protocol):
    """What a file of this folder defines."""

    def update_rule(self, section: HDPissaConfig) -> DeltaRule:
        """How a slice's gradients become ΔA and ΔB, and these the change of a shard; see `DeltaRule`."""

    def fill_directions(
        self,
        model: nn.Module,
        section: HDPissaConfig,
        store: FactorStore,
        exchange: FactorExchange,
        progress: Callable[[str, int, int], None],
    ) -> InitReport:
        """Fills the store with the fixed A and B of the own slices of every target; collective.

        Args:
            progress: called with each target's name when its slices are there, how many are, and of how many.
        """


def find(name: str) -> Algorithm:
    """The method of that name; the config has checked that there is one."""
    return cast(Algorithm, import_module(f".{name}", __name__))
