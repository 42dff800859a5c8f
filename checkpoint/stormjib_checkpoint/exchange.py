"""Reading once for several ranks, and handing on what was read: in rounds of bounded memory, all ranks in step."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.filling import runs_of
from stormjib_checkpoint.plan import SPAN, FilePlan, Read, Strip
from stormjib_checkpoint.sharing import MANY, Handing, Key, Runs, handings, rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

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
        """`near` are the ranks whose files lie in this node's memory. `read` gives bytes of a file."""
        self._group, self._near, self._read = group, near, read

    def run(self, plans: Sequence[FilePlan], copies: Sequence[int], sink: Sink) -> list[FilePlan]:
        """Put what is read once for several into the sink; what is left to read here. Every member calls it. `copies`: on how many members
        each target is."""
        near = self._group.gathered(self._near)
        wishes = wishes_of(plans, copies, {rank for some in near for rank in some})
        own = {key: runs for key, (runs, _) in wishes.items()}
        every = self._group.gathered([number for key, runs in own.items() for number in (*key, *runs)])
        handed = handings([_read_back(row) for row in every], near)
        self._rounds(list(rounds(handed, self._group.size, WINDOW_BYTES)), wishes, sink)
        member = self._group.member
        mine = [one.key for one in handed if member == one.owner or member in one.receivers]
        return without(plans, [wishes[key] for key in mine if key in wishes])

    def _rounds(self, all_: Sequence[Sequence[Handing]], wishes: Wishes, sink: Sink) -> None:
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
        self, now: Sequence[Handing], mine: Mapping[Key, bytearray], wishes: Wishes, sink: Sink
    ) -> None:
        """Hand on what this member has read, and take what the others have."""
        member, members = self._group.member, range(self._group.size)
        outgoing = [
            bytearray().join(
                _taken(mine[one.key], one.receivers[other])
                for one in now
                if one.owner == member and other in one.receivers
            )
            for other in members
        ]
        to_get = [[one for one in now if one.owner == other and member in one.receivers] for other in members]
        sizes = [sum(one.receivers[member].length for one in some) for some in to_get]
        incoming = self._group.swapped(outgoing, sizes)
        for key, own in mine.items():
            if key in wishes:
                runs, work = wishes[key]
                _put(work, memoryview(_taken(own, runs)), sink)
        for some, data in zip(to_get, incoming, strict=True):
            at = 0
            for one in some:
                length = one.receivers[member].length
                _put(wishes[one.key].work, data[at : at + length], sink)
                at += length


class Wish(NamedTuple):
    """What is wanted of some bytes of a file, and what they are for."""

    runs: Runs
    work: list[Read | Strip]


Wishes = Mapping[Key, Wish]


def wishes_of(plans: Sequence[FilePlan], copies: Sequence[int], near: Collection[int]) -> Wishes:
    """By what may be handed on: bytes that many want, or parts of whose rows others want, or that lie in some node's memory. Of all else
    nobody need know: of large models that is millions of requests. Bytes of which different parts are wanted here are not handed on."""
    found: dict[Key, Wish] = {}
    for file in plans:
        many = (
            r for r in file.reads if file.rank in near or any(copies[cut.target] >= MANY for cut in r.cuts)
        )
        every: list[Read | Strip] = [*many, *file.strips]
        for work in every:
            runs = _runs(work)
            wish = found.setdefault(_key(file, work), Wish(runs, []))
            if wish.runs == runs:
                wish.work.append(work)
    return found


def without(plans: Sequence[FilePlan], done: Sequence[Wish]) -> list[FilePlan]:
    """What is left when these wishes are fulfilled, of files of which something is: to open one costs a request too."""
    gone = {id(work) for wish in done for work in wish.work}
    left = (
        FilePlan(
            file.rank,
            [read for read in file.reads if id(read) not in gone],
            [strip for strip in file.strips if id(strip) not in gone],
        )
        for file in plans
    )
    return [file for file in left if file.reads or file.strips]


def _key(file: FilePlan, work: Read | Strip) -> Key:
    return Key(file.rank, work.start, work.length)


def _runs(work: Read | Strip) -> Runs:
    return Runs(work.rows, work.skip, work.run) if isinstance(work, Strip) else Runs(1, 0, work.length)


def _read_back(row: Sequence[int]) -> dict[Key, Runs]:
    """The wishes of a member, of which each is six numbers."""
    return {Key(*row[at : at + 3]): Runs(*row[at + 3 : at + 6]) for at in range(0, len(row), 6)}


def _taken(data: bytearray, runs: Runs) -> bytearray:
    if runs.length == len(data):
        return data
    return bytearray(runs_of(memoryview(data), *runs))


def _put(work: Sequence[Read | Strip], data: memoryview, sink: Sink) -> None:
    for one in work:
        if isinstance(one, Strip):
            sink.gathered(one, data)
        else:
            sink.take(one, data)
