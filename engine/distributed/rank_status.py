"""What every rank of a run is doing, asked over TCP when something went wrong.

The error of a failed collective says little: gloo names a socket that was closed (often that of a neighbour, which
noticed first), and NCCL ends the process without any exception. So every rank runs a `StatusServer`, a port that sends
its heartbeat (`heartbeat.Report`) to whoever connects, and queries the others' after a failure:

* a report          the process is alive, and this is where it is;
* "unresponsive"    the kernel accepted the connection, the process sent nothing: stopped, or stuck holding the GIL;
* "exited"          connection refused: the host is up, the process is not;
* "no answer"       the host is gone, or the network to it;
* "not reachable"   a rank without a port that others could connect to.

Servers also receive messages: a rank that fails, or has found which rank hangs, tells all others before it exits.
Messages carry a token that only the ranks of this run know, so that no other connection can end a run.

`diagnosis` interprets the answers, `watchdog` decides when to query. No rank queries in a run that makes progress.
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
from . import diagnosis, heartbeat
from .diagnosis import Answer, Place

MAX_CONNECTIONS = 64  # at a time
MAX_LINE_BYTES = 4096
CLIENT_TIMEOUT_S = 2.0  # for a client of the server


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
    """A port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def own_address(master_addr: str) -> str:
    """This host's address on the network that rank 0 is reached by; a loopback address where there is none.

    Connecting a datagram socket looks up a route and sends nothing. The second address is reserved and in nobody's use:
    many hosts resolve their own name, and so rank 0's, to a loopback address.
    """
    for destination in (master_addr, "192.0.2.1"):
        with contextlib.suppress(OSError):
            family, kind, _, _, where = socket.getaddrinfo(destination, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(where)
                address = probe.getsockname()[0]
            if not is_loopback(address):
                return address
    return "127.0.0.1"


# --- servers and queries -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rank(Place):
    """A rank's host by name and address, and the port of its server; port 0 where no other host can connect."""

    port: int

    def query(self, timeout: float, message: bytes = b"") -> Answer:
        """Its answer; sends it a message, if any."""
        if self.port == 0:
            return "not reachable"
        try:
            line = socket.create_connection((self.address, self.port), timeout=timeout)
        except ConnectionRefusedError:
            return "exited"
        except OSError:
            return "no answer"
        with line:
            try:
                line.sendall(message)
                return heartbeat.Report.from_line(_read_line(line))
            except ConnectionError:
                return "exited"
            except (OSError, ValueError, TypeError):
                return "unresponsive"


class StatusServer:
    """This rank's server. Attributes: port; received: the first message, or empty."""

    def __init__(self, address: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=1024)
        self.port, self.received, self._token = self._socket.getsockname()[1], "", token
        threading.Thread(target=self._accept, name="status server", daemon=True).start()

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a client that disconnected
                client = self._socket.accept()[0]
                # one thread each: a client that sends nothing must not block others
                threading.Thread(target=self._receive, args=(client,), name="status client", daemon=True).start()

    def _receive(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError), client:  # anything may be sent
            client.settimeout(CLIENT_TIMEOUT_S)
            client.sendall(heartbeat.report().to_line())
            message = json.loads(_read_line(client))
            if secrets.compare_digest(message["token"], self._token):
                self.received = self.received or str(message["text"])


def _read_line(line: socket.socket) -> bytes:
    """Up to a newline. Raises ConnectionError when the other side closes first, as a process that exits does."""
    read = b""
    while not read.endswith(b"\n") and len(read) < MAX_LINE_BYTES:
        part = line.recv(MAX_LINE_BYTES)
        if not part:
            raise ConnectionResetError
        read += part
    return read


def query_timeout(limit_s: float) -> float:
    """Seconds to wait for an answer."""
    return min(2.0, limit_s / 30)


class RankGroup:
    """All ranks of a run, as seen by one of them.

    Args:
        rank: this one. ranks: all, in rank order.
        timeout_s: of a collective. hang_s: how long the run may make no progress. Messages name both.
        server, token: of this rank, and of the run.
    """

    def __init__(
        self,
        rank: int,
        ranks: list[Rank],
        timeout_s: float,
        hang_s: float,
        *,
        server: StatusServer | None = None,
        token: str = "",
    ) -> None:
        self.own, self.ranks, self.timeout_s, self.hang_s = ranks[rank], ranks, timeout_s, hang_s
        self._server, self._token = server, token
        self._reporting = threading.Lock()

    @classmethod
    def connect(cls, address: str, timeout_s: float, hang_s: float) -> RankGroup:
        """Starts this rank's server and exchanges addresses with all others; collective."""
        rank = dist.get_rank()
        token = consensus.from_rank0(lambda: secrets.token_hex(16))
        server = StatusServer(address, token)
        own = Rank(rank, socket.gethostname(), address, server.port)
        ranks = consensus.gather(own)
        if len({peer.host for peer in ranks}) > 1:  # another host's loopback address would be our own
            ranks = [Rank(p.rank, p.host, p.address, 0) if is_loopback(p.address) else p for p in ranks]
        return cls(rank, ranks, timeout_s, hang_s, server=server, token=token)

    def claim_report(self) -> bool:
        """True for the first caller only: the exception and the watchdog may both find the same loss."""
        return self._reporting.acquire(blocking=False)

    @property
    def received(self) -> str:
        """The first message of another rank before it exited, or empty."""
        return self._server.received if self._server else ""

    def _query(self, ranks: list[Rank], message: bytes = b"") -> dict[Rank, Answer]:
        with ThreadPoolExecutor(min(MAX_CONNECTIONS, max(1, len(ranks)))) as pool:
            answers = pool.map(lambda rank: rank.query(query_timeout(self.hang_s), message), ranks)
            return dict(zip(ranks, answers, strict=True))

    @property
    def _others(self) -> list[Rank]:
        return [p for p in self.ranks if p is not self.own]

    def query_all(self) -> dict[Rank, Answer]:
        """The answers of all ranks, with this rank's own report."""
        answers = self._query(self._others)
        return {p: answers.get(p, None) or heartbeat.report() for p in self.ranks}

    def next_rank_exited(self) -> bool:
        """Whether the next rank's process has exited. All ranks check their next, so one of them notices any exit."""
        following = self.ranks[(self.own.rank + 1) % len(self.ranks)]
        return following is not self.own and following.query(query_timeout(self.hang_s)) == "exited"

    def is_lowest_on_host(self) -> bool:
        """Whether no lower rank of this host answers."""
        lower = [p for p in self.ranks[: self.own.rank] if p.address == self.own.address]
        return all(answer in ("exited", "no answer", "unresponsive") for answer in self._query(lower).values())

    def broadcast(self, text: str) -> None:
        """Tells all other ranks why the run cannot continue."""
        message = json.dumps({"token": self._token, "text": text[: MAX_LINE_BYTES // 4]}).encode() + b"\n"
        self._query(self._others, message)

    def broadcast_failure(self, error: BaseException) -> None:
        """Tells all other ranks, before this process exits, what failed and where."""
        self.broadcast(f"{diagnosis.places([self.own])} failed in {heartbeat.report().place} ({one_line(error)})")

    def explain(self, step: int, error: BaseException | None = None) -> LostError:
        """What was lost, in one line, from another rank's message or from all answers; tells the others.

        Args:
            step: the last one that was done.
            error: of the collective that failed; None when the run was found standing still.
        """
        text = self.received or self._diagnose(error)
        return LostError(f"rank {self.own.rank} on {self.own.host} lost its peers after step {step}: {text}")

    def _diagnose(self, error: BaseException | None) -> str:
        answers = self.query_all()
        for _ in range(3 if error else 0):  # a process that has closed its connections may take a while to end
            if self.received or not all(isinstance(a, heartbeat.Report) for a in answers.values()):
                break
            time.sleep(0.5)
            answers = self.query_all()
        if self.received:
            return self.received
        limit = f"--ddp_timeout {self.timeout_s:g} s" if error else f"--hang_timeout {self.hang_s:g} s"
        still = min(self.hang_s, self.timeout_s) / 2
        text = diagnosis.diagnose(
            answers, self.own, limit, still_s=still, backend_error=one_line(error, 160) if error else ""
        )
        self.broadcast(text)
        return text
