"""Two hosts with one cable between them, each a network namespace of this machine; needs root. Faults are the kernel's own."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Self

V4 = ("10.213.0.1", "10.213.0.2")
V6 = ("fd00:213::1", "fd00:213::2")
MAC = ("02:00:00:00:02:01", "02:00:00:00:02:02")


def command(*words: str) -> str:
    """Run a program; its output. Raises CalledProcessError with what it said."""
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=20).stdout


class TwoHosts:
    """Use as a context manager; host 0 and host 1. Whoever started a process there ends it first."""

    def __init__(self) -> None:
        self.names = tuple(f"stormjib-test-{os.getpid()}-{host}" for host in range(2))

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                command("ip", "netns", "add", name)
            ends = [
                ["name", "eth0", "address", MAC[host], "netns", name] for host, name in enumerate(self.names)
            ]
            command("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for host, (name, v4, v6) in enumerate(zip(self.names, V4, V6, strict=True)):
                command("ip", "-n", name, "address", "add", f"{v4}/24", "dev", "eth0")
                # Without the search for a double the address can be used at once.
                command("ip", "-n", name, "address", "add", f"{v6}/64", "dev", "eth0", "nodad")
                for link in ("lo", "eth0"):
                    command("ip", "-n", name, "link", "set", link, "up")
                # The first question for a neighbour may find a link that is just up, and the second comes a second later.
                for peer in (V4[1 - host], V6[1 - host]):
                    command("ip", "-n", name, "neigh", "add", peer, "lladdr", MAC[1 - host], "dev", "eth0")
        except subprocess.CalledProcessError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)

    def inside(self, host: int) -> list[str]:
        """What stands before a command line that shall run on a host."""
        return ["nsenter", f"--net=/run/netns/{self.names[host]}"]

    def drop(self, host: int, *match: str) -> None:
        """Drop what a host sends, from now on; `match` in the words of iptables."""
        command(*self.inside(host), "iptables", "-A", "OUTPUT", "-o", "eth0", *match, "-j", "DROP")

    def lose(self, host: int, every: int) -> None:
        """Lose one of so many packets that a host is sent, as a wire has them: cables here hand on 64 KiB at once.

        Those that open a connection pass: where one of them is lost, the kernel waits a second, and that is another fault.
        """
        command("ip", "-n", self.names[1 - host], "link", "set", "eth0", "gso_max_segs", "1")
        opened = ("-p", "tcp", "!", "--tcp-flags", "SYN", "SYN")
        nth = ("-m", "statistic", "--mode", "nth", "--every", str(every), "--packet", "0")
        command(*self.inside(host), "iptables", "-A", "INPUT", "-i", "eth0", *opened, *nth, "-j", "DROP")

    def dropped(self, host: int) -> int:
        """Packets dropped so far: the proof that a fault has fired."""
        listed = command(*self.inside(host), "iptables", "-nvxL")
        return sum(int(count) for count in re.findall(r"^\s*(\d+)\s+\d+\s+DROP", listed, re.MULTILINE))

    def slow(self, host: int, rate: str, link: str = "eth0") -> None:
        """Send no faster than `rate` (`8mbit`), by a token bucket of one packet of any size."""
        shape = ["tbf", "rate", rate, "burst", "128kb", "latency", "2s"]
        command("tc", "-n", self.names[host], "qdisc", "add", "dev", link, "root", *shape)

    def sent_shaped(self, host: int, link: str = "eth0") -> int:
        """Bytes that have passed the token bucket."""
        listed = command("tc", "-n", self.names[host], "-s", "qdisc", "show", "dev", link)
        return int(re.search(r"tbf.*?Sent (\d+) bytes", listed, re.DOTALL)[1])  # type: ignore[index]

    def pull(self, host: int) -> None:
        """Take the cable out at one end."""
        command("ip", "-n", self.names[host], "link", "set", "eth0", "down")
