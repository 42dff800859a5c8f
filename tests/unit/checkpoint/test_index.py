"""FORMAT.md §13: atoms as grids, and what an index of many ranks costs."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.indices import indexed
from fakes.parts import PAGE, Cut, parts, records_of
from stormjib_checkpoint.boxes import Box, intersect, part, whole
from stormjib_checkpoint.errors import DamagedCheckpoint, FormatError, Inconsistent
from stormjib_checkpoint.format import AtomRow, AtomsFile
from stormjib_checkpoint.grids import MAX_CELLS, Grid, Held, fit
from stormjib_checkpoint.index import Index
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.records import decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stormjib_checkpoint.format import RankFile, StoredBox

WORLD = 512
STATES = (("model", "BF16"), ("exp_avg", "F32"), ("exp_avg_sq", "F32"))


def opened(records: Sequence[RankFile], data: bytes | None = None) -> Index:
    """The index as a reader has it: from the bytes of the file."""
    record = decode(AtomsFile, encode(indexed(records, "step")) if data is None else data, "atoms.json")
    return Index(record, [one.data.bytes for one in records], "step")


def said(records: Sequence[RankFile]) -> dict[str, list[StoredBox]]:
    """The boxes of each atom as the ranks say."""
    return {
        name: [box for record in records for box in record.atoms[name].boxes] for name in records[0].atoms
    }


def rows(count: int, ranks: Sequence[int] | None = None) -> Cut:
    """An atom of two columns, one row on each rank."""
    holders = range(count) if ranks is None else ranks
    return Cut("F32", (count, 2), tuple((rank, Box((at, 0), (1, 2))) for at, rank in enumerate(holders)))


@given(parts())
def test_the_index_has_the_very_boxes_of_the_ranks(records: list[RankFile]) -> None:
    """§13.1, §13.2, §13.3, §13.4"""
    index = opened(records)
    for name, boxes in said(records).items():
        atom = index.atoms[name]
        assert list(atom.boxes) == boxes
        assert atom.ranks == [box.rank for box in boxes]
        assert (atom.dtype, atom.shape) == (records[0].atoms[name].dtype, records[0].atoms[name].shape)


@given(parts(), st.data())
def test_it_finds_the_boxes_that_meet_another(records: list[RankFile], data: st.DataObject) -> None:
    index = opened(records)
    for name, boxes in said(records).items():
        sides = [
            sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
            for n in index.atoms[name].shape
        ]
        wanted = Box(tuple(a for a, _ in sides), tuple(b - a for a, b in sides))
        found = index.atoms[name].meeting(wanted)
        assert sorted(found) == [box for box in boxes if intersect(box.box, wanted) is not None]


def test_cells_of_two_dimensions_are_numbered_row_major() -> None:
    """§13.2"""
    boxes = [Box((row, column), (2, 1)) for row in (0, 2) for column in (0, 1, 2)]
    index = opened(records_of({"a": Cut("F32", (4, 3), tuple(enumerate(boxes)))}, [PAGE] * 6))
    assert [box.rank for box in index.atoms["a"].meeting(Box((1, 1), (2, 2)))] == [1, 2, 4, 5]
    assert [box.box for box in index.atoms["a"].meeting(Box((3, 0), (9, 2)))] == [boxes[3], boxes[4]]
    assert index.atoms["a"].meeting(Box((1, 1), (0, 2))) == []


@given(parts(), st.data())
def test_it_knows_what_lies_where_in_a_file(records: list[RankFile], data: st.DataObject) -> None:
    index = opened(records)
    record = data.draw(st.sampled_from(records))
    start, end = data.draw(st.tuples(st.integers(0, record.data.bytes), st.integers(0, record.data.bytes)))
    held = {name: atom.boxes for name, atom in record.atoms.items()}
    assert index.names_in(record.rank, start, end) == sorted(
        name for name, boxes in held.items() if any(box.start < end and box.end > start for box in boxes)
    )
    starts = [box.start for boxes in held.values() for box in boxes]
    assert index.head_bytes(record.rank) == min(starts, default=record.data.bytes)


def test_a_grid_is_written_in_runs() -> None:
    """§13.1, §13.2, §13.3, §13.5"""
    columns = Cut("F32", (2, 4), ((3, Box((0, 0), (2, 2))), (2, Box((0, 2), (2, 2)))))
    cuts = {
        "a": rows(4),
        "b": Cut("U8", (), ((3, whole(())),)),
        "c": columns,
        "d": rows(4),
        "e": Cut("U8", (0,), ()),
    }
    plain = json.loads(encode(indexed(records_of(cuts, [PAGE, PAGE, PAGE, 2 * PAGE]), "step")))
    assert plain["requires"] == ["grid"]
    assert plain["heads"] == [[PAGE, 3], [2 * PAGE, 1]]
    assert plain["grids"] == [
        {"cuts": [[[1, 4]]], "ranks": [[0, 4, 1]]},
        {"cuts": [], "ranks": [[0, 1, 0]]},
        {"cuts": [[], [[2, 2]]], "ranks": [[1, 1, 0], [0, 1, 0]]},
    ]
    digest = {"digest": "0" * 16}
    assert plain["atoms"] == {
        "a": {"dtype": "F32", "shape": [4, 2], "grid": 0, "rank": 0},
        "b": {"dtype": "U8", "shape": [], "grid": 1, "rank": 3},
        "c": {"dtype": "F32", "shape": [2, 4], "grid": 2, "rank": 2},
        "d": {"dtype": "F32", "shape": [4, 2], "grid": 0, "rank": 0},
        "e": {"dtype": "U8", "shape": [0], "boxes": []} | digest,
    }


def test_what_no_grid_holds_keeps_its_boxes_and_counts_in_the_file_of_its_rank() -> None:
    """§13.1, §13.4"""
    corner = Cut(
        "F32", (2, 2), ((1, Box((0, 0), (1, 2))), (1, Box((1, 0), (1, 1))), (0, Box((1, 1), (1, 1))))
    )
    records = records_of({"a": rows(2), "b": corner, "c": rows(2, [1, 1])}, [PAGE, PAGE])
    plain = json.loads(encode(indexed(records, "step")))
    assert [key for key, atom in plain["atoms"].items() if "boxes" in atom] == ["b"]
    second = records[1].atoms["b"].boxes[1]
    assert (second.start, second.end) == (PAGE, PAGE + 4), "__box.1.b lies before a"
    assert {name: list(atom.boxes) for name, atom in opened(records).atoms.items()} == said(records)


def test_without_grids_nothing_is_required() -> None:
    """§13.1"""
    corner = Cut(
        "F32", (2, 2), ((0, Box((0, 0), (1, 2))), (0, Box((1, 0), (1, 1))), (0, Box((1, 1), (1, 1))))
    )
    plain = json.loads(encode(indexed(records_of({"b": corner}, [PAGE]), "step")))
    assert (plain["requires"], "grids" in plain, "heads" in plain) == ([], False, False)


@pytest.mark.parametrize("order", ["hole", "swapped", "tail"])
def test_files_in_another_order_have_no_grids(order: str) -> None:
    """§13.5"""
    records = records_of({"a": rows(2), "b": rows(2)}, [PAGE, PAGE])
    moves = {"hole": (0, 16), "swapped": (8, -8), "tail": (0, 0)}[order]
    atoms = {
        name: replace(atom, boxes=tuple(box._replace(start=box.start + by, end=box.end + by) for box in atom.boxes))
        for (name, atom), by in zip(records[1].atoms.items(), moves, strict=True)
    }  # fmt: skip
    data = replace(records[1].data, bytes=records[1].data.bytes + 16)
    records[1] = replace(records[1], atoms=atoms, data=data)
    index = opened(records)
    assert {name: list(atom.boxes) for name, atom in index.atoms.items()} == said(records)
    assert json.loads(encode(indexed(records, "step")))["requires"] == []
    assert index.head_bytes(1) == PAGE


def test_a_grid_has_each_cell_once() -> None:
    """§5.1: what a grid cannot tile is looked at box by box."""
    twice = Cut("F32", (2, 2), ((0, Box((0, 0), (1, 2))), (1, Box((0, 0), (1, 2)))))
    with pytest.raises(Inconsistent, match=r"hold a exactly once: boxes \[0:1\]x\[0:2\] and .* overlap"):
        indexed(records_of({"a": twice}, [PAGE, PAGE]), "step")
    quarter = [Box((at // 2, at % 2), (1, 1)) for at in (0, 1, 2, 2)]
    thrice = Cut("F32", (2, 2), tuple(enumerate(quarter)))
    with pytest.raises(Inconsistent, match=r"hold a exactly once: boxes .* overlap"):
        indexed(records_of({"a": thrice}, [PAGE] * 4), "step")
    hole = Cut("F32", (3, 2), ((0, Box((0, 0), (1, 2))), (1, Box((2, 0), (1, 2)))))
    with pytest.raises(Inconsistent, match="hold a exactly once: 4 of 6 elements are there"):
        indexed(records_of({"a": hole}, [PAGE, PAGE]), "step")
    with pytest.raises(Inconsistent, match="no rank has a record"):
        indexed([], "step")


HUGE = 10**12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": [{"cuts": [[[1, HUGE]]], "ranks": [[0, HUGE, 0]]}]}, f"{HUGE} cells on {HUGE} ranks"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, HUGE, 1]]}]}, f"4 cells on {HUGE} ranks"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, 3, 1]]}]}, "4 cells on 3 ranks"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, 4, 1], [4, 0, 1]]}]}, "a run of no ranks"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, 4]]}]}, "a run of 2 numbers; wanted 3"),
        ({"grids": [{"cuts": [[[1, 4, 1]]], "ranks": [[0, 4, 1]]}]}, "a run of 3 numbers; wanted 2"),
        ({"grids": [{"cuts": [[[0, 4]]], "ranks": [[0, 4, 1]]}]}, "4 parts of length 0"),
        ({"grids": [{"cuts": [[[1, 4], [1, 0]]], "ranks": [[0, 4, 1]]}]}, "0 parts of length 1"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[-1, 4, 1]]}]}, "is -1; wanted 0 to"),
        ({"grids": [{"cuts": [[[2, 4]]], "ranks": [[0, 4, 1]]}]}, r"'a' has shape \[4, 2\], which grid 0 does not cut"),
        ({"grids": [{"cuts": [[[1, 4]], [], []], "ranks": [[0, 4, 1]]}]}, "which grid 0 does not cut"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, 4, 2]]}]}, "'a' has a cell on rank 6 of 4"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, 4, 2**63 - 1]]}]}, "'a' has a cell on rank .* of 4"),
        ({"grids": []}, "wanted grids and heads, or neither"),
        ({"grids": None}, "wanted grids and heads, or neither"),
        ({"heads": None}, "wanted grids and heads, or neither"),
        ({"heads": [[PAGE]]}, "heads are runs of two numbers"),
        ({"heads": [[PAGE, 4], [PAGE, 0]]}, "of at least one rank each"),
        ({"grid": 1}, "'a' has grid 1 of 1"),
        ({"rank": 1}, "'a' has a cell on rank 4 of 4"),
        ({"rank": None}, "either boxes, or grid and rank"),
        ({"grid": None}, "either boxes, or grid and rank"),
        ({"grid": None, "rank": None}, "either boxes, or grid and rank"),
        ({"boxes": []}, "either boxes, or grid and rank"),
        ({"shape": [4]}, None),
        ({"shape": [0, 2]}, "which grid 0 does not cut"),
        ({"shape": []}, "which grid 0 does not cut"),
        ({"shape": [4, 0]}, "which grid 0 does not cut"),
        ({"digest": "0"}, "not 16 hexadecimal digits"),
        ({"dtype": "F31"}, "unknown dtype"),
    ],
)  # fmt: skip
def test_a_grid_that_lies_is_refused(change: dict[str, Any], message: str | None) -> None:
    """§13.6: at once, however much it claims."""
    records = records_of({"a": rows(4)}, [PAGE] * 4)
    plain = json.loads(encode(indexed(records, "step")))
    (plain if change.keys() & {"grids", "heads"} else plain["atoms"]["a"]).update(change)
    data = json.dumps(plain).encode()
    if message is not None:
        with pytest.raises(FormatError, match=message):
            decode(AtomsFile, data, "atoms.json")
    else:  # no lie that the record alone can show: the length of the file does
        with pytest.raises(DamagedCheckpoint, match=r"safetensors has 4100 bytes, and it has 4104"):
            opened(records, data).atoms["a"].meeting(Box((0,), (1,)))


CORNER = Cut("F32", (2, 2), ((1, Box((0, 0), (1, 2))), (0, Box((1, 0), (1, 1))), (0, Box((1, 1), (1, 1)))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [[PAGE, 5]]}, "step/atoms.json is of 5 ranks, and the step of 4"),
        ({"heads": [[PAGE + 8, 4]]}, "rank-00000.safetensors has 4120 bytes, and it has 4112"),
        ({"grids": [{"cuts": [[[1, 4]]], "ranks": [[0, 4, 0]]}]}, "has 4136 bytes, and it has 4112"),
        ({"atoms": {}}, "has 4096 bytes, and it has 4112"),
        ({"b": {"rank": 4}}, r"has a box of b up to byte 4112 of rank-00004.safetensors, where nothing is"),
        ({"b": {"start": 4112, "end": 4116}}, "has a box of b up to byte 4116 of rank-00000.safetensors, where nothing is"),
        ({"b": {"start": 4100, "end": 4104}}, "says that b is at byte 4100 of .*, and that what lies before it ends at 4108"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_go_with_the_files_is_damage(change: dict[str, Any], message: str) -> None:
    """§13.6"""
    records = records_of({"a": rows(4), "b": CORNER}, [PAGE] * 4)
    plain = json.loads(encode(indexed(records, "step")))
    plain["atoms"]["b"]["boxes"][0].update(change.pop("b", {}))
    with pytest.raises(DamagedCheckpoint, match=message):
        opened(records, json.dumps(plain | change).encode()).names_in(0, 0, PAGE * 2)


def numbers_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a number in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [
        place for key, item in items for place in ([(value, key)] if type(item) is int else numbers_in(item))
    ]


@given(parts(), st.integers(0, 10**6), st.sampled_from([0, 1, 2, 3, 4, PAGE, 2 * PAGE, MAX_CELLS, 2**63 - 1]))
def test_any_number_in_any_place_is_damage_or_leads_nowhere_else(
    records: list[RankFile], place: int, number: int
) -> None:
    """§13.6: nothing but those errors, and no box that does not lie in its rank's file."""
    plain = json.loads(encode(indexed(records, "step")))
    every = numbers_in(plain)
    container, key = every[place % len(every)]
    container[key] = number
    try:
        index = opened(records, json.dumps(plain).encode())
        for record in records:
            index.names_in(record.rank, 0, record.data.bytes)
        boxes = [box for atom in index.atoms.values() for box in atom.boxes]
    except (FormatError, DamagedCheckpoint):
        return
    for box in boxes:
        assert index.head_bytes(box.rank) <= box.start < box.end <= records[box.rank].data.bytes


def test_more_boxes_than_bytes_are_damage() -> None:
    """§13.6: nobody goes through them."""
    grid = Grid((((1, MAX_CELLS),),), ((0, MAX_CELLS, 0),))
    atoms = {str(n): AtomRow("F32", (MAX_CELLS,), None, 0, 0) for n in range(1000)}
    record = AtomsFile(1, GenerationId(1, 1), atoms, {}, (), {}, (grid,), ((PAGE, 1),))
    with pytest.raises(DamagedCheckpoint, match=f"{1000 * MAX_CELLS} boxes in files of 5000 bytes together"):
        Index(record, [5000], "step")


def llama_70b() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a model of 70 billion parameters."""
    hidden, inner = 8192, 28672
    layer = {"wq": (hidden, hidden), "wk": (1024, hidden), "wv": (1024, hidden), "wo": (hidden, hidden)}
    layer |= {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    yield from ((f"layers.{n}.feed_forward.{w}.weight", s) for n in range(80) for w, s in layer.items())
    yield from ((f"layers.{n}.{w}_norm.weight", (hidden,)) for n in range(80) for w in ("attention", "ffn"))
    yield from (("norm.weight", (hidden,)), ("tok_embeddings.weight", (128256, hidden)), ("output.weight", (128256, hidden)))  # fmt: skip


def cells(shape: tuple[int, ...], layout: tuple[tuple[int, int], ...]) -> tuple[Held, ...]:
    """Boxes of an atom that is cut by mesh dimensions, each (dimension of the atom, parts), the first of them slowest among the ranks."""
    boxes = [whole(shape)]
    for dim, count in layout:
        boxes = [part(box, min(dim, len(shape) - 1), count, at) for box in boxes for at in range(count)]
    return tuple(Held(rank, box.offset, box.shape) for rank, box in enumerate(boxes) if box.volume)


def index_of_70b(layout: tuple[tuple[int, int], ...]) -> tuple[AtomsFile, list[int]]:
    """The index of weights and two moments of each on 512 ranks, and the lengths of the files, which nobody could hold."""
    grids: dict[Grid, int] = {}
    atoms, sizes = {}, [PAGE] * WORLD
    for shape, count in Counter(shape for _, shape in llama_70b()).items():
        held = cells(shape, layout)
        found = fit(shape, held)
        assert found is not None
        number = grids.setdefault(found[0], len(grids))
        for name in [name for name, other in llama_70b() if other == shape]:
            for state, dtype in STATES:
                atoms[f"{state}.{name}"] = AtomRow(dtype, shape, None, number, found[1], "0123456789abcdef")
        for one in held:
            sizes[one.rank] += 10 * count * prod(one.shape)
    record = AtomsFile(1, GenerationId(1, 1), atoms, {}, (), {}, tuple(grids), ((PAGE, WORLD),))
    return record, sizes


LAYOUTS = {"FSDP512": ((0, 512),), "HSDP2x256": ((0, 256),), "FSDP64xTP8": ((0, 64), (1, 8))}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_70b_on_512_ranks(layout: tuple[tuple[int, int], ...]) -> None:
    """§13: less than 1 MB, and what one of 384 ranks wants to know of it costs no list of 512 boxes for any atom."""
    record, sizes = index_of_70b(layout)
    data = encode(record)
    assert len(data) < 1_000_000
    tracemalloc.start()
    began = time.process_time()
    index = Index(decode(AtomsFile, data, "atoms.json"), sizes, "step")
    found = [
        box for atom in index.atoms.values() for box in atom.meeting(part(whole(atom.shape), 0, 384, 77))
    ]
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5, "under tracemalloc; bench/index.py measures it"
    assert peak < 16_000_000, "512 boxes an atom take 200 MB"
    assert {box.rank for box in found} <= set(range(WORLD))
    assert sum(box.end - box.start for box in found) >= sum(sizes) / 400


def test_indexes_of_1_0_are_read() -> None:
    """§13.7"""
    plain = {
        "format": "1.0", "requires": [], "step": 1, "generation": "1.1", "ties": {}, "absent": [], "scalars": {},
        "atoms": {"a": {"dtype": "U8", "shape": [4], "boxes": [
            {"rank": 0, "offset": [0], "shape": [1], "start": PAGE, "end": PAGE + 1, "digest": "0" * 16},
            {"rank": 2, "offset": [1], "shape": [3], "start": PAGE, "end": PAGE + 3},
        ]}},
    }  # fmt: skip
    record = decode(AtomsFile, json.dumps(plain).encode(), "atoms.json")
    index = Index(record, [PAGE + 1, 8, PAGE + 3], "step")
    assert [(box.rank, box.start) for box in index.atoms["a"].meeting(Box((2,), (1,)))] == [(2, PAGE)]
    assert index.atoms["a"].ranks == [0, 2]
    assert [index.head_bytes(rank) for rank in range(3)] == [PAGE, 8, PAGE]
    assert index.names_in(2, PAGE, PAGE + 1) == ["a"]
    assert index.names_in(1, 0, PAGE) == []
