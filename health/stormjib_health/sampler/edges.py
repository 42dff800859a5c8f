"""What the kernel says of the ranks' connections, as changes since the coordinator last heard. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stormjib_health.wire import Edge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stormjib_health.sampler.sockets import Socket

MAX_EDGES = 64
HEALTHY_PER_S = 20
"""Healthy connections are told in turn, so many a second, because all at once do not fit a small message."""
MIN_HEALTHY = 4
STUCK_SAMPLES = 3
"""So many samples in a row with the same unread bytes: their owner does not run."""
SILENT_MS = 500
"""Data in flight and no acknowledgement for so long is trouble."""
RTT_TIMES, RTT_FLOOR_US = 4, 5_000
"""A round trip of so many times the shortest one seen, and above the floor, is trouble: a queue stands somewhere."""


@dataclass
class Track:
    """One connection of a rank."""

    rank: int
    told: Socket
    """As it was when the coordinator last heard of it, or when it was first seen."""
    told_at: float
    now: Socket
    same: int = 0
    """Samples in a row in which unread bytes lay there and did not change."""
    rtt_us: int = field(default=1 << 30)

    @property
    def stuck(self) -> bool:
        return self.same >= STUCK_SAMPLES

    @property
    def moved(self) -> int:
        """Bytes in both directions since it was told."""
        return self.now.sent - self.told.sent + self.now.received - self.told.received

    @property
    def trouble(self) -> int:
        """0 for none; the more the worse."""
        one = self.now
        if one.backoff:
            return 1000 + one.backoff
        if self.stuck:
            return 500
        if one.unacked and one.last_ack_ms >= SILENT_MS:
            return 400
        if one.retransmitted > self.told.retransmitted:
            return 300
        return 200 if one.rtt_us > max(RTT_FLOOR_US, RTT_TIMES * self.rtt_us) else 0

    def take(self, one: Socket) -> None:
        """Take one more sample."""
        unchanged = (one.unread, one.received) == (self.now.unread, self.now.received)
        self.same = 0 if not one.unread else self.same + 1 if unchanged else 1
        self.now = one
        if one.rtt_us:
            self.rtt_us = min(self.rtt_us, one.rtt_us)

    def edge(self, now: float) -> Edge:
        """As it is told."""
        one, before = self.now, self.told
        return Edge(
            rank=self.rank,
            local=one.local,
            remote=one.remote,
            sent=one.sent - before.sent,
            received=one.received - before.received,
            retransmitted=one.retransmitted - before.retransmitted,
            busy_s=(one.busy_us - before.busy_us) / 1e6,
            rtt_s=one.rtt_us / 1e6,
            rto_s=one.rto_us / 1e6,
            backoff=one.backoff,
            unacked=one.unacked or int(one.blocked),
            last_ack_s=one.last_ack_ms / 1e3,
            unread=one.unread,
            unsent=one.unsent,
            over_s=now - self.told_at,
        )


class Edges:
    """All connections of an agent's ranks, by inode."""

    def __init__(self) -> None:
        self.unread: Counter[int] = Counter()
        """By rank: connections whose received bytes it does not take."""
        self.backing_off: set[int] = set()
        """Ranks with a connection whose retransmission timer has expired."""
        self._tracks: dict[int, Track] = {}
        self._flight: list[tuple[int, Socket, float]] = []

    def take(self, now: float, sockets: Iterable[tuple[int, Socket]]) -> None:
        """One more sample: (rank, connection). What is not there any more is forgotten."""
        before, self._tracks = self._tracks, {}
        for rank, one in sockets:
            track = before.get(one.inode)
            if track is None or track.now.identity != one.identity:
                track = Track(rank, one, now, one)
            track.take(one)
            self._tracks[one.inode] = track
        tracks = self._tracks.values()
        self.unread = Counter(track.rank for track in tracks if track.stuck)
        self.backing_off = {track.rank for track in tracks if track.now.backoff}

    def edges(self, now: float, over_s: float) -> tuple[Edge, ...]:
        """What to tell: all that is in trouble, the worst first; of the rest what moved, and was not told for longest."""
        chosen = self._chosen(over_s)
        self._flight = [(track.now.inode, track.now, now) for track in chosen]
        return tuple(track.edge(now) for track in chosen)

    def told(self) -> None:
        """The coordinator has what `edges` gave last."""
        for inode, one, at in self._flight:
            track = self._tracks.get(inode)
            if track is not None and track.now.identity == one.identity:
                track.told, track.told_at = one, at

    def _chosen(self, over_s: float) -> Sequence[Track]:
        troubled = [track for track in self._tracks.values() if track.trouble]
        troubled.sort(key=lambda track: (-track.trouble, -track.moved))
        healthy = [track for track in self._tracks.values() if not track.trouble and track.moved]
        healthy.sort(key=lambda track: (track.told_at, -track.moved))
        room = min(MAX_EDGES - len(troubled), max(MIN_HEALTHY, int(HEALTHY_PER_S * over_s)))
        return [*troubled[:MAX_EDGES], *healthy[: max(0, room)]]
