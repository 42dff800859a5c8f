"""The proof of a load: what all ranks have read of an atom adds up to the digest that its savers wrote down (FORMAT.md §12). Pure.

A digest adds up over any partition, so nobody needs a whole tensor: each rank digests its own part, and one sum over the group shows
whether all of it is right. Where several ranks hold an element it counts for its share of a common multiple.
"""

from __future__ import annotations

from collections import defaultdict
from math import lcm, prod
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stormjib_checkpoint.index import IndexAtom

MODULUS = 1 << 64
MOST = 1 << 20
"""What copies are weighed with is no more than this: times the elements of an atom it fits into 64 bits."""


class Group(Protocol):
    """Those who load together. Every one calls the same, in the same order, with as many numbers."""

    @property
    def size(self) -> int: ...

    @property
    def member(self) -> int:
        """Number of this one."""

    def summed(self, numbers: Sequence[int]) -> list[int]:
        """Sums over all members, modulo 2^64."""

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """The highest of all members; numbers are from 0 to 2^63-1."""

    def gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of each member, who may have different counts of them."""

    def swapped(self, outgoing: Sequence[bytes | bytearray], incoming: Sequence[int]) -> list[memoryview]:
        """Bytes for each member, for as many as it says that it will get from each."""


class Alone:
    """A rank that loads by itself."""

    size = 1
    member = 0

    def summed(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers)

    def highest(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers)

    def gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        return [list(numbers)]

    def swapped(self, outgoing: Sequence[bytes | bytearray], incoming: Sequence[int]) -> list[memoryview]:
        return [memoryview(own) for own in outgoing]


class Share(NamedTuple):
    """What one rank has read for one of its boxes."""

    atom: str
    copies: int
    """How many of the group hold each of its elements."""
    elements: int
    digest: int


def unproved(shares: Iterable[Share], atoms: Mapping[str, IndexAtom], group: Group) -> list[str]:
    """The atoms that somebody of the group has read otherwise than they were written, or not all of; on every member the same.

    `atoms` are all that the group loads, each under one name, the same for all. Those without a digest cannot be proved so, and are not
    looked at.
    """
    names = sorted(name for name, atom in atoms.items() if atom.digest is not None)
    mine: defaultdict[str, list[Share]] = defaultdict(list)
    for share in shares:
        mine[share.atom].append(share)
    multiples = _multiples(names, mine, group)
    sums: list[int] = []
    for name, multiple in zip(names, multiples, strict=True):
        weights = [(share, multiple // share.copies) for share in mine[name]]
        sums.append(sum(share.digest * weight for share, weight in weights) % MODULUS)
        sums.append(sum(share.elements * weight for share, weight in weights) % MODULUS)
    folded = iter(group.summed(sums))
    rows = zip(names, multiples, folded, folded, strict=True)
    return [
        name for name, multiple, digest, count in rows if not _holds(atoms[name], multiple, digest, count)
    ]


def _multiples(names: Sequence[str], mine: Mapping[str, Sequence[Share]], group: Group) -> list[int]:
    """For each name a number that all copies of its parts divide; 0 where none is small enough."""
    copies = [{share.copies for share in mine.get(name, ())} for name in names]
    most = group.highest([max(some, default=1) for some in copies])
    mixed = group.highest([int(any(m % one for one in some)) for m, some in zip(most, copies, strict=True)])
    if any(mixed):
        own = [pair for pair in enumerate(copies) if mixed[pair[0]]]
        for row in group.gathered(
            [number for at, some in own for one in sorted(some) for number in (at, one)]
        ):
            for at, one in zip(row[::2], row[1::2], strict=True):
                most[at] = lcm(most[at], one)
    return [multiple if multiple <= MOST else 0 for multiple in most]


def _holds(atom: IndexAtom, multiple: int, digest: int, elements: int) -> bool:
    """Whether the sums are those of the whole atom, once or several times: tied names may each have memory of their own."""
    volume = prod(atom.shape) * multiple
    if not prod(atom.shape):
        return True
    times, rest = divmod(elements, volume) if volume else (0, 0)
    return times > 0 and rest == 0 and digest == times * multiple * int(atom.digest or "0", 16) % MODULUS
