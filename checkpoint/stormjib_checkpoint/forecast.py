"""What a load on a layout would cost, told before anything is read: the plans of all its ranks, and what they would read once for several. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.exchange import span_of, wishes_of, without
from stormjib_checkpoint.plan import Target, cost, plan
from stormjib_checkpoint.sharing import handings

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from stormjib_checkpoint.exchange import Wishes
    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.plan import FilePlan
    from stormjib_checkpoint.sharing import Handing
    from stormjib_checkpoint.spec.layout import Layout


class Forecast(NamedTuple):
    """Of one rank, or the sum over ranks; bytes."""

    needed: int
    """What it wants."""
    storage: int
    """What it reads from the storage."""
    memory: int
    """And from the memory of its node."""
    requests: int
    received: int
    """What it gets from other ranks."""


def forecasts(
    layout: Layout,
    atoms: Mapping[str, IndexAtom],
    request_bytes: int,
    near: Mapping[int, Collection[int]],
) -> list[Forecast]:
    """Of each rank of a layout. `near` says of which ranks that saved the files lie in whose memory."""
    targets = [_targets(layout, rank) for rank in range(layout.world)]
    span = span_of(layout.world)
    plans = [plan(some, atoms, request_bytes, span) for some in targets]
    having = [near.get(rank, ()) for rank in range(layout.world)]
    lying = {rank for some in having for rank in some}
    wishes = [
        wishes_of(files, [target.copies for target in some], lying)
        for files, some in zip(plans, targets, strict=True)
    ]
    handed = (
        handings([{key: wish.runs for key, wish in one.items()} for one in wishes], having)
        if layout.world > 1
        else []
    )
    return [_forecast(rank, plans[rank], wishes[rank], handed, having[rank]) for rank in range(layout.world)]


def total(all_: Sequence[Forecast]) -> Forecast:
    """Of all ranks."""
    return Forecast(*map(sum, zip(*all_, strict=True)))


def _targets(layout: Layout, rank: int) -> list[Target]:
    """What a rank wants, each box once."""
    copies = {
        (patch.atom, patch.box): patch.copies
        for local in layout.rank(rank).values()
        for patch in local.patches
        if patch.box.volume
    }
    return [Target(name, box, count) for (name, box), count in copies.items()]


def _forecast(
    rank: int, plans: Sequence[FilePlan], wishes: Wishes, handed: Sequence[Handing], near: Collection[int]
) -> Forecast:
    reads = [one.key for one in handed if one.owner == rank]
    gets = {one.key: one.receivers[rank].length for one in handed if rank in one.receivers}
    done = [wishes[key] for key in (*reads, *gets) if key in wishes]
    alone = [(file.rank in near, cost(file)) for file in without(plans, done)]
    sizes = [(is_near, one.read) for is_near, one in alone] + [
        (key.rank in near, key.length) for key in reads
    ]
    return Forecast(
        sum(cost(file).needed for file in plans),
        sum(size for is_near, size in sizes if not is_near),
        sum(size for is_near, size in sizes if is_near),
        sum(one.requests for _, one in alone) + len(reads),
        sum(gets.values()),
    )
