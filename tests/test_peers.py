"""What a rank says of those that it lost, and when the watch ends a run. Two real hosts: test_hosts.py."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from hdpissa.engine import peers
from hdpissa.engine.errors import LostError
from hdpissa.engine.metrics import Recorder
from hdpissa.engine.peers import Peer, Peers, Watch

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.1]:1234")


def four_ranks(monkeypatch, answers, *, rank=0, timeout_s=60.0):
    """Two ranks on each of two hosts; `answers` are those of ranks 0 to 3."""
    hosts = [("a", "10.0.0.1"), ("a", "10.0.0.1"), ("b", "10.0.0.2"), ("b", "10.0.0.2")]
    monkeypatch.setattr(Peer, "knock", lambda self, patience: answers[self.rank])
    monkeypatch.setattr(peers.time, "sleep", lambda seconds: None)
    return Peers(rank, [Peer(r, host, at, 5000 + r) for r, (host, at) in enumerate(hosts)], timeout_s)


EXPLAINED = {
    "a host is gone": (
        ["here", "here", "silent", "silent"],
        "no answer from ranks 2, 3 on b (10.0.0.2) (--ddp_timeout",
    ),
    "half of a host": (["here", "ended", "silent", "here"], "no answer from rank 2 on b (10.0.0.2)"),
    "a process is gone": (["here", "ended", "here", "here"], "rank 1 on a (10.0.0.1) ended early"),
    "on both hosts": (["here", "ended", "here", "ended"], "rank 1 on a (10.0.0.1) and rank 3 on b (10.0.0.2) ended"),
    "nobody is gone": (["here"] * 4, "though all ranks are there ([gloo/transport/tcp/pair.cc:538] Connection closed"),
    "cut off from itself": (["here", "silent", "silent", "silent"], "no answer from ranks 2, 3 on b"),
}


@pytest.mark.parametrize(("answers", "words"), EXPLAINED.values(), ids=EXPLAINED)
def test_explained_in_one_line(monkeypatch, answers, words):
    lost = four_ranks(monkeypatch, answers).explain(7, GLOO)
    assert str(lost).startswith("rank 0 on a lost its peers after step 7: ")
    assert words in str(lost)
    assert "\n" not in str(lost)


def test_what_counts_as_a_loss():
    assert peers.is_loss(GLOO)
    assert peers.is_loss(LostError("x"))
    assert peers.is_loss(peers.dist.DistBackendError("NCCL communicator was aborted on rank 2."))
    assert not peers.is_loss(RuntimeError("the disk is on fire"))
    assert not peers.is_loss(ValueError("gloo/"))


def test_knocking_at_real_doors():
    """A process that listens, and a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        assert Peer(1, "a", "127.0.0.1", port).knock(1.0) == "here"
    assert Peer(1, "a", "127.0.0.1", port).knock(1.0) == "ended"
    assert Peer(1, "a", "127.0.0.1", 0).knock(1.0) == "here"  # not to be asked


def test_the_lowest_rank_of_a_host_goes_first(monkeypatch):
    assert four_ranks(monkeypatch, ["here"] * 4, rank=0).is_first_here()
    assert not four_ranks(monkeypatch, ["here"] * 4, rank=1).is_first_here()
    assert four_ranks(monkeypatch, ["ended", "here", "here", "here"], rank=1).is_first_here()
    assert four_ranks(monkeypatch, ["here"] * 4, rank=2).is_first_here()


def watched(monkeypatch, answers, idle_s) -> bool:
    """Whether the watch ends the run within some of its rounds; `answers` is asked anew in every round."""
    group, ended = four_ranks(monkeypatch, ["here"] * 4, timeout_s=1.0), threading.Event()
    rounds = iter(answers)
    monkeypatch.setattr(Peer, "knock", lambda self, patience: next(rounds, "here"))
    watch = Watch(group, lambda: idle_s, ended.set)
    watch.start()
    found = ended.wait(0.6)
    watch.stop()
    watch.join()
    return found


def test_the_watch_ends_a_run_that_stands_still_without_a_host(monkeypatch):
    assert watched(monkeypatch, ["silent", "silent"], idle_s=0.8)


def test_the_watch_leaves_others_alone(monkeypatch):
    """One that moves, one whose hosts answer, and one whose network had a hiccup."""
    assert not watched(monkeypatch, ["silent"] * 20, idle_s=0.7)
    assert not watched(monkeypatch, [], idle_s=100)
    assert not watched(monkeypatch, ["silent", "here", "silent", "here"], idle_s=100)
    assert not watched(monkeypatch, ["ended"] * 20, idle_s=100)  # the backend notices, and says so at once


# --- run_state.json --------------------------------------------------------------------------------


def recorder(folder: Path, rank: int) -> Recorder:
    made = Recorder(folder, total_steps=9, weights=1, device_name="cpu", devices=4, rank=rank)
    made.steps_done = 3
    return made


def message(folder: Path) -> str:
    from launch_runs import read_json

    state = read_json(folder / "run_state.json")
    assert (state["state"], state["step"]) == ("failed", 3)
    return state["message"]


def test_the_cause_stands_in_run_state(tmp_path):
    """Whoever writes first or last: an error of rank 0 before one of another rank before the loss of peers."""
    recorder(tmp_path, 2).failed(LostError("lost"), lost=True)
    assert message(tmp_path) == "lost"
    recorder(tmp_path, 3).failed(RuntimeError("later"))
    recorder(tmp_path, 0).failed(LostError("lost, too"), lost=True)
    assert message(tmp_path) == "lost"
    recorder(tmp_path, 0).failed(RuntimeError("fire"))
    assert message(tmp_path) == "RuntimeError: fire"
    recorder(tmp_path, 1).failed(RuntimeError("smoke"))
    assert message(tmp_path) == "RuntimeError: fire"


def test_a_host_with_a_folder_of_its_own_writes_there(tmp_path):
    recorder(tmp_path / "new", 2).failed(RuntimeError("fire"))
    assert message(tmp_path / "new") == "rank 2: RuntimeError: fire"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run_state.json"]
