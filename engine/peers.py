"""Who else is in the run, and who of them still answers.

A collective that fails says little: gloo names a socket that was closed (often a neighbour's, who noticed first), NCCL
ends the process without any exception. So every rank opens a door, a port that a connection is accepted on and nothing
else, and knocks at the others' when something went wrong. An answer: that process is there. A refusal: its host is
there, the process is not. Silence: the host is gone, or the network to it.

`Watch` knocks when a run has not moved for most of the time-out; this is what speaks where NCCL would abort.
It restarts nothing and saves nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from .errors import LostError

Answer = Literal["here", "ended", "silent"]
KNOCKERS = 64  # connections that are tried at a time


def is_loss(error: BaseException) -> bool:
    """Whether an exception says that ranks could not reach each other."""
    return isinstance(error, LostError | dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo/", "Gloo ", "NCCL"))
    )


def reason(error: BaseException) -> str:
    """The start of what a backend said, on one line."""
    return " ".join(str(error).split())[:160]


# --- addresses -------------------------------------------------------------------------------------


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def own_address(master_addr: str) -> str:
    """This host's address on the network that rank 0 is reached by; a loopback address where there is none.

    A connected datagram socket has looked up its route, and has sent nothing. The second goal is an address that is
    never given to anybody: many hosts have their own name, and so rank 0's, on a loopback address.
    """
    for goal in (master_addr, "192.0.2.1"):
        with contextlib.suppress(OSError):
            family, kind, _, _, where = socket.getaddrinfo(goal, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(where)
                address = probe.getsockname()[0]
            if not is_loopback(address):
                return address
    return "127.0.0.1"


# --- doors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A rank's host by name and address, and its door; port 0 where nobody could come from outside."""

    rank: int
    host: str
    address: str
    port: int

    def knock(self, patience: float) -> Answer:
        if self.port == 0:
            return "here"
        try:
            socket.create_connection((self.address, self.port), timeout=patience).close()
        except ConnectionRefusedError:
            return "ended"
        except OSError:
            return "silent"
        return "here"


class Peers:
    """All ranks of a run, as seen by one of them.

    Args:
        rank: the own one. peers: all, in rank order. timeout_s: of a collective; told in messages.
    """

    def __init__(self, rank: int, peers: list[Peer], timeout_s: float) -> None:
        self.own, self.peers, self.timeout_s = peers[rank], peers, timeout_s
        self._speaker = threading.Lock()

    @classmethod
    def meet(cls, address: str, timeout_s: float) -> Peers:
        """Opens the own door and tells the others where it is; collective."""
        rank, world = dist.get_rank(), dist.get_world_size()
        door = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        threading.Thread(target=_answer, args=(door,), name="door", daemon=True).start()
        own = Peer(rank, socket.gethostname(), address, door.getsockname()[1])
        met: list[Peer] = [own] * world
        dist.all_gather_object(met, own)
        if len({peer.host for peer in met}) > 1:  # another host's loopback address would be our own
            met = [Peer(p.rank, p.host, p.address, 0) if is_loopback(p.address) else p for p in met]
        return cls(rank, met, timeout_s)

    def may_speak(self) -> bool:
        """True once: the exception and the watch may both find the same loss."""
        return self._speaker.acquire(blocking=False)

    @property
    def patience(self) -> float:
        """Seconds to wait for an answer."""
        return min(3.0, self.timeout_s / 20)

    def _ask(self, peers: list[Peer]) -> dict[Peer, Answer]:
        with ThreadPoolExecutor(min(KNOCKERS, max(1, len(peers)))) as pool:
            answers = pool.map(lambda peer: peer.knock(self.patience), peers)
            return dict(zip(peers, answers, strict=True))

    def _ask_all(self) -> dict[Peer, Answer]:
        return self._ask([p for p in self.peers if p is not self.own])

    def silent_hosts(self) -> frozenset[str]:
        """Addresses of other hosts whose first rank does not answer."""
        first = {p.address: p for p in reversed(self.peers) if p.address != self.own.address}
        return frozenset(p.address for p, answer in self._ask(list(first.values())).items() if answer == "silent")

    def is_first_here(self) -> bool:
        """Whether no lower rank of this host answers."""
        lower = [p for p in self.peers[: self.own.rank] if p.address == self.own.address]
        return "here" not in self._ask(lower).values()

    def explain(self, step: int, error: BaseException | None = None) -> LostError:
        """Asks everybody, and says in one line what was lost."""
        answers = self._ask_all()
        for _ in range(3 if error else 0):  # a process that has closed its connections may take a while to end
            if set(answers.values()) == {"here"}:
                time.sleep(0.5)
                answers = self._ask_all()
        # a host that is cut off may not even reach itself
        silent = [p for p, a in answers.items() if a == "silent" and p.address != self.own.address]
        ended = [p for p, a in answers.items() if a == "ended"]
        limit = f"--ddp_timeout {self.timeout_s:g} s"
        if silent:
            what = f"no answer from {_places(silent)} ({limit}); see to that host and the network, then start again"
        elif ended:
            what = f"{_places(ended)} ended early and said why in its own output; mend that, then start again"
        else:
            said = f" ({reason(error)})" if error else ""
            what = f"a collective failed or took longer than {limit} though all ranks are there{said}; one hangs, or "
            what += "is slow: then raise --ddp_timeout"
        return LostError(f"rank {self.own.rank} on {self.own.host} lost its peers after step {step}: {what}")


def _answer(door: socket.socket) -> None:
    while True:
        with contextlib.suppress(OSError):
            door.accept()[0].close()


def _places(peers: Iterable[Peer]) -> str:
    """ "rank 1 on a (10.0.0.1) and ranks 2, 3 on b (10.0.0.2)"; eight hosts at most."""
    ranks: dict[tuple[str, str], list[str]] = {}
    for peer in peers:
        ranks.setdefault((peer.host, peer.address), []).append(str(peer.rank))
    texts = [f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {host} ({at})" for (host, at), r in ranks.items()]
    return " and ".join(texts[:8]) + (f" and {len(texts) - 8} more hosts" if len(texts) > 8 else "")


class Watch(threading.Thread):
    """Ends a run that stands still because a host is gone, before the backend's own time-out does.

    Only a host that twice gave no answer counts. One that is merely slow answers, and is left to the time-out.

    Args:
        idle: seconds since the run last moved.
        end: called once, in this thread, when a host is gone.
    """

    def __init__(self, peers: Peers, idle: Callable[[], float], end: Callable[[], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self._peers, self._idle, self._end = peers, idle, end
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        before: frozenset[str] = frozenset()
        while not self._stopped.wait(min(5.0, self._peers.timeout_s / 20)):
            silent = self._peers.silent_hosts() if self._idle() >= 0.75 * self._peers.timeout_s else frozenset()
            if silent & before and not self._stopped.is_set():
                self._end()
                return
            before = silent
