"""Replicas of one shard hold the same bits; who differs from most of the others is wrong."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

NOBODY = -1


class Dissent(NamedTuple):
    """Replicas of a shard differ. `accused` is NOBODY where no majority can say who is wrong."""

    accused: int
    votes: int
    """Replicas that agree with each other against the accused; at a tie, the most that agree."""


def dissents(digests: Sequence[Hashable], groups: Sequence[Sequence[int]]) -> tuple[Dissent, ...]:
    """Who differs. `digests` has one entry a rank, `groups` the ranks that hold the same shard.

    Empty where all agree. With two replicas a difference is found, and nobody is named.
    """
    return tuple(dissent for group in groups for dissent in _group(digests, group))


def _group(digests: Sequence[Hashable], group: Sequence[int]) -> list[Dissent]:
    counts = Counter(digests[rank] for rank in group)
    if len(counts) < 2:
        return []
    (most, votes), *_ = counts.most_common(1)
    if 2 * votes <= len(group):
        return [Dissent(NOBODY, votes)]
    return [Dissent(rank, votes) for rank in group if digests[rank] != most]


def replica_groups(world: int, replicas: int) -> tuple[tuple[int, ...], ...]:
    """The ranks that hold the same shard, on a mesh of (replicas, shards) in rank order."""
    shards = world // replicas
    return tuple(tuple(range(shard, world, shards)) for shard in range(shards))


def replicas_of(world: int, wanted: int) -> int:
    """How many replicas a world gets: the most that divide it and are not more than wanted. A job that shrank to a
    size that does not divide goes on with fewer."""
    return next(count for count in range(min(wanted, world), 0, -1) if world % count == 0)
