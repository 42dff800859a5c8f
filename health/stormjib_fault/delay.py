"""Latency: a link on which every packet waits. By the kernel's netem where it has it, else by a forwarder of our own.

The forwarder: at the receiver, what comes from the sender is redirected to a TAP device; this program holds each packet for the wanted
time and writes it back, and because the TAP has the address of eth0 the packet goes up as if it had just arrived.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from stormjib_fault import shell, words
from stormjib_fault.fault import Fault
from stormjib_fault.network import DEVICE
from stormjib_fault.words import FaultError, Truth

TAP = "delayed"
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x1002
_BATCH = 64


class Latency(Fault):
    """What goes from victim to peer arrives later, so that a step takes about `severity` times as long."""

    name, row, severities, laboratory = "link-latency", "F12", (1.5, 3.0), True
    downstream = True

    def truth(self) -> Truth:
        return self.link_truth(words.COMMUNICATION_SLOW)

    @property
    def delay_s(self) -> float:
        """Added to every packet."""
        traffic = self.world.traffic
        return (self.draw.severity - 1) * traffic.step_s / traffic.rounds

    def arm(self) -> None:
        self._netns = self.peer.netns
        self._by_kernel = shell.has_netem()
        self._forwarder = None if self._by_kernel else start_forwarder(self._netns, self.delay_s)

    def inject(self) -> None:
        self._begun = True
        if self._by_kernel:
            for line in (
                f"qdisc add dev {DEVICE} root handle 1: prio",
                f"qdisc add dev {DEVICE} parent 1:3 handle 30: netem delay {self.delay_s * 1e3:.3f}ms",
                f"filter add dev {DEVICE} parent 1: protocol ip u32 match ip dst {self.peer.address}/32 flowid 1:3",
            ):
                shell.tc(self.victim.netns, *line.split())
            return
        match = f"protocol ip u32 match ip src {self.victim.address}/32"
        shell.tc(self._netns, *f"qdisc add dev {DEVICE} ingress".split())
        act = f"action mirred egress redirect dev {TAP}"
        shell.tc(self._netns, *f"filter add dev {DEVICE} parent ffff: {match} {act}".split())

    def heal(self) -> None:
        if getattr(self, "_begun", False):
            if self._by_kernel:
                shell.tc(self.victim.netns, "qdisc", "del", "dev", DEVICE, "root")
            else:
                shell.tc(self._netns, "qdisc", "del", "dev", DEVICE, "ingress")
            self._begun = False
        forwarder = getattr(self, "_forwarder", None)
        if forwarder is not None:
            forwarder.kill()
            forwarder.wait()
            self._forwarder = None

    def fired(self) -> str:
        if self._by_kernel:
            sent = int(shell.queue(self.victim.netns, DEVICE).get("packets", 0))
            return f"netem delayed {sent} packets" if sent else ""
        packets = int(shell.link(self._netns, TAP)["stats64"]["rx"]["packets"])
        return f"the forwarder delayed {packets} packets by {self.delay_s * 1e3:.1f} ms" if packets else ""


def start_forwarder(netns: str, delay_s: float) -> subprocess.Popen[str]:
    """The forwarder in a namespace, listening. Raises FaultError with its words when it cannot."""
    argv = [
        "nsenter",
        f"--net=/run/netns/{netns}",
        sys.executable,
        "-m",
        "stormjib_fault.delay",
        str(delay_s),
    ]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.stdout is None or (line := process.stdout.readline()) != "ready\n":
        process.kill()
        process.wait()
        raise FaultError(f"no packet can be delayed here: {line.strip() if process.stdout else 'no pipe'}")
    process.stdout.close()
    return process


def open_tap(name: str) -> int:
    """A TAP device of this namespace, up, with eth0's address, so that what it gets is for us."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP_NO_PI))
    for each in ("all", name):  # the source lives behind eth0, and the kernel must not mind
        Path(f"/proc/sys/net/ipv4/conf/{each}/rp_filter").write_text("0")
    shell.run("ip", "link", "set", "dev", name, "address", _mac(), "up")
    return descriptor


def _mac() -> str:
    """/sys shows the devices of the namespace that it was mounted in, which is not ours: ask the kernel."""
    for line in shell.run("ip", "-o", "link", "show", "dev", DEVICE).split("link/ether ")[1:]:
        return line.split()[0]
    raise FaultError(f"{DEVICE} has no address")


def forward(descriptor: int, delay_s: float) -> None:
    """Hold every packet for so long. Never returns."""
    held: deque[tuple[float, bytes]] = deque()
    while True:
        wait = None if not held else max(0.0, held[0][0] - time.monotonic())
        if select.select([descriptor], [], [], wait)[0]:
            _take(descriptor, held, time.monotonic() + delay_s)
        while held and held[0][0] <= time.monotonic():
            _give(descriptor, held.popleft()[1])


def _take(descriptor: int, held: deque[tuple[float, bytes]], due: float) -> None:
    for _ in range(_BATCH):
        try:
            held.append((due, os.read(descriptor, 65536)))
        except BlockingIOError:
            return


def _give(descriptor: int, packet: bytes) -> None:
    try:
        os.write(descriptor, packet)
    except BlockingIOError:
        return  # a full queue loses packets, as everywhere


if __name__ == "__main__":
    tap = open_tap(TAP)
    print("ready", flush=True)
    forward(tap, float(sys.argv[1]))
