"""Two agents measure a real link, healthy and broken in ways that a network breaks; each fault is shown to have fired."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from fakes.agents import SCRIPTS
from fakes.links import V4, V6, TwoHosts
from stormjib_health.confirm.transfer import BURST_BYTES, BURSTS, PINGS
from stormjib_health.engine import DEFAULT
from stormjib_health.wire import Answer
from stormjib_runtime import codec
from stormjib_runtime.environment import join_address

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "token-of-the-job"
WHOLE = BURSTS * BURST_BYTES
LATE_S = 0.4
"""What a busy machine may add to a limit."""


class Pair:
    """An agent's measuring half on each of two hosts."""

    def __init__(self, hosts: TwoHosts) -> None:
        self.hosts = hosts
        self._agents = [self._start(host) for host in range(2)]
        self._ports = [int(self._line(agent)) for agent in self._agents]

    def measure(self, host: int, limit_s: float = 1.0, addresses: tuple[str, str] = V4) -> Answer:
        """What the agent on `host` measures of the path to the other one. Never takes longer than its limit."""
        peer = join_address(addresses[1 - host], self._ports[1 - host])
        agent = self._agents[host]
        assert agent.stdin is not None
        begin = time.monotonic()
        agent.stdin.write(f"{peer} {limit_s}\n".encode())
        agent.stdin.flush()
        line = self._line(agent)
        assert time.monotonic() - begin < limit_s + LATE_S
        return codec.decode(Answer, line)

    def close(self) -> None:
        for agent in self._agents:
            agent.communicate(timeout=10)

    def _start(self, host: int) -> subprocess.Popen[bytes]:
        argv = [*self.hosts.inside(host), sys.executable, str(SCRIPTS / "measuring.py"), TOKEN]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _line(self, agent: subprocess.Popen[bytes]) -> bytes:
        assert agent.stdout is not None
        return agent.stdout.readline()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with TwoHosts() as hosts:
        one = Pair(hosts)
        try:
            yield one
        finally:
            one.close()


@pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_healthy_link_is_measured_whole_both_ways(pair: Pair, addresses: tuple[str, str]) -> None:
    for host in range(2):
        answer = pair.measure(host, addresses=addresses)
        assert (answer.ok, answer.bytes, answer.text) == (True, WHOLE, "")
        print(f"{answer.bytes / answer.seconds / 1e6:.0f} MB/s, shortest ping {answer.rtt_s * 1e6:.0f} us")
        assert 0 < answer.rtt_s < 0.05


def test_one_direction_dropped_is_an_answer_within_the_limit(pair: Pair) -> None:
    assert pair.measure(0).ok
    pair.hosts.drop(0)
    for host in range(2):  # TCP needs both directions, so a path back that is dead looks the same
        answer = pair.measure(host, 0.5)
        assert not answer.ok
        assert answer.text.startswith(f"connection to {V4[1 - host]}:")
        assert answer.text.endswith("not done in 0.50 s")
    assert pair.hosts.dropped(0) > 0


def test_a_path_that_takes_small_packets_only_answers_pings(pair: Pair) -> None:
    """A wrong MTU somewhere between: a connection and its pings pass, a transfer does not."""
    pair.hosts.drop(0, "-m", "length", "--length", "1000:65535")
    answer = pair.measure(0)
    assert (answer.ok, answer.bytes) == (False, 0)
    assert answer.rtt_s > 0
    assert f"0 of {WHOLE} bytes, {PINGS} of {PINGS} pings" in answer.text
    assert pair.hosts.dropped(0) > 0
    assert pair.measure(1).bytes == WHOLE  # the other way the large ones pass


def test_a_slow_direction_is_told_from_the_other(pair: Pair) -> None:
    pair.hosts.slow(0, "40mbit")
    slow, fast = pair.measure(0), pair.measure(1)
    rate = slow.bytes / slow.seconds
    print(
        f"shaped to 5 MB/s: {rate / 1e6:.1f} MB/s, the other way {fast.bytes / fast.seconds / 1e6:.0f} MB/s"
    )
    assert (slow.bytes, fast.bytes) == (WHOLE, WHOLE)
    assert 3e6 < rate < 7e6  # the bucket lets an eighth pass at once
    assert fast.bytes / fast.seconds > 2 * rate
    assert pair.hosts.sent_shaped(0) > WHOLE


def test_a_link_too_slow_for_the_whole_still_gives_its_rate(pair: Pair) -> None:
    pair.hosts.slow(0, "4mbit")
    answer = pair.measure(0)
    assert answer.ok
    assert 0 < answer.bytes < WHOLE
    assert f"{answer.bytes} of {WHOLE} bytes" in answer.text
    assert 0.25e6 < answer.bytes / answer.seconds < 1e6
    assert pair.hosts.sent_shaped(0) > answer.bytes


def test_what_is_lost_on_the_way_is_counted_by_who_sends_it(pair: Pair) -> None:
    assert pair.measure(0).again == 0
    pair.hosts.lose(1, every=25)
    there, back = pair.measure(0), pair.measure(1)
    assert pair.hosts.dropped(1) > 0
    assert there.again >= DEFAULT.burst_again, (
        f"of {there.bytes} bytes, {pair.hosts.dropped(1)} packets dropped: {there.text}"
    )
    assert back.again < DEFAULT.burst_again, "only its acknowledgements are lost"


def test_a_pulled_cable_is_an_answer(pair: Pair) -> None:
    pair.hosts.pull(1)
    answer = pair.measure(0, 0.3)
    assert not answer.ok
    assert "connection to" in answer.text
