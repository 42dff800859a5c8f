"""The index of a step, made of what its ranks say: they must agree, and together hold every tensor exactly once. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_checkpoint.boxes import flaw
from stormjib_checkpoint.digest.definition import add, number, text
from stormjib_checkpoint.errors import Inconsistent
from stormjib_checkpoint.format import Atom, AtomsFile, RankFile
from stormjib_checkpoint.records import canonical

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.format import StoredBox
    from stormjib_checkpoint.records import Json


def index_of(ranks: Sequence[RankFile], place: str) -> AtomsFile:
    """`atoms.json` of all ranks' records; `place` is named in errors. Raises Inconsistent."""
    first = ranks[0]
    _check_equal(ranks, place)
    ties, absent = _ties(ranks, place), _absent(ranks, place)
    return AtomsFile(first.step, first.generation, _atoms(ranks, place), ties, absent, first.scalars)


def _check_equal(ranks: Sequence[RankFile], place: str) -> None:
    first, scalars = ranks[0], canonical(ranks[0].scalars)
    for record in ranks[1:]:
        if record.attempt != first.attempt:
            raise Inconsistent(
                f"{place}: rank {record.rank} wrote in attempt {record.attempt!r}, rank 0 in {first.attempt!r}; "
                "ranks were restarted in between, so the parts do not belong together"
            )
        if canonical(record.scalars) != scalars:
            key = min(k for k, _ in {*_texts(record.scalars)} ^ {*_texts(first.scalars)})
            raise Inconsistent(f"{place}: {key} differs between rank 0 and rank {record.rank}")


def _texts(scalars: Mapping[str, Json]) -> Iterator[tuple[str, bytes]]:
    """Compared as they are written: to Python 0.0 equals -0.0, and 1 equals true."""
    return ((key, canonical(value)) for key, value in scalars.items())


def _atoms(ranks: Iterable[RankFile], place: str) -> dict[str, Atom]:
    """The atoms of all ranks, each tiled exactly once. Raises Inconsistent."""
    forms: dict[str, tuple[str, tuple[int, ...]]] = {}
    boxes: dict[str, list[StoredBox]] = {}
    for record in ranks:
        for name, atom in record.atoms.items():
            dtype, shape = forms.setdefault(name, (atom.dtype, atom.shape))
            if (dtype, shape) != (atom.dtype, atom.shape):
                raise Inconsistent(
                    f"{place}: rank {record.rank} has {name} as {atom.dtype} {list(atom.shape)}, "
                    f"another rank as {dtype} {list(shape)}"
                )
            boxes.setdefault(name, []).extend(atom.boxes)
    merged = {name: Atom(*form, tuple(boxes[name]), _digest(boxes[name])) for name, form in forms.items()}
    for name, atom in merged.items():
        why = flaw(atom.shape, [stored.box for stored in atom.boxes])
        if why is not None:
            raise Inconsistent(f"{place}: the ranks do not hold {name} exactly once: {why}")
    return merged


def _digest(boxes: Sequence[StoredBox]) -> str | None:
    """The digest of an atom: the sum of those of its boxes."""
    known = [number(box.digest) for box in boxes if box.digest is not None]
    return text(add(known)) if len(known) == len(boxes) else None


def _ties(ranks: Iterable[RankFile], place: str) -> dict[str, str]:
    """Names of atoms that go by another name. Ranks that know a name must agree on what it is. Raises Inconsistent."""
    ties: dict[str, tuple[int, str]] = {}
    for record in ranks:
        for name, atom in (record.ties | {name: name for name in record.atoms}).items():
            first, known = ties.setdefault(name, (record.rank, atom))
            if known != atom:
                raise Inconsistent(
                    f"{place}: to rank {first} {name} is the tensor {known}, to rank {record.rank} {atom}; a tensor must "
                    "be shared on all ranks that hold it, or on none"
                )
    return {name: atom for name, (_, atom) in ties.items() if name != atom}


def _absent(ranks: Iterable[RankFile], place: str) -> tuple[str, ...]:
    """What no rank has. Raises Inconsistent where one has it."""
    ranks = tuple(ranks)
    absent = {name for record in ranks for name in record.absent}
    for record in ranks:
        for name in (*record.atoms, *record.ties, *record.scalars):
            if name in absent or name.rpartition(".")[0] in absent:
                raise Inconsistent(f"{place}: rank {record.rank} has {name}; to another rank it is absent")
    return tuple(sorted(absent))
