"""What a rank says of those that it lost, and when the watchdog ends a run. Two real hosts: test_hosts.py."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hdpissa.engine.distributed import heartbeat, rank_status
from hdpissa.engine.distributed.heartbeat import Report
from hdpissa.engine.distributed.rank_status import Rank, RankGroup, StatusServer
from hdpissa.engine.distributed.watchdog import Watcher, query_after_s
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
    monkeypatch.setattr(Rank, "query", lambda self, timeout, message=b"": answers[self.rank])
    monkeypatch.setattr(rank_status.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(rank_status.heartbeat, "report", lambda: own)
    return RankGroup(rank, [Rank(r, host, at, 5000 + r) for r, (host, at) in enumerate(HOSTS)], 60.0, hang_s)


BEHIND = report(point="step.data", count=49, waiting=False, where="batches.py:88 in batch", idle_s=61.0)
EXPLAINED = {
    "a host is gone": (
        [HERE, HERE, "no answer", "no answer"],
        "no answer from ranks 2, 3 on b (10.0.0.2) (--ddp_timeout",
    ),
    "half of a host": ([HERE, "exited", "no answer", HERE], "no answer from rank 2 on b (10.0.0.2)"),
    "a process is gone": (
        [HERE, "exited", HERE, HERE],
        "rank 1 on a (10.0.0.1) ended early (killed, or see its own output) while this rank was in step 8, vote",
    ),
    "on both hosts": ([HERE, "exited", HERE, "exited"], "rank 1 on a (10.0.0.1) and rank 3 on b (10.0.0.2) ended"),
    "stopped": (
        [HERE, HERE, HERE, "unresponsive"],
        "rank 3 on b (10.0.0.2) does not answer",
    ),
    "nobody is gone": (
        [HERE] * 4,
        "[gloo/transport/tcp/pair.cc",
    ),
    "cut off from itself": ([HERE, "no answer", "no answer", "no answer"], "no answer from ranks 2, 3 on b"),
    "not reachable": ([HERE, HERE, "not reachable", "not reachable"], "though all ranks answer"),
    "one is behind": (
        [HERE, HERE, BEHIND, HERE],
        "rank 2 on b (10.0.0.2) hangs in step 8, data, for 61 s (at batches.py:88 in batch), while the others wait in "
        "step 8, vote (--ddp_timeout 60 s)",
    ),
    "one is behind, others not reachable": (
        [HERE, BEHIND, "not reachable", "not reachable"],
        "rank 1 on a (10.0.0.1) hangs",
    ),
    "at the same place, not in a collective": (
        [HERE, HERE, HERE, report(waiting=False, where="y.py:2 in g")],
        "rank 3 on b (10.0.0.2) hangs in step 8, vote, for 60 s (at y.py:2 in g)",
    ),
    "nobody in a collective that Python sees, one has passed fewer layers": (
        [
            report(waiting=False, ticks=7),
            report(waiting=False, ticks=7),
            report(waiting=False, ticks=5),
            "not reachable",
        ],
        "rank 2 on b (10.0.0.2) hangs",
    ),
    "before the first step": (
        [HERE, report(step=0, point="single-rank work: run.json", count=9, waiting=False), HERE, HERE],
        "rank 1 on a (10.0.0.1) hangs in single-rank work: run.json, before the first step",
    ),
    "behind, but it moves": ([HERE, HERE, report(count=49, idle_s=0.5), HERE], "though all ranks answer"),
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
    assert rank_status.is_loss(GLOO)
    assert rank_status.is_loss(LostError("x"))
    assert rank_status.is_loss(rank_status.dist.DistBackendError("NCCL communicator was aborted on rank 2."))
    assert not rank_status.is_loss(RuntimeError("the disk is on fire"))
    assert not rank_status.is_loss(ValueError("gloo/"))


# --- servers and queries -----------------------------------------------------------------------------------------


def test_queries_of_real_servers():
    """Ours, one that says nothing, one that talks nonsense, one that hangs up, and a port that nobody listens on."""
    server = StatusServer("127.0.0.1", "secret")
    answer = Rank(1, "a", "127.0.0.1", server.port).query(1.0)
    assert isinstance(answer, Report)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        assert Rank(1, "a", "127.0.0.1", port).query(0.2) == "unresponsive"
        for said in (b"hello\n", b'{"step": 1}\n', HERE.to_line().replace(b"50", b'"x"'), b"x" * 5000):
            assert query_at(mute, said) == "unresponsive"
        assert query_at(mute, b"") == "exited"
    assert Rank(1, "a", "127.0.0.1", port).query(1.0) == "exited"
    assert Rank(1, "a", "127.0.0.1", 0).query(1.0) == "not reachable"  # not to be asked


def query_at(server, said):
    """The answer of a server that sends `said` and closes."""

    def serve():
        guest = server.accept()[0]
        with contextlib.suppress(OSError), guest:
            guest.sendall(said)

    while select.select([server], [], [], 0)[0]:  # earlier guests, whom nobody has let in
        server.accept()[0].close()
    thread = threading.Thread(target=serve)
    thread.start()
    answer = Rank(1, "a", "127.0.0.1", server.getsockname()[1]).query(1.0)
    thread.join()
    return answer


def test_messages_need_the_token():
    server = StatusServer("127.0.0.1", "secret")
    group = [Rank(0, "a", "127.0.0.1", 0), Rank(1, "a", "127.0.0.1", server.port)]
    RankGroup(0, group, 60, 60, token="wrong").broadcast("lies")
    for junk in (b"", b"{}\n", b"[1]\n", b'{"token": 5, "text": "x"}\n', b"\xff\xfe\n", b"x" * 100_000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port)) as line:
            line.sendall(junk)
    RankGroup(0, group, 60, 60, token="secret").broadcast("rank 0 is on fire")
    RankGroup(0, group, 60, 60, token="secret").broadcast("and later on ice")
    deadline = time.monotonic() + 5
    while not server.received and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.received == "rank 0 is on fire"
    assert isinstance(group[1].query(1.0), Report)  # still open


def test_a_silent_client_blocks_nobody():
    server = StatusServer("127.0.0.1", "secret")
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        assert isinstance(Rank(1, "a", "127.0.0.1", server.port).query(1.0), Report)


def test_the_lowest_rank_of_a_host_goes_first(monkeypatch):
    assert four_ranks(monkeypatch, [HERE] * 4, rank=0).is_lowest_on_host()
    assert not four_ranks(monkeypatch, [HERE] * 4, rank=1).is_lowest_on_host()
    assert four_ranks(monkeypatch, ["exited", HERE, HERE, HERE], rank=1).is_lowest_on_host()
    assert four_ranks(monkeypatch, ["unresponsive", HERE, HERE, HERE], rank=1).is_lowest_on_host()
    assert four_ranks(monkeypatch, [HERE] * 4, rank=2).is_lowest_on_host()


# --- the watchdog -------------------------------------------------------------------------------------


def watched(monkeypatch, rounds, *, idle_s=0.8, own=None, received="", asked=3) -> bool:
    """Whether the watchdog ends the run within some rounds of 0.05 s; in each, `asked` queries get one answer."""
    own = own or report(idle_s=idle_s)
    group, ended = four_ranks(monkeypatch, [HERE] * 4, hang_s=1.0, own=own), threading.Event()
    answers = iter([answer for answer in rounds for _ in range(asked)])
    lock = threading.Lock()

    def query(self, timeout, message=b""):
        with lock:
            return next(answers, report(idle_s=0.0))

    monkeypatch.setattr(Rank, "query", query)
    monkeypatch.setattr(rank_status.heartbeat, "idle_s", lambda: idle_s)
    monkeypatch.setattr(RankGroup, "received", received)
    watch = Watcher(group, ended.set)
    watch.start()
    found = ended.wait(0.6)
    watch.stop()
    watch.join()
    return found


STILL, MOVES = report(idle_s=0.9), report(idle_s=0.1)


def test_the_watchdog_ends_a_run_without_progress(monkeypatch):
    assert watched(monkeypatch, [STILL] * 9)
    assert watched(monkeypatch, ["no answer"] * 9)
    assert watched(monkeypatch, ["unresponsive"] * 9, own=report(idle_s=50, slow=True), idle_s=50)
    assert watched(monkeypatch, [report(idle_s=61, slow=True)] * 9)
    assert watched(monkeypatch, ["exited"] * 9, idle_s=0.4)
    assert watched(monkeypatch, [MOVES] * 9, idle_s=0.4, received="rank 2 is on fire")


def test_the_watchdog_leaves_other_runs_alone(monkeypatch):
    """One that moves, one whose peers move, one whose network had a hiccup, and one that may take its time."""
    assert not watched(monkeypatch, ["no answer"] * 99, idle_s=0.2)
    assert not watched(monkeypatch, ["exited"] * 99, idle_s=0.2)
    assert not watched(monkeypatch, [MOVES] * 99)
    assert not watched(monkeypatch, [STILL, MOVES] * 30)
    assert not watched(monkeypatch, ["exited", MOVES] * 30, idle_s=0.4, asked=1)
    assert not watched(monkeypatch, [report(idle_s=59, slow=True)] * 99)  # decomposes a large matrix
    assert not watched(monkeypatch, [STILL] * 99, own=report(idle_s=59, slow=True), idle_s=59)
    assert not watched(monkeypatch, [MOVES] * 9, idle_s=0.1, received="rank 2 is on fire")


@pytest.mark.parametrize(("limit", "seconds"), [(600, 450), (72, 54), (60, 42), (30, 18), (14, 7), (10, 5)])
def test_what_is_left_of_the_limit_is_for_asking(limit, seconds):
    assert query_after_s(limit) == pytest.approx(seconds, abs=0.3)


# --- the heartbeat -------------------------------------------------------------------------------------


def test_a_heartbeat_tells_where_a_process_is():
    heartbeat.at_step(3)
    before = heartbeat.report().count
    heartbeat.beat("step.forward")
    heartbeat.progress()
    found = heartbeat.report()
    assert (found.place, found.count, found.ticks, found.waiting) == ("step 3, forward", before + 1, 1, False)
    assert "_look_at_main_thread" in found.where
    with heartbeat.single_rank("run.json"):
        assert heartbeat.report().place == "step 3, single-rank work: run.json"
        assert heartbeat.report().count == found.count  # the others do not come by here
    assert heartbeat.report().place == "step 3, forward"
    with contextlib.suppress(OSError), heartbeat.single_rank("run.json"):
        raise OSError
    assert heartbeat.report().place == "step 3, single-rank work: run.json"  # for its last words
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
    """Whoever writes first or last: an error of rank 0 before one of another rank before the loss of rank_status."""
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
