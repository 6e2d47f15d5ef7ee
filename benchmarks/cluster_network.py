"""Hosts of our own on one machine, and a name server for them.

With root on Linux each host is a network namespace on a bridge, inside a namespace of their own: nothing of it is seen
outside, nothing can get out, and all of it goes with the process. Elsewhere hosts are addresses of the loopback
interface, which cannot be unplugged.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence

BRIDGE = "bridge0"
NET = "198.18.0."  # kept for benchmarks of networks (RFC 2544), so nobody's
INSIDE = "CLUSTER_IS_ISOLATED"  # set once we are in the namespace of our own


def isolate(module: str, argv: Sequence[str]) -> bool:
    """Go on inside a namespace of our own: runs `python -m module` there in place of this process.

    Returns: whether we are in it; False where that is not permitted.
    """
    if os.environ.get(INSIDE):
        return True
    own = ["unshare", "--net", "--mount"]
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    if subprocess.run([*own, "true"], check=False, capture_output=True).returncode:
        return False
    os.environ[INSIDE] = "1"
    return os.execvp(own[0], [*own, sys.executable, "-m", module, *argv])


class Namespaces:
    """Hosts as namespaces. Ours is the bridge's first address, where clients and the name server are."""

    def __init__(self) -> None:
        os.makedirs("/run/netns", exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run/netns"], check=True)  # names are files; ours alone
        self.here = NET + "1"
        _ip("link set lo up")
        _ip(f"link add {BRIDGE} type bridge forward_delay 0")
        _ip(f"address add {self.here}/24 dev {BRIDGE}")
        _ip(f"link set {BRIDGE} up")
        self._n = 1

    def add(self, name: str) -> str:
        """The address of a new host."""
        self._n += 1
        address = f"{NET}{self._n}"
        _ip(f"netns add {name}")
        _ip(f"link add to-{name} type veth peer name eth0 netns {name}")
        _ip(f"link set to-{name} master {BRIDGE} up")
        _ip(f"-n {name} address add {address}/24 dev eth0")
        _ip(f"-n {name} link set eth0 up")
        _ip(f"-n {name} link set lo up")
        return address

    def on(self, name: str) -> list[str]:
        """What to put before a command that is to run on a host."""
        return ["ip", "netns", "exec", name]

    def unplug(self, name: str) -> None:
        """From now on packets to and from a host are lost, as when its node dies."""
        _ip(f"link set to-{name} down")


class Loopback:
    """Hosts as addresses of the loopback interface."""

    here = "127.0.0.1"

    def __init__(self) -> None:
        self._n = 1

    def add(self, name: str) -> str:  # noqa: ARG002
        self._n += 1
        return f"127.0.1.{self._n}"

    def on(self, name: str) -> list[str]:  # noqa: ARG002
        return []

    def unplug(self, name: str) -> None:
        """Cannot be: its process is killed, and the kernel says so to clients at once."""


class NameServer:
    """Answers every question for an address with `addresses`, as the DNS of Kubernetes does for a headless Service."""

    def __init__(self, host: str) -> None:
        self.addresses: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            question, sender = self._socket.recvfrom(4096)
            self._socket.sendto(_answer(question, self.addresses), sender)


def _answer(message: bytes, addresses: Sequence[str]) -> bytes:
    """RFC 1035: the first question and, if it is for A records, one of each address with a second to live."""
    end = 12
    while message[end]:
        end += 1 + message[end]
    end += 5
    kind = struct.unpack("!H", message[end - 4 : end - 2])[0]
    found = [socket.inet_aton(address) for address in addresses] if kind == 1 else []
    header = message[:2] + struct.pack("!5H", 0x8400, 1, len(found), 0, 0)
    records = b"".join(struct.pack("!HHHIH", 0xC00C, 1, 1, 1, 4) + address for address in found)
    return header + message[12:end] + records


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
