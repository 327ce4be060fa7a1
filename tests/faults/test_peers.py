"""What a rank says of those that it lost, and when the watch ends a run. Two real hosts: test_hosts.py."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hdpissa.engine.distributed import heartbeat, peers
from hdpissa.engine.distributed.heartbeat import Report
from hdpissa.engine.distributed.peers import Door, Peer, Peers
from hdpissa.engine.distributed.watchdog import Watch, asked_after
from hdpissa.engine.errors import LostError
from hdpissa.launch.trainers.run_record import RunRecord

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.1]:1234")


def report(**changes) -> Report:
    """Of a rank that waits in the vote of step 8, and has for a minute."""
    values = {"step": 8, "point": "step.vote", "count": 50, "ticks": 0, "idle_s": 60.0, "slow": False}
    return Report(**values | {"waiting": True, "where": "x.py:1 in f"} | changes)


HERE = report()
HOSTS = [("a", "10.0.0.1"), ("a", "10.0.0.1"), ("b", "10.0.0.2"), ("b", "10.0.0.2")]


def four_ranks(monkeypatch, answers, *, rank=0, hang_s=60.0, own=HERE):
    """Two ranks on each of two hosts; `answers` are those of ranks 0 to 3, without the own one's."""
    monkeypatch.setattr(Peer, "knock", lambda self, patience, words=b"": answers[self.rank])
    monkeypatch.setattr(peers.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(peers.heartbeat, "report", lambda: own)
    return Peers(rank, [Peer(r, host, at, 5000 + r) for r, (host, at) in enumerate(HOSTS)], 60.0, hang_s)


BEHIND = report(point="step.data", count=49, waiting=False, where="batches.py:88 in batch", idle_s=61.0)
EXPLAINED = {
    "a host is gone": (
        [HERE, HERE, "silent", "silent"],
        "no answer from ranks 2, 3 on b (10.0.0.2) (--ddp_timeout",
    ),
    "half of a host": ([HERE, "ended", "silent", HERE], "no answer from rank 2 on b (10.0.0.2)"),
    "a process is gone": (
        [HERE, "ended", HERE, HERE],
        "rank 1 on a (10.0.0.1) ended early (killed, or its own output says why) while this rank was in step 8, vote",
    ),
    "on both hosts": ([HERE, "ended", HERE, "ended"], "rank 1 on a (10.0.0.1) and rank 3 on b (10.0.0.2) ended"),
    "stopped": ([HERE, HERE, HERE, "mute"], "rank 3 on b (10.0.0.2) does not answer: stopped, or stuck in code"),
    "nobody is gone": (
        [HERE] * 4,
        "[gloo/transport/tcp/pair.cc",
    ),
    "cut off from itself": ([HERE, "silent", "silent", "silent"], "no answer from ranks 2, 3 on b"),
    "hidden doors": ([HERE, HERE, "hidden", "hidden"], "though all ranks are there"),
    "one is behind": (
        [HERE, HERE, BEHIND, HERE],
        "rank 2 on b (10.0.0.2) hangs in step 8, data, for 61 s (at batches.py:88 in batch), while the others wait in "
        "step 8, vote (--ddp_timeout 60 s)",
    ),
    "one is behind and hidden ones are not known": ([HERE, BEHIND, "hidden", "hidden"], "rank 1 on a (10.0.0.1) hangs"),
    "at the same place, not in a collective": (
        [HERE, HERE, HERE, report(waiting=False, where="y.py:2 in g")],
        "rank 3 on b (10.0.0.2) hangs in step 8, vote, for 60 s (at y.py:2 in g)",
    ),
    "nobody in a collective that Python sees, one has passed fewer layers": (
        [report(waiting=False, ticks=7), report(waiting=False, ticks=7), report(waiting=False, ticks=5), "hidden"],
        "rank 2 on b (10.0.0.2) hangs",
    ),
    "before the first step": (
        [HERE, report(step=0, point="alone: run.json", count=9, waiting=False), HERE, HERE],
        "rank 1 on a (10.0.0.1) hangs in alone: run.json, before the first step",
    ),
    "behind, but it moves": ([HERE, HERE, report(count=49, idle_s=0.5), HERE], "though all ranks are there"),
}


@pytest.mark.parametrize(("answers", "words"), EXPLAINED.values(), ids=EXPLAINED)
def test_explained_in_one_line(monkeypatch, answers, words):
    lost = four_ranks(monkeypatch, answers, own=answers[0]).explain(7, GLOO)
    assert str(lost).startswith("rank 0 on a lost its peers after step 7: ")
    assert words in str(lost)
    assert "\n" not in str(lost)


def test_found_standing_still_the_other_limit_is_told(monkeypatch):
    group = four_ranks(monkeypatch, [HERE, HERE, BEHIND, HERE], hang_s=40)
    assert "(--hang_timeout 40 s)" in str(group.explain(7))


def test_what_counts_as_a_loss():
    assert peers.is_loss(GLOO)
    assert peers.is_loss(LostError("x"))
    assert peers.is_loss(peers.dist.DistBackendError("NCCL communicator was aborted on rank 2."))
    assert not peers.is_loss(RuntimeError("the disk is on fire"))
    assert not peers.is_loss(ValueError("gloo/"))


# --- doors -----------------------------------------------------------------------------------------


def test_knocking_at_real_doors():
    """Ours, one that says nothing, one that talks nonsense, one that hangs up, and a port that nobody listens on."""
    door = Door("127.0.0.1", "secret")
    answer = Peer(1, "a", "127.0.0.1", door.port).knock(1.0)
    assert isinstance(answer, Report)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        assert Peer(1, "a", "127.0.0.1", port).knock(0.2) == "mute"
        for said in (b"hello\n", b'{"step": 1}\n', HERE.to_line().replace(b"50", b'"x"'), b"x" * 5000):
            assert knock_at(mute, said) == "mute"
        assert knock_at(mute, b"") == "ended"
    assert Peer(1, "a", "127.0.0.1", port).knock(1.0) == "ended"
    assert Peer(1, "a", "127.0.0.1", 0).knock(1.0) == "hidden"  # not to be asked


def knock_at(server, said):
    """What `knock` makes of a server that says that and hangs up."""

    def serve():
        guest = server.accept()[0]
        with contextlib.suppress(OSError), guest:
            guest.sendall(said)

    while select.select([server], [], [], 0)[0]:  # earlier guests, whom nobody has let in
        server.accept()[0].close()
    thread = threading.Thread(target=serve)
    thread.start()
    answer = Peer(1, "a", "127.0.0.1", server.getsockname()[1]).knock(1.0)
    thread.join()
    return answer


def test_words_are_believed_with_the_token_only():
    door = Door("127.0.0.1", "secret")
    group = [Peer(0, "a", "127.0.0.1", 0), Peer(1, "a", "127.0.0.1", door.port)]
    Peers(0, group, 60, 60, token="wrong").tell("lies")
    for junk in (b"", b"{}\n", b"[1]\n", b'{"token": 5, "text": "x"}\n', b"\xff\xfe\n", b"x" * 100_000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", door.port)) as line:
            line.sendall(junk)
    Peers(0, group, 60, 60, token="secret").tell("rank 0 is on fire")
    Peers(0, group, 60, 60, token="secret").tell("and later on ice")
    deadline = time.monotonic() + 5
    while not door.heard and time.monotonic() < deadline:
        time.sleep(0.01)
    assert door.heard == "rank 0 is on fire"
    assert isinstance(group[1].knock(1.0), Report)  # still open


def test_a_visitor_that_says_nothing_keeps_nobody_out():
    door = Door("127.0.0.1", "secret")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", door.port)))
        assert isinstance(Peer(1, "a", "127.0.0.1", door.port).knock(1.0), Report)


def test_the_lowest_rank_of_a_host_goes_first(monkeypatch):
    assert four_ranks(monkeypatch, [HERE] * 4, rank=0).is_first_here()
    assert not four_ranks(monkeypatch, [HERE] * 4, rank=1).is_first_here()
    assert four_ranks(monkeypatch, ["ended", HERE, HERE, HERE], rank=1).is_first_here()
    assert four_ranks(monkeypatch, ["mute", HERE, HERE, HERE], rank=1).is_first_here()
    assert four_ranks(monkeypatch, [HERE] * 4, rank=2).is_first_here()


# --- the watch -------------------------------------------------------------------------------------


def watched(monkeypatch, rounds, *, idle_s=0.8, own=None, heard="", asked=3) -> bool:
    """Whether the watch ends the run within some of its rounds of 0.05 s; in each, `asked` knocks get one answer."""
    own = own or report(idle_s=idle_s)
    group, ended = four_ranks(monkeypatch, [HERE] * 4, hang_s=1.0, own=own), threading.Event()
    answers = iter([answer for answer in rounds for _ in range(asked)])
    lock = threading.Lock()

    def knock(self, patience, words=b""):
        with lock:
            return next(answers, report(idle_s=0.0))

    monkeypatch.setattr(Peer, "knock", knock)
    monkeypatch.setattr(peers.heartbeat, "idle_s", lambda: idle_s)
    monkeypatch.setattr(Peers, "heard", heard)
    watch = Watch(group, ended.set)
    watch.start()
    found = ended.wait(0.6)
    watch.stop()
    watch.join()
    return found


STILL, MOVES = report(idle_s=0.9), report(idle_s=0.1)


def test_the_watch_ends_a_run_that_stands_still(monkeypatch):
    assert watched(monkeypatch, [STILL] * 9)
    assert watched(monkeypatch, ["silent"] * 9)
    assert watched(monkeypatch, ["mute"] * 9, own=report(idle_s=50, slow=True), idle_s=50)
    assert watched(monkeypatch, [report(idle_s=61, slow=True)] * 9)
    assert watched(monkeypatch, ["ended"] * 9, idle_s=0.4)
    assert watched(monkeypatch, [MOVES] * 9, idle_s=0.4, heard="rank 2 is on fire")


def test_the_watch_leaves_others_alone(monkeypatch):
    """One that moves, one whose peers move, one whose network had a hiccup, and one that may take its time."""
    assert not watched(monkeypatch, ["silent"] * 99, idle_s=0.2)
    assert not watched(monkeypatch, ["ended"] * 99, idle_s=0.2)
    assert not watched(monkeypatch, [MOVES] * 99)
    assert not watched(monkeypatch, [STILL, MOVES] * 30)
    assert not watched(monkeypatch, ["ended", MOVES] * 30, idle_s=0.4, asked=1)
    assert not watched(monkeypatch, [report(idle_s=59, slow=True)] * 99)  # decomposes a large matrix
    assert not watched(monkeypatch, [STILL] * 99, own=report(idle_s=59, slow=True), idle_s=59)
    assert not watched(monkeypatch, [MOVES] * 9, idle_s=0.1, heard="rank 2 is on fire")  # a backend's exception is near


@pytest.mark.parametrize(("limit", "seconds"), [(600, 450), (72, 54), (60, 42), (30, 18), (14, 7), (10, 5)])
def test_what_is_left_of_the_limit_is_for_asking(limit, seconds):
    assert asked_after(limit) == pytest.approx(seconds, abs=0.3)


# --- the pulse -------------------------------------------------------------------------------------


def test_the_pulse_tells_where_a_process_is():
    heartbeat.at_step(3)
    before = heartbeat.report().count
    heartbeat.reach("step.forward")
    heartbeat.tick()
    found = heartbeat.report()
    assert (found.place, found.count, found.ticks, found.waiting) == ("step 3, forward", before + 1, 1, False)
    assert "_look_at_main_thread" in found.where
    with heartbeat.alone("run.json"):
        assert heartbeat.report().place == "step 3, alone: run.json"
        assert heartbeat.report().count == found.count  # the others do not come by here
    assert heartbeat.report().place == "step 3, forward"
    with contextlib.suppress(OSError), heartbeat.alone("run.json"):
        raise OSError
    assert heartbeat.report().place == "step 3, alone: run.json"  # for its last words
    heartbeat.at_step(0)
    assert Report.from_line(heartbeat.report().to_line()).place.endswith("before the first step")


# --- run_state.json --------------------------------------------------------------------------------


def recorder(folder: Path, rank: int) -> RunRecord:
    engine = SimpleNamespace(last_step=SimpleNamespace(tokens=1))
    args = SimpleNamespace(output_dir=str(folder), process_index=rank)
    made = RunRecord(SimpleNamespace(args=args, engine=engine))
    made.on_step_end(args, SimpleNamespace(global_step=3), None)
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
