"""Who of a group reads what several of them want, or what only one of them has near: everybody works it out alone, and alike. Pure.

Bytes that many ranks want (replicas do) are read once, by one of them, and handed on; so are those that lie in the memory of another
rank's node. As in two-phase collective I/O (Thakur et al., Frontiers 1999), the storage sees each byte once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

MANY = 3
"""From so many ranks on it is quicker to hand bytes on than to read them again; for two it is not (Orbax: 0.79x at 2, 4.9x at 32)."""


class Key(NamedTuple):
    """Bytes of a file: the rank whose file it is, the first byte, and how many."""

    rank: int
    start: int
    length: int


class Runs(NamedTuple):
    """What is wanted of them: the same part of each of some equal rows. All of them are one row."""

    rows: int
    skip: int
    run: int

    @property
    def length(self) -> int:
        return self.rows * self.run


class Handing(NamedTuple):
    """What one member of the group reads for others, and what each of them is to get of it."""

    key: Key
    owner: int
    receivers: dict[int, Runs]


def handings(wishes: Sequence[Mapping[Key, Runs]], near: Sequence[Collection[int]]) -> list[Handing]:
    """What is read by one and handed on, in the order of the files. Member i wants `wishes[i]`, and has the files of the ranks
    `near[i]` in its node's memory. All else everybody reads by itself."""
    wanting: defaultdict[Key, dict[int, Runs]] = defaultdict(dict)
    for member, wanted in enumerate(wishes):
        for key, runs in wanted.items():
            wanting[key][member] = runs
    having: defaultdict[int, list[int]] = defaultdict(list)
    for member, ranks in enumerate(near):
        for rank in ranks:
            having[rank].append(member)
    load = [0] * len(wishes)
    found = []
    for key in sorted(wanting, key=lambda key: (-key.length, key)):
        owners, receivers = _sides(key, wanting[key], having.get(key.rank, []))
        if receivers:
            owner = min(owners, key=lambda member: (load[member], member))
            load[owner] += key.length
            others = {member: wanting[key][member] for member in receivers if member != owner}
            found.append(Handing(key, owner, others))
    return sorted(found, key=lambda one: one.key)


def _sides(
    key: Key, wanting: Mapping[int, Runs], having: Sequence[int]
) -> tuple[Collection[int], Collection[int]]:
    """Who may read it, and who is to get it then; nobody where each reads for itself."""
    if having:
        return having, [member for member in wanting if member not in having]
    in_parts = any(runs.length < key.length for runs in wanting.values())
    return wanting, wanting if len(wanting) >= (2 if in_parts else MANY) else ()


def rounds(all_: Sequence[Handing], members: int, window: int) -> Iterator[list[Handing]]:
    """The handings in rounds, in each of which no member sends or gets more than half of `window` bytes, or else one request."""
    quota = window // (2 * members)
    of_owner: defaultdict[int, list[Handing]] = defaultdict(list)
    for one in all_:
        of_owner[one.owner].append(one)
    left = [_packed(some, quota) for _, some in sorted(of_owner.items())]
    while left:
        now = [next(packs, None) for packs in left]
        left = [packs for packs, pack in zip(left, now, strict=True) if pack is not None]
        if left:
            yield [one for pack in now if pack is not None for one in pack]


def _packed(some: Sequence[Handing], quota: int) -> Iterator[list[Handing]]:
    """Consecutive ones, as many as one receiver takes in a round."""
    pack: list[Handing] = []
    size = 0
    for one in some:
        if pack and size + one.key.length > quota:
            yield pack
            pack, size = [], 0
        pack.append(one)
        size += one.key.length
    if pack:
        yield pack
