"""Runs the tools of the network, in a namespace, and says what they said when they fail."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from stormjib_fault.words import FaultError, Refused

LIMIT_S = 20.0


def run(*argv: str) -> str:
    """Standard output. Raises FaultError with the tool's own words, Refused where there is no such tool."""
    if shutil.which(argv[0]) is None:
        raise Refused(f"{argv[0]} is not installed")
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise FaultError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def inside(netns: str, *argv: str) -> str:
    """The same in a network namespace. `ip netns exec` would mount a fresh /sys besides."""
    return run("nsenter", f"--net=/run/netns/{netns}", *argv)


def tc(netns: str, *words: str) -> str:
    """Traffic control in a namespace."""
    return run("tc", "-n", netns, *words)


def queue(netns: str, device: str) -> dict[str, Any]:
    """Kind and counters of a device's root queue."""
    found = json.loads(run("tc", "-n", netns, "-s", "-j", "qdisc", "show", "dev", device, "root") or "[]")
    return found[0] if found else {}


def link(netns: str, device: str) -> dict[str, Any]:
    """State and counters of a device; empty where it is gone."""
    found = json.loads(run("ip", "-n", netns, "-j", "-s", "link", "show", "dev", device) or "[]")
    return found[0] if found else {}


def has_netem() -> bool:
    """Whether this kernel can delay packets by itself. Asks it, in a namespace that lasts as long as the question."""
    try:
        run("unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except FaultError:
        return False
    return True
