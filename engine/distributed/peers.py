"""Who else is in the run, who of them still answers, and what each is doing.

A collective that fails says little: gloo names a socket that was closed (often a neighbour's, who noticed first), NCCL
ends the process without any exception. So every rank opens a door, a port at which it tells its heartbeat
(`heartbeat.Report`) to whoever connects, and knocks at the others' when something went wrong:

* a report      that process is there, and says where it stands;
* "mute"        the kernel took the connection, the process said nothing: it is stopped, or stuck with the interpreter;
* "ended"       refused: the host is there, the process is not;
* "silent"      nothing: the host is gone, or the network to it.

At the door last words are left, too: a rank that fails, or has found out who hangs, tells all others before it ends.
They carry a token that only the ranks of this run know, so that nobody else's connection ends a run.

What the answers mean is `verdict`'s business, when to knock `watch`'s. In a run that moves nobody knocks.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import torch.distributed as dist

from .. import consensus
from ..errors import LostError, one_line
from . import blame, heartbeat
from .blame import Answer, Place

KNOCKERS = 64  # connections that are tried at a time
MOST_BYTES = 4096  # of a line at a door
DOOR_S = 2.0  # how long a visitor may take


def is_loss(error: BaseException) -> bool:
    """Whether an exception says that ranks could not reach each other."""
    return isinstance(error, LostError | dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo/", "Gloo ", "NCCL"))
    )


# --- addresses -------------------------------------------------------------------------------------


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """The network interface that has this address; None for the loopback one."""
    if is_loopback(address):
        return None
    found = [name for name, given in psutil.net_if_addrs().items() if any(a.address == address for a in given)]
    return found[0] if found else None


def free_port() -> int:
    """A port of this host that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
class Peer(Place):
    """A rank's host by name and address, and its door; port 0 where nobody could come from outside."""

    port: int

    def knock(self, patience: float, words: bytes = b"") -> Answer:
        """Its answer; leaves words, if any."""
        if self.port == 0:
            return "hidden"
        try:
            line = socket.create_connection((self.address, self.port), timeout=patience)
        except ConnectionRefusedError:
            return "ended"
        except OSError:
            return "silent"
        with line:
            try:
                line.sendall(words)
                return heartbeat.Report.from_line(_read_line(line))
            except ConnectionError:
                return "ended"
            except (OSError, ValueError, TypeError):
                return "mute"


class Door:
    """The own port. Attributes: heard: the first words that were left, or None."""

    def __init__(self, address: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=1024)
        self.port, self.heard, self._token = self._socket.getsockname()[1], "", token
        threading.Thread(target=self._open, name="door", daemon=True).start()

    def _open(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a visitor that left again
                visitor = self._socket.accept()[0]
                # one thread each: a visitor that says nothing must not keep others out
                threading.Thread(target=self._receive, args=(visitor,), name="visit", daemon=True).start()

    def _receive(self, visitor: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError), visitor:  # whatever a stranger sends
            visitor.settimeout(DOOR_S)
            visitor.sendall(heartbeat.report().to_line())
            words = json.loads(_read_line(visitor))
            if secrets.compare_digest(words["token"], self._token):
                self.heard = self.heard or str(words["text"])


def _read_line(line: socket.socket) -> bytes:
    """Up to a newline. Raises ConnectionError where the other side closes first, as a process that ends does."""
    read = b""
    while not read.endswith(b"\n") and len(read) < MOST_BYTES:
        part = line.recv(MOST_BYTES)
        if not part:
            raise ConnectionResetError
        read += part
    return read


def patience(limit_s: float) -> float:
    """Seconds to wait for an answer."""
    return min(2.0, limit_s / 30)


class Peers:
    """All ranks of a run, as seen by one of them.

    Args:
        rank: the own one. peers: all, in rank order.
        timeout_s: of a collective. hang_s: how long the run may stand still. Both are told in messages.
        door, token: the own door, and what words must carry.
    """

    def __init__(
        self,
        rank: int,
        peers: list[Peer],
        timeout_s: float,
        hang_s: float,
        *,
        door: Door | None = None,
        token: str = "",
    ) -> None:
        self.own, self.peers, self.timeout_s, self.hang_s = peers[rank], peers, timeout_s, hang_s
        self._door, self._token = door, token
        self._speaker = threading.Lock()

    @classmethod
    def meet(cls, address: str, timeout_s: float, hang_s: float) -> Peers:
        """Opens the own door and tells the others where it is; collective."""
        rank = dist.get_rank()
        token = consensus.from_rank0(lambda: secrets.token_hex(16))
        door = Door(address, token)
        own = Peer(rank, socket.gethostname(), address, door.port)
        met = consensus.gather(own)
        if len({peer.host for peer in met}) > 1:  # another host's loopback address would be our own
            met = [Peer(p.rank, p.host, p.address, 0) if is_loopback(p.address) else p for p in met]
        return cls(rank, met, timeout_s, hang_s, door=door, token=token)

    def may_speak(self) -> bool:
        """True once: the exception and the watch may both find the same loss."""
        return self._speaker.acquire(blocking=False)

    @property
    def heard(self) -> str:
        """What another rank said before it ended; empty when nobody did."""
        return self._door.heard if self._door else ""

    def _ask(self, peers: list[Peer], words: bytes = b"") -> dict[Peer, Answer]:
        with ThreadPoolExecutor(min(KNOCKERS, max(1, len(peers)))) as pool:
            answers = pool.map(lambda peer: peer.knock(patience(self.hang_s), words), peers)
            return dict(zip(peers, answers, strict=True))

    @property
    def _others(self) -> list[Peer]:
        return [p for p in self.peers if p is not self.own]

    def ask_all(self) -> dict[Peer, Answer]:
        """Everybody's answer, this rank's own report among them."""
        answers = self._ask(self._others)
        return {p: answers.get(p, None) or heartbeat.report() for p in self.peers}

    def next_has_ended(self) -> bool:
        """Whether the process of the next rank is gone. As every rank asks, some living one notices any death."""
        after = self.peers[(self.own.rank + 1) % len(self.peers)]
        return after is not self.own and after.knock(patience(self.hang_s)) == "ended"

    def is_first_here(self) -> bool:
        """Whether no lower rank of this host answers."""
        lower = [p for p in self.peers[: self.own.rank] if p.address == self.own.address]
        return all(answer in ("ended", "silent", "mute") for answer in self._ask(lower).values())

    def tell(self, text: str) -> None:
        """Leaves words at every other door: why the run cannot go on."""
        words = json.dumps({"token": self._token, "text": text[: MOST_BYTES // 4]}).encode() + b"\n"
        self._ask(self._others, words)

    def tell_failure(self, error: BaseException) -> None:
        """Says before this process ends what happened to it, and where."""
        self.tell(f"{blame.places([self.own])} failed in {heartbeat.report().place} ({one_line(error)})")

    def explain(self, step: int, error: BaseException | None = None) -> LostError:
        """Says in one line what was lost, as another rank has told it or as the answers have it, and tells the others.

        Args:
            step: the last one that was done.
            error: of the collective that failed; None when the run was found standing still.
        """
        text = self.heard or self._find_out(error)
        return LostError(f"rank {self.own.rank} on {self.own.host} lost its peers after step {step}: {text}")

    def _find_out(self, error: BaseException | None) -> str:
        answers = self.ask_all()
        for _ in range(3 if error else 0):  # a process that has closed its connections may take a while to end
            if self.heard or not all(isinstance(a, heartbeat.Report) for a in answers.values()):
                break
            time.sleep(0.5)
            answers = self.ask_all()
        if self.heard:
            return self.heard
        limit = f"--ddp_timeout {self.timeout_s:g} s" if error else f"--hang_timeout {self.hang_s:g} s"
        still = min(self.hang_s, self.timeout_s) / 2
        text = blame.explain(answers, self.own, limit, still_s=still, said=one_line(error, 160) if error else "")
        self.tell(text)
        return text
