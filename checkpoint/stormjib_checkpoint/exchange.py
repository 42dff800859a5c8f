"""Reading once for several ranks, and handing on what was read: in rounds of bounded memory, all ranks in step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from stormjib_checkpoint.plan import SPAN, FilePlan, Read
from stormjib_checkpoint.sharing import Handing, Key, handings, rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stormjib_checkpoint.filling import Sink
    from stormjib_checkpoint.proof import Group

WINDOW_BYTES = 128 * 1024 * 1024
"""What a rank has in its hands at most, on the way from others and to them."""
LEAST_SPAN = 1024 * 1024


def span_of(members: int) -> int:
    """Bytes of the longest request, so that one for each member fits into half of the window."""
    span = SPAN
    while span > LEAST_SPAN and span * 2 * members > WINDOW_BYTES:
        span //= 2
    return span


class Exchange:
    """What one member of a group reads for the others, and gets from them."""

    def __init__(self, group: Group, near: Sequence[int], read: Callable[[Key], bytearray]) -> None:
        """`near` are the ranks whose files lie in this node's memory. `read` gives the bytes of a request."""
        self._group, self._near, self._read = group, near, read

    def run(self, plans: Sequence[FilePlan], sink: Sink) -> list[FilePlan]:
        """Put what is read once for several into the sink; what is left to read here. Every member calls it."""
        wishes = {Key(file.rank, read.start, read.length): read for file in plans for read in file.reads}
        every = self._group.gathered([number for key in wishes for number in key])
        keys = [[Key(*row[at : at + 3]) for at in range(0, len(row), 3)] for row in every]
        handed = handings(keys, self._group.gathered(self._near))
        self._rounds(list(rounds(handed, self._group.size, WINDOW_BYTES)), wishes, sink)
        done = {one.key for one in handed if self._group.member in (one.owner, *one.receivers)}
        return [
            file._replace(
                reads=[read for read in file.reads if Key(file.rank, read.start, read.length) not in done]
            )
            for file in plans
        ]

    def _rounds(self, all_: Sequence[Sequence[Handing]], wishes: dict[Key, Read], sink: Sink) -> None:
        """While one round is on its way, the next is read."""
        with ThreadPoolExecutor(1, "stormjib-ahead") as ahead:
            reading = [ahead.submit(self._mine, all_[0])] if all_ else []
            for number, now in enumerate(all_):
                mine = reading.pop().result()
                if number + 1 < len(all_):
                    reading.append(ahead.submit(self._mine, all_[number + 1]))
                self._swap(now, mine, wishes, sink)

    def _mine(self, now: Sequence[Handing]) -> dict[Key, bytearray]:
        return {one.key: self._read(one.key) for one in now if one.owner == self._group.member}

    def _swap(
        self, now: Sequence[Handing], mine: dict[Key, bytearray], wishes: dict[Key, Read], sink: Sink
    ) -> None:
        """Hand on what this member has read, and take what the others have."""
        member, members = self._group.member, range(self._group.size)
        outgoing = [
            bytearray().join(mine[one.key] for one in now if one.owner == member and other in one.receivers)
            for other in members
        ]
        mine_to_get = [
            [one.key for one in now if one.owner == other and member in one.receivers] for other in members
        ]
        incoming = self._group.swapped(outgoing, [sum(key.length for key in keys) for keys in mine_to_get])
        for key, own in mine.items():
            if key in wishes:
                sink.take(wishes[key], memoryview(own))
        for keys, data in zip(mine_to_get, incoming, strict=True):
            at = 0
            for key in keys:
                sink.take(wishes[key], data[at : at + key.length])
                at += key.length
