"""Two hosts on one machine: network namespaces with a cable between them, and host names that nothing resolves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000


@dataclass(frozen=True)
class Host:
    """A namespace, the end of the cable in it, and its address there; `name` is the host name of what runs in it."""

    name: str
    namespace: str
    link: str
    address: str

    def run(self, *command: str) -> list[str]:
        """The command line that runs a command on this host."""
        rename = f'echo {self.name} > /proc/sys/kernel/hostname && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", rename, "sh", *command]

    def enter(self) -> None:
        """Takes the calling process there; its later threads and children follow."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", self.namespace).open() as place:
            if libc.setns(place.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")
        Path("/proc/sys/kernel/hostname").write_text(self.name)

    def cut(self) -> None:
        """Takes the cable out."""
        subprocess.run(["ip", "-n", self.namespace, "link", "set", self.link, "down"], check=True)


def obstacle() -> str:
    """Why this machine cannot have such hosts; empty when it can."""
    missing = [tool for tool in ("ip", "unshare") if not shutil.which(tool)]
    if missing:
        return f"needs {' and '.join(missing)} (packages iproute2, util-linux)"
    if os.geteuid():
        return "needs root, to make network namespaces"
    try:
        with two_hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.decode().strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """hosta and hostb, 10.77.0.1 and .2; whatever happens, both are gone afterwards, and the cable with them."""
    tag = uuid.uuid4().hex[:8]  # a link's name has 15 characters at most
    hosts = tuple(Host(f"host{x}", f"hdp{x}{tag}", f"hdp{x}{tag}", f"10.77.0.{n}") for n, x in ((1, "a"), (2, "b")))
    a, b = hosts
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip("-n", a.namespace, "link", "add", a.link, "type", "veth", "peer", "name", b.link, "netns", b.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.link)
            _ip("-n", host.namespace, "link", "set", host.link, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield a, b
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
