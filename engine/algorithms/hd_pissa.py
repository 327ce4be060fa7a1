"""HD-PiSSA: slices are disjoint sets of W's leading singular triplets, trained by Adam without weight decay."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

from .. import consensus
from ..comm.exchange import FactorExchange
from ..config.section import HDPissaConfig
from ..directions import decompose
from ..directions.slice_cache import SliceCache, identity
from ..method.delta import DTYPES, DeltaRule
from ..optim.factors import FactorStore
from ..sharding import base_files


def update_rule(section: HDPissaConfig) -> DeltaRule:
    return DeltaRule(
        betas=section.adam.betas,
        eps=section.adam.eps,
        second_order=section.delta.second_order,
        dtype=DTYPES[section.delta.dtype],
        precision=section.delta.precision,
        impl=section.kernels.impl,
    )


def fill_directions(
    model: nn.Module,
    section: HDPissaConfig,
    store: FactorStore,
    exchange: FactorExchange,
    progress: Callable[[str, int, int], None],
) -> decompose.InitReport:
    """From an SVD of the weights, or from the slices that an earlier run has cached."""
    init = section.init
    return decompose.compute_slices(
        store,
        exchange,
        method=init.method,
        tol=init.tol,
        placement=init.placement,
        cache=_slice_cache(model, section, store),
        progress=progress,
    )


def _slice_cache(model: nn.Module, section: HDPissaConfig, store: FactorStore) -> SliceCache | None:
    init = section.init
    if init.cache_dir is None:
        return None
    # From rank 0: other hosts may have copies of the files, with other modification times.
    files = base_files.checkpoint_files
    origin = consensus.from_rank0(lambda: identity(files(getattr(model, "name_or_path", "") or "").values()))
    how = {"slices": store.plan.slices, "method": init.method, "tol": init.tol}
    return SliceCache(os.path.expanduser(init.cache_dir), store.targets, origin=origin, how=how)
