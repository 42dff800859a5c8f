"""Connections: both ends joined by their address pair, what each usually costs, and which are in trouble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_health.engine.baseline import median

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stormjib_health.engine.thresholds import Thresholds
    from stormjib_health.wire import Edge, Sample

ENDS_PER_RANK = 1024
"""More ends of one rank are not remembered: nobody needs them, and a tenant may invent them."""
KEEP_BASE = 0.98
KEEP_RECENT = 0.5
"""What is left of the sums at the next sample: the baseline looks back 50 samples, the present two."""
LOSS_WEIGHT = 50.0
"""A twentieth of repeated bytes costs a connection a multiple of its time: 5 % counts like 3.5 x the time per byte."""


class End:
    """One end of one connection."""

    __slots__ = ("base", "local", "newest", "now", "rank", "remote", "samples")

    def __init__(self, edge: Edge) -> None:
        self.rank, self.local, self.remote = edge.rank, edge.local, edge.remote
        self.base = [0.0, 0.0, 0.0, 0.0]
        """Seconds busy, bytes sent, bytes repeated, seconds that passed: decayed sums of healthy time."""
        self.now = [0.0, 0.0, 0.0, 0.0]
        self.newest = edge
        self.samples = 0

    def take(self, edge: Edge, frozen: bool) -> None:
        """Counts since the last sample."""
        news = (edge.busy_s, float(edge.sent), float(edge.retransmitted), edge.over_s)
        self.now = [old * KEEP_RECENT + new for old, new in zip(self.now, news, strict=True)]
        if not frozen:
            self.base = [old * KEEP_BASE + new for old, new in zip(self.base, news, strict=True)]
            self.samples += 1
        self.newest = edge

    def factor(self) -> float:
        """Time per byte over what it was, losses counted in; 1.0 where nothing can be said."""
        (busy, sent, lost, _), (busy0, sent0, lost0, _) = self.now, self.base
        if min(busy, sent, busy0, sent0) <= 0:
            return 1.0
        losses = max(0.0, lost / sent - lost0 / sent0)
        return (busy / sent) / (busy0 / sent0) * (1 + LOSS_WEIGHT * losses)

    @property
    def rate(self) -> float:
        """Bytes sent a second, of late."""
        return self.now[1] / self.now[3] if self.now[3] > 0 else 0.0

    def lost(self) -> float:
        """Part of the time in which it is busy, and would not be at what its bytes used to cost."""
        (busy, sent, _, over), (busy0, sent0, _, _) = self.now, self.base
        return (busy - sent * busy0 / sent0) / over if over > 0 and sent0 > 0 else 0.0


@dataclass(frozen=True)
class Heat:
    """A connection that costs more than it did."""

    source: int
    """Rank that sends."""
    target: int
    factor: float
    lost: float
    """Part of the time."""
    end: End


@dataclass(frozen=True)
class Bad:
    """A connection on which nothing arrives."""

    source: int
    target: int
    end: End
    weight: int
    """Bytes that wait: of two directions the greater one is the one that is broken."""


class Edges:
    """All connections between ranks."""

    def __init__(self, slot_of: Mapping[int, int], limits: Thresholds) -> None:
        self._slot_of = slot_of
        self._limits = limits
        self._ends: dict[tuple[str, str], End] = {}
        self._count: dict[int, int] = {}
        self._trouble: dict[int, dict[tuple[str, str], float]] = {}
        self._hosts: dict[str, set[int]] = {}
        self.frozen = False
        """While something is suspicious, nothing is learned as normal."""

    def take(self, sample: Sample, now: float) -> None:
        """The connections of one sample; those in trouble stay so only if it says so again."""
        before = self._trouble.get(sample.slot, {})
        trouble = {}
        for edge in sample.edges:
            key = (edge.local, edge.remote)
            end = self._ends.get(key) or self._meet(key, edge)
            if end is None or end.rank != edge.rank:
                continue
            end.take(edge, self.frozen)
            if self._stalled(edge):
                trouble[key] = min(before.get(key, now), now - min(edge.last_ack_s, sample.over_s))
        self._trouble[sample.slot] = trouble

    def _meet(self, key: tuple[str, str], edge: Edge) -> End | None:
        count = self._count.get(edge.rank, 0)
        if count >= ENDS_PER_RANK:
            return None
        self._count[edge.rank] = count + 1
        self._hosts.setdefault(host(edge.local), set()).add(edge.rank)
        end = self._ends[key] = End(edge)
        return end

    def _stalled(self, edge: Edge) -> bool:
        """Data in flight and no word of it. A window that a stopped peer has closed has nothing in flight."""
        if edge.unacked <= 0:
            return False
        rto = edge.rto_s / (1 << min(edge.backoff, 16))  # the kernel doubles it each time
        limit = max(self._limits.edge_silent_s, self._limits.edge_rtos * rto)
        return edge.backoff >= 1 or edge.last_ack_s > limit

    def bad(self, now: float) -> list[Bad]:
        """Connections that stand, both ends known, one entry a pair of ranks: the direction with more to send."""
        found: dict[tuple[int, int], Bad] = {}
        for keys in self._trouble.values():
            for key, since in keys.items():
                end = self._ends[key]
                target = self._peer(end)
                if target is None or not self._lasts(end.newest, now - since):
                    continue
                pair = (min(end.rank, target), max(end.rank, target))
                bad = Bad(end.rank, target, end, end.newest.unsent + end.newest.unacked)
                if pair not in found or found[pair].weight < bad.weight:
                    found[pair] = bad
        return list(found.values())

    def _lasts(self, edge: Edge, seconds: float) -> bool:
        return edge.backoff >= 2 or seconds >= self._limits.edge_lasting_s

    def _peer(self, end: End) -> int | None:
        other = self._ends.get((end.remote, end.local))
        return None if other is None or other.rank == end.rank else other.rank

    def heats(self) -> tuple[list[Heat], int]:
        """Connections between slots that are hot, and how many of them can be judged at all."""
        known: list[Heat] = []
        for end in self._ends.values():
            if end.samples < self._limits.edge_samples or end.now[1] <= 0:
                continue
            target = self._peer(end)
            if target is not None and self._slot_of[target] != self._slot_of[end.rank]:
                known.append(Heat(end.rank, target, end.factor(), end.lost(), end))
        return self._hot(known), len(known)

    def _hot(self, known: list[Heat]) -> list[Heat]:
        usual = max(1.0, median(heat.factor for heat in _main(known)))
        common = self._limits.hot_ratio if usual < self._limits.hot_ratio else 1.0
        # Where most became slow together, all of them are hot: that is congestion, and it is told as such.
        limit = self._limits.hot_ratio if common == 1.0 else max(self._limits.hot_ratio, usual * 1.15)
        return [heat for heat in _main(known) if heat.factor > limit]

    def ranks_at(self, address: str) -> frozenset[int]:
        """Ranks with a connection whose own end has this address (no port)."""
        return frozenset(self._hosts.get(address, ()))


def _main(known: list[Heat]) -> list[Heat]:
    """Without the trickle: an end that sends next to nothing has no time per byte worth naming."""
    most = max((heat.end.now[1] for heat in known), default=0.0)
    return [heat for heat in known if heat.end.now[1] >= most / 100]


def host(address: str) -> str:
    """`10.0.0.1` of `10.0.0.1:80`, `fd00::1` of `[fd00::1]:80`."""
    return address.rpartition(":")[0].strip("[]")


def cover(pairs: Iterable[tuple[int, int, float]]) -> tuple[int, float, int]:
    """The slot that touches most of the weight of (slot, slot, weight), its part of it, and how many others it meets."""
    weight: dict[int, float] = {}
    met: dict[int, set[int]] = {}
    total = 0.0
    for a, b, heat in pairs:
        total += heat
        for one, other in ((a, b), (b, a)):
            weight[one] = weight.get(one, 0.0) + heat
            met.setdefault(one, set()).add(other)
    best = max(weight, key=lambda slot: (len(met[slot]), weight[slot]), default=-1)
    if best < 0 or total <= 0:
        return -1, 0.0, 0
    return best, weight[best] / total, len(met[best])


def log_heat(factor: float) -> float:
    """Weight of a factor: twice and four times as slow are one step apart."""
    return math.log(max(1.0, factor))
