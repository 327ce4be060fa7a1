"""Killed runs, resumed: three ways in `make test`, eight with `make slow`; `make faults` does sixty runs in all fifteen
(see kill_runs.py)."""

from __future__ import annotations

import pytest
from kill_runs import SAVE_POINTS, SIGNALS, make_case, one_run

SEED = 1
SHORT = [*SIGNALS, "save.write:5", "save.before_rename:1", "save.before_latest:1"]
SHORTEST = {"term one", "kill all", "save.before_rename:1"}
NUMBERED = [
    pytest.param(number, way, id=f"{number}-{way.replace(' ', '_')}", marks=[] if way in SHORTEST else pytest.mark.slow)
    for number, way in enumerate(SHORT)
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize(("number", "way"), NUMBERED)
def test_a_killed_run_ends_as_if_nothing_had_been(case, number, way):
    assert one_run(case, number, SEED, way) == ""


def test_there_are_ten_points_within_a_save():
    assert len(set(SAVE_POINTS)) == 10
    assert len(SHORT) == 8
    assert set(SHORT) > SHORTEST
