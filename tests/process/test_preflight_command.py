"""The preflight as a Job runs it: on a host that is well, and on one whose links are slow."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import pytest

from fakes.agents import SCRIPTS
from fakes.links import V4, TwoHosts
from stormjib_health.confirm.transfer import measuring_token
from stormjib_runtime import codec
from stormjib_runtime.preflight import Preflight
from stormjib_runtime.wire import Env

pytestmark = pytest.mark.timeout(150)
SECRET = "token-of-the-agents"


def run(hosts: TwoHosts, *words: str) -> tuple[int, str]:
    """Run it on host 0."""
    argv = [*hosts.inside(0), sys.executable, "-m", "stormjib_runtime.preflight", *words]
    env = {**os.environ, Env.TOKEN: SECRET}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False, env=env)
    assert done.stderr == ""
    return done.returncode, done.stdout


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_command_judges_a_host_and_a_path() -> None:
    with TwoHosts() as hosts:
        argv = [*hosts.inside(1), sys.executable, str(SCRIPTS / "measuring.py"), measuring_token(SECRET)]
        peer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert peer.stdout is not None
            address = f"{V4[1]}:{int(peer.stdout.readline())}"
            a_host_that_is_well(hosts, address)
            a_host_with_slow_links(hosts, address)
        finally:
            peer.communicate(timeout=10)


def a_host_that_is_well(hosts: TwoHosts, address: str) -> None:
    begin, before = time.monotonic(), cpu_of_children()
    code, said = run(hosts, "--peer", address, "--json")
    cpu = cpu_of_children() - before
    print(f"{time.monotonic() - begin:.1f} s, processor {cpu:.1f} s: {said}")
    result = codec.decode(Preflight, said)
    assert (code, result.ok) == (0, True), result.why
    assert [check.name for check in result.checks] == ["memory", "compute cpu", "loopback", "pair"]
    assert cpu < 10  # of processor time, because every core here may be shared; most of it imports torch


def a_host_with_slow_links(hosts: TwoHosts, address: str) -> None:
    hosts.slow(0, "4mbit")
    hosts.slow(0, "40mbit", link="lo")
    code, said = run(hosts, "--peer", address)
    print(said)
    assert code == 1
    assert "pair 0.000" in said
    assert "is slow: any node does 0.001" in said
    assert "loopback 0.00" in said
    assert "is slow: any node does 0.01" in said
    assert hosts.sent_shaped(0) > 0
    assert hosts.sent_shaped(0, "lo") > 0
