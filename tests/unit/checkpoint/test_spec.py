"""Pattern specs: any spec on any two meshes holds every atom once, and what one layout cuts another gathers."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.layouts import PADDING, cut, gathered, numbered
from stormjib_checkpoint.boxes import Box
from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.spec.check import check
from stormjib_checkpoint.spec.globs import compiled
from stormjib_checkpoint.spec.layout import Layout
from stormjib_checkpoint.spec.parsing import parse, parse_text
from stormjib_checkpoint.spec.region import flat_boxes

AXES = ("pp", "dp", "tp", "ep")
CUTS = ("tp", "ep")


def spec(*rules: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"axes": list(AXES), "rules": list(rules), **fields}


def laid(value: dict[str, Any], mesh: dict[str, int], **shapes: tuple[int, ...]) -> Layout:
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return parse(value).on(mesh, named)


# --- any spec -------------------------------------------------------------------------------------------------------

meshes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES})
uneven = st.sampled_from(["ceil", "front"])
thens = st.one_of(
    st.none(),
    st.builds(
        lambda of, over: {"fsdp": {"over": over, "of": of}},
        st.sampled_from(["states", "all"]),
        st.sampled_from([["dp"], []]),
    ),
    st.builds(
        lambda of, buffer: {"zero": {"over": ["dp"], "of": of, **buffer}},
        st.sampled_from(["states", "all"]),
        st.sampled_from([{}, {"buffer": "flat"}]),
    ),
)


@st.composite
def rules(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A rule for one tensor, and a shape that it fits."""
    rule: dict[str, Any] = {"match": name}
    rank = draw(st.integers(1, 3))
    units = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    shape = [draw(st.integers(0, 5)) * unit for unit in units]
    axes = draw(st.permutations(CUTS))[: draw(st.integers(0, 2))]
    shard: list[dict[str, Any]] = []
    for axis in axes:
        dim = draw(st.integers(0, rank - 1))
        one: dict[str, Any] = {axis: dim, "uneven": draw(uneven)}
        if dim not in {cut[axis] for cut in shard for axis in cut if axis in CUTS}:
            one["unit"] = units[dim]
            if draw(st.booleans()):
                one["cover"] = draw(st.integers(1, 8))
        shard.append(one)
    free = [dim for dim in range(rank) if all(dim != cut.get(axis) for cut in shard for axis in CUTS)]
    divided, padded = draw(st.booleans()), draw(st.booleans())
    if free and axes and divided:
        dim = free[0]
        of = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        shape[dim] = sum(of) * draw(st.integers(0, 3))
        rule["parts"] = {"dim": dim, "of": of}
        shard[0] = {axes[0]: "parts", "uneven": draw(uneven)}
    elif free and padded:
        rule["pad"] = {"dim": free[0], "to": draw(st.sampled_from([3, [2, "tp"]]))}
        shard += [{axis: free[0]} for axis in CUTS if axis not in axes]
    if draw(st.booleans()):
        rule["replicate"] = ["dp"]
    return {**rule, "shard": shard}, tuple(shape)


@st.composite
def specs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    names = ["first.w", *(f"layers.{i}.w" for i in range(draw(st.integers(1, 5)))), "last.w"]
    found = {name: draw(rules(name)) for name in names}
    then = draw(thens)
    place: dict[str, Any] = {"over": "pp", "layers": "layers.{i}.*", "first": ["first.*"], "last": ["last.*"]}
    if draw(st.booleans()):
        place = place | {"chunks": 2}
    value = spec(
        *(rule for rule, _ in found.values()),
        {"match": "tied.w", "tie": "first.w"},
        place=place | {"last": ["last.*", "tied.*"]},
        state={"m": "like", "row": "like", "step": "scalar", "mom": "matrix"},
        **({"then": then} if then is not None else {}),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (_, shape) in found.items():
        shapes |= {f"model.{name}": shape, f"optim.{name}.m": shape, f"optim.{name}.step": ()}
        shapes |= {f"optim.{name}.row": (*shape[:-1], 1), f"optim.{name}.mom": shape}
    return value, shapes


@settings(max_examples=80, deadline=None)
@given(specs(), meshes, meshes)
def test_any_spec_on_any_two_meshes(
    case: tuple[dict[str, Any], dict[str, tuple[int, ...]]], one: dict[str, int], other: dict[str, int]
) -> None:
    value, shapes = case
    full = numbered(shapes)
    now = full
    for mesh in (one, other):
        layout = parse(json.loads(json.dumps(value))).on(mesh, shapes)
        check(layout)
        now = gathered(layout, [cut(layout, rank, now) for rank in range(layout.world)])
        for name, wanted in full.items():
            assert np.array_equal(now[name], wanted), f"{name} on {mesh}"


@st.composite
def viewed(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A tensor that is made of others, or is a part of one."""
    shapes: dict[str, tuple[int, ...]]
    count, groups, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["joined", "grouped", "stacked", "apart", "turned"]))
    rows = [groups * draw(st.integers(1, 3)) for _ in range(3)]
    of: dict[str, tuple[int, ...]] = {f"a.{i}": (rows[0], width) for i in range(count)}
    if kind == "joined":
        view: dict[str, Any] = {"to": "t.w", "of": ["a.{i}"], "dim": draw(st.integers(0, 1))}
    elif kind == "grouped":
        view = {"to": "t.{x}", "of": [f"{x}.{{x}}" for x in "qkv"], "dim": 0, "groups": groups}
        of = {f"{x}.w": (length, width) for x, length in zip("qkv", rows, strict=True)}
    elif kind == "stacked":
        view = {"to": "t.w", "of": ["a.{i}"]}
    elif kind == "apart":
        view, of = {"to": "t.{i}", "of": ["a"]}, {"a": (count, rows[0], width)}
    else:
        view, of = {"to": "t.w", "of": ["a"], "rope": groups}, {"a": (2 * groups * width, 3)}
    shard = [
        {axis: draw(st.integers(0, 1)), "uneven": draw(uneven)}
        for axis in draw(st.sampled_from([CUTS, ["tp"], []]))
    ]
    then = draw(thens)
    value = views(
        view,
        rules=[{"match": "t.*", "shard": shard}],
        state={"m": "like", "row": "like", "column": "like", "step": "scalar"},
        **({"then": then} if then is not None else {}),
    )
    shapes = {f"model.{name}": shape for name, shape in of.items()}
    if kind in (
        "stacked",
        "apart",
    ):  # no others: along what is joined there is no factored state of the whole
        shapes |= {f"optim.{name}.row": (*shape[:-1], 1) for name, shape in of.items()}
        shapes |= {f"optim.{name}.column": (*shape[:-2], 1, shape[-1]) for name, shape in of.items()}
    shapes |= {f"optim.{name}.m": shape for name, shape in of.items()}
    return value, shapes | {f"optim.{name}.step": () for name in of}


@settings(max_examples=80, deadline=None)
@given(viewed(), meshes, meshes)
def test_any_view_on_any_two_meshes(
    case: tuple[dict[str, Any], dict[str, tuple[int, ...]]], one: dict[str, int], other: dict[str, int]
) -> None:
    value, shapes = case
    full = now = numbered(shapes)
    for mesh in (one, other):
        layout = parse(value).on(mesh, shapes)
        check(layout)
        now = gathered(layout, [cut(layout, rank, now) for rank in range(layout.world)])
        assert all(np.array_equal(now[name], wanted) for name, wanted in full.items()), mesh


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), st.data())
def test_a_flat_stretch_is_few_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    volume = int(np.prod(shape))
    begin = data.draw(st.integers(0, volume))
    end = data.draw(st.integers(begin, volume))
    boxes = list(flat_boxes(shape, begin, end))
    atom = np.arange(volume).reshape(shape)
    got = [atom[tuple(slice(o, e) for o, e in zip(b.offset, b.end, strict=True))].reshape(-1) for b in boxes]
    assert np.concatenate([*got, np.arange(0)]).tolist() == list(range(begin, end))
    assert len(boxes) <= 2 * len(shape) - 1


# --- each operator --------------------------------------------------------------------------------------------------


def test_gate_and_up_are_cut_each_by_itself() -> None:
    rule = {"match": "w13", "parts": {"dim": 0, "of": [1, 1]}, "shard": [{"tp": "parts"}]}
    layout = laid(spec(rule), {"tp": 2}, model__w13=(8, 1))
    full = numbered(layout.atoms, 0)
    assert [cut(layout, rank, full)["model.w13"][:, 0].tolist() for rank in (0, 1)] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]


def test_heads_are_dealt_out_and_their_key_values_are_where_they_are_needed() -> None:
    """8 query heads and 2 key-value heads on 3 ranks: 3, 3, 2."""
    rule = {
        "match": "qkv",
        "parts": {"dim": 0, "of": ["q", "kv", "kv"], "unit": [2, 2, 2]},
        "shard": [{"tp": "parts", "uneven": "front", "cover": "q"}],
    }
    layout = laid(spec(rule, sizes={"q": 8, "kv": 2}), {"tp": 3}, model__qkv=(24, 1))
    check(layout)
    full = numbered(layout.atoms, 0)
    rows = [cut(layout, rank, full)["model.qkv"][:, 0].tolist() for rank in range(3)]
    assert rows == [
        [*range(6), 16, 17, 20, 21],
        [*range(6, 12), *range(16, 24)],
        [*range(12, 16), 18, 19, 22, 23],
    ]
    copies = {patch.box: patch.copies for patch in layout.rank(1)["model.qkv"].patches}
    assert copies == {Box((6, 0), (6, 1)): 1, **{Box((row, 0), (2, 1)): 2 for row in (16, 18, 20, 22)}}


def test_a_pad_that_is_longer_than_the_data_leaves_ranks_with_nothing_else() -> None:
    rule = {"match": "e", "pad": {"dim": 0, "to": [4, "tp"]}, "shard": [{"tp": 0}]}
    layout = laid(spec(rule), {"tp": 8}, model__e=(17, 2))
    check(layout)
    locals_ = [layout.rank(rank)["model.e"] for rank in range(8)]
    assert {local.shape for local in locals_} == {(4, 2)}
    assert [sum(patch.box.volume for patch in local.patches) for local in locals_] == [8] * 4 + [2, 0, 0, 0]


def test_flat_shares_are_as_long_on_all_ranks() -> None:
    then = {"zero": {"over": ["dp"], "of": "all", "buffer": "flat"}}
    layout = laid(spec(then=then), {"dp": 3}, model__a=(3, 3), model__b=(1,))
    full = numbered(layout.atoms, 0)
    flat = [cut(layout, rank, full) for rank in range(3)]
    assert [list(one) for one in flat] == [["model.flat"]] * 3
    assert [one["model.flat"].tolist() for one in flat] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, PADDING, PADDING],
    ]


def test_values_that_differ_by_rank_are_slices_of_one_atom() -> None:
    rule = {"match": "bias", "partial": {"over": "dp", "union": "mean"}}
    layout = laid(spec(rule), {"dp": 3, "tp": 2}, model__bias=(4,))
    check(layout)
    assert layout.atoms == {"model.bias": (3, 4)}
    assert [layout.rank(rank)["model.bias"].patches[0].box.offset[0] for rank in range(6)] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    ("chunks", "counts", "wanted"),
    [(1, None, [[0, 1, 2], [3, 4]]), (2, None, [[0, 1, 3], [2, 4]]), (1, [1, 4], [[0], [1, 2, 3, 4]])],
)
def test_layers_on_stages(chunks: int, counts: list[int] | None, wanted: list[list[int]]) -> None:
    place = {"over": "pp", "layers": "layers.{i}.w", "chunks": chunks}
    value = spec(place={**place, **({"counts": counts} if counts else {})})
    layout = parse(value).on({"pp": 2}, {f"layers.{i}.w": (1,) for i in range(5)})
    check(layout)
    assert [list(layout.rank(rank)) for rank in (0, 1)] == [[f"layers.{i}.w" for i in one] for one in wanted]


def test_one_atom_under_two_names_is_stored_once() -> None:
    rules = ({"match": "head", "tie": "emb"}, {"match": "emb", "shard": [{"tp": 0}]})
    place = {"over": "pp", "layers": "layers.{i}", "first": ["emb"], "last": ["head"]}
    value = spec(*rules, place=place, state={"m": "like"})
    shapes = {"model.emb": (4, 2), "optim.emb.m": (4, 2), "model.layers.0": (1,)}
    for stages, states in ((1, ["optim.emb.m"]), (2, ["optim.emb.m", "optim.head.m"])):
        layout = parse(value).on({"pp": stages, "tp": 2}, shapes)
        check(layout)
        names = {name for rank in range(layout.world) for name in layout.rank(rank)}
        assert {"model.emb", "model.head", *states, "model.layers.0"} == names
        assert layout.rank(layout.world - 1)["model.head"].tie == "model.emb"


def views(*given: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**spec(views=list(given)), **fields}


def test_queries_keys_and_values_interleaved_by_group() -> None:
    view = {"to": "qkv", "of": ["q", "k", "v"], "dim": 0, "groups": 2}
    rule = {"match": "qkv", "shard": [{"tp": 0, "unit": 4}]}
    layout = laid(views(view, rules=[rule]), {"tp": 2}, model__q=(4, 1), model__k=(2, 1), model__v=(2, 1))
    check(layout)
    full = numbered(layout.atoms, 0)
    assert [cut(layout, rank, full)["model.qkv"][:, 0].tolist() for rank in (0, 1)] == [
        [0, 1, 4, 6],
        [2, 3, 5, 7],
    ]


def test_rows_are_turned_from_pairs_to_halves() -> None:
    layout = laid(views({"to": "q_proj", "of": ["q"], "rope": 2}), {}, model__q=(8, 1))
    full = numbered(layout.atoms, 0)
    assert cut(layout, 0, full)["model.q_proj"][:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_factored_state_of_what_a_view_joins_is_refused() -> None:
    view = {"to": "qk", "of": ["q", "k"], "dim": 0}
    layout = laid(
        views(view, state={"column": "like"}), {},
        model__q=(2, 3), model__k=(2, 3), optim__q__column=(1, 3), optim__k__column=(1, 3),
    )  # fmt: skip
    with pytest.raises(
        SpecError, match=r"optim\.qk\.column, .*one element along dimension 0, which the view joins"
    ):
        layout.rank(0)


def test_layers_are_stacked_and_taken_apart() -> None:
    shapes = {f"layers.{i}.w": (2, 2) for i in range(11)}
    place = {"over": "pp", "layers": "layers.{i}.**"}
    layout = parse(views({"to": "layers.w", "of": ["layers.{i}.w"]}, place=place)).on({"pp": 2}, shapes)
    check(layout)
    full = numbered(layout.atoms, 0)
    halves = [cut(layout, rank, full)["layers.w"] for rank in (0, 1)]
    assert np.array_equal(np.concatenate(halves), np.arange(44).reshape(11, 2, 2))
    back = {"to": "layers.{i}.w", "of": ["layers.w"]}
    apart = parse(views(back, place=place)).on({"pp": 2}, {"layers.w": (11, 2, 2)})
    check(apart)
    assert list(apart.rank(1)) == [f"layers.{i}.w" for i in range(6, 11)]
    assert np.array_equal(cut(apart, 1, numbered(apart.atoms, 0))["layers.7.w"], full["layers.7.w"])


def test_a_scalar_of_a_fused_tensor_is_that_of_each_of_its_parts() -> None:
    view = {"to": "qk", "of": ["q", "k"], "dim": 0}
    layout = laid(
        views(view, state={"step": "scalar"}), {"dp": 2},
        model__q=(2,), model__k=(2,), optim__q__step=(), optim__k__step=(),
    )  # fmt: skip
    check(layout)
    assert [patch.atom for patch in layout.rank(1)["optim.qk.step"].patches] == [
        "optim.q.step",
        "optim.k.step",
    ]


def test_matrices_are_dealt_out_whole() -> None:
    then = {"fsdp": {"over": ["dp"], "of": "all"}}
    names = ["a", "b", "c"]
    shapes = {f"model.{n}": (4, 2) for n in names} | {f"optim.{n}.mom": (4, 2) for n in names}
    layout = parse(spec(then=then, state={"mom": "matrix"})).on({"dp": 2}, shapes)
    check(layout)
    states = [[name for name in layout.rank(rank) if name.startswith("optim")] for rank in (0, 1)]
    assert states == [["optim.a.mom", "optim.c.mom"], ["optim.b.mom"]]
    assert layout.rank(1)["model.a"].shape == (2, 2)


def test_stars() -> None:
    assert compiled("a.*.w{1,2}").fullmatch("a.b.w2")
    assert not compiled("a.*.w{1,2}").fullmatch("a.b.c.w2")
    assert not compiled("a.*.w").fullmatch("a.b.wx")
    assert compiled("a.**").fullmatch("a.b.c")
    assert not compiled("a.w").fullmatch("abw")


# --- what is refused ------------------------------------------------------------------------------------------------

CASES: list[tuple[dict[str, Any], dict[str, int], str]] = [
    (spec({"match": "*.w"}, {"match": "a.*"}), {}, r"a\.w is matched by two rules, '\*\.w' and 'a\.\*'"),
    (spec({"match": "b.w"}), {}, r"rule 'b\.w' is unused"),
    (spec({"match": "a.w", "shards": []}), {}, r"rule 'a\.w' has an unknown key 'shards'; known are cast"),
    (
        spec({"match": "a.w", "shard": [{"xp": 0}]}),
        {},
        r"shard\[0\] names the axis 'xp'; the spec's axes are",
    ),
    (spec({"match": "a.w", "shard": [{"tp": 2}]}), {}, r"rule 'a\.w', model\.a\.w, .*no dimension 2"),
    (
        spec({"match": "a.w", "shard": [{"tp": 0, "unit": 3}]}),
        {},
        r"4 elements are no whole number of units of 3",
    ),
    (
        spec({"match": "a.w", "parts": {"dim": 0, "of": [1, 1]}, "shard": [{"tp": "parts", "unit": 2}]}),
        {},
        r"rule 'a\.w' has a unit for all of its parts",
    ),
    (spec({"match": "a.w", "shard": [{"tp": "parts"}]}), {}, r"has to have `parts` and one cut of them"),
    (spec({"match": "a.w", "shard": [{"tp": 0}], "replicate": ["tp"]}), {}, r"cuts over tp, and says"),
    (spec({"match": "a.w", "shard": [{"tp": 0}, {"tp": 1}]}), {}, r"cuts twice over one axis"),
    (spec({"match": "a.w", "cast": "F31"}), {}, r"cast is 'F31'; known are"),
    (spec({"match": "a.w", "pad": {"dim": 0, "to": "heads"}}), {}, r"pad\.to names 'heads'"),
    (spec({"match": "a.{w", "shard": []}), {}, r"a brace is not closed"),
    (spec({"match": "c", "tie": "b.w"}), {}, r"rule 'c': it is tied to b\.w, and there is no b\.w"),
    (spec({"match": "a.w", "tie": "a.w"}), {}, r"it is an atom of its own; leave it out"),
    (spec(), {"cp": 2}, r"the mesh has an axis cp, of which the spec says nothing"),
    (spec(), {"dp": 0}, r"0 ranks along dp"),
    (spec(sizes={"heads": None}), {}, r"sizes\.heads is left open"),
    (spec(sizes={"tp": 2}), {}, r"sizes\.tp is the name of a mesh axis"),
    (spec(state={"m": "liek"}), {}, r"state\.m is 'liek'; known are like, matrix, scalar"),
    (spec(then={"fsdp": {"over": ["dp"], "of": "all"}, "zero": {}}), {}, r"wanted one of fsdp and zero"),
    (
        spec({"match": "a.w", "shard": [{"dp": 0}]}, then={"fsdp": {"over": ["dp"], "of": "all"}}),
        {},
        r"dp cuts it twice",
    ),
    (spec(place={"over": "pp", "layers": "b.{i}"}), {}, r"place: 'b\.\{i\}' is unused"),
    (spec(place={"over": "pp", "layers": "{i}.w"}), {}, r"the layer of a\.w is 'a'"),
    (
        spec(place={"over": "pp", "layers": "a.{i}"}, then={"fsdp": {"over": ["pp"], "of": "all"}}),
        {},
        r"the axis of the stages",
    ),
    (views({"to": "q", "of": ["a.x"]}), {}, r"view 'q' is unused"),
    (views({"to": "q", "of": ["a.w", "b"]}), {}, r"lacks dim"),
    (views({"to": "q", "of": ["a.w", "b"], "dim": 0}), {}, r"view 'q': of a\.w, b some are missing"),
    (views({"to": "q.{i}", "of": ["a.{j}"]}), {}, r"at most one variable"),
    (views({"to": "q", "of": ["a.w"]}, {"to": "r", "of": ["a.w"]}), {}, r"part of two views, 'q' and 'r'"),
]


@pytest.mark.parametrize(("value", "mesh", "why"), CASES)
def test_what_is_wrong_is_refused_by_name(value: dict[str, Any], mesh: dict[str, int], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        parse(value).on(mesh, {"model.a.w": (4, 4)}).rank(0)


WHOLE = views(
    {"to": "b.{x}", "of": ["q.{x}", "k.{x}"], "dim": 0, "groups": "heads", "rope": 1},
    axes=["pp", "dp", "tp"],
    sizes={"heads": 2},
    rules=[
        {"match": "a.*", "shard": [{"tp": 0, "uneven": "front", "unit": "heads", "cover": 3}], "cast": "BF16"},
        {"match": "c", "parts": {"dim": 0, "of": [1, 2], "unit": [1, 1]}, "shard": [{"tp": "parts"}]},
        {"match": "d", "pad": {"dim": 0, "to": [2, "tp"]}, "replicate": ["dp"], "then": {"zero": {"over": ["dp"], "of": "all"}}},
        {"match": "e", "partial": {"over": "dp", "union": "mean"}},
        {"match": "f", "tie": "c"},
    ],
    place={"over": "pp", "layers": "a.{i}", "counts": [1], "chunks": 1, "first": ["c"], "last": ["f"]},
    state={"m": "like"},
    then={"fsdp": {"over": ["dp"], "of": "all", "dim": 0}},
)  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from(["tp", "xp", "", "{", "{i}", "**", "parts"])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in plain data: a list or dict, and the index or key in it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inside for place in ((value, key), *places(one))]


@settings(max_examples=300)
@given(st.data(), anything)
def test_whatever_stands_in_a_spec_is_read_or_refused(data: st.DataObject, other: Any) -> None:
    value = json.loads(json.dumps(WHOLE))
    parse(value)
    where, key = data.draw(st.sampled_from(places(value)))
    where[key] = other
    shapes = {"a.0": (4, 2), "c": (3,), "d": (2, 2), "e": (2,), "q.w": (4, 1), "k.w": (4, 1)}
    with contextlib.suppress(SpecError):
        check(parse(value).on({"dp": 2, "tp": 2}, shapes))


def test_state_that_the_spec_does_not_know_is_refused() -> None:
    with pytest.raises(SpecError, match=r"optimizer state 'exp_avg', of which the spec says nothing"):
        laid(spec(), {}, model__w=(2,), optim__w__exp_avg=(2,))
    with pytest.raises(SpecError, match=r"its parameter has shape \[2\], so it is not like it"):
        laid(spec(state={"m": "like"}), {}, model__w=(2,), optim__w__m=(3,))
    with pytest.raises(SpecError, match=r"optim\.v\.m is the state of v"):
        laid(spec(state={"m": "like"}), {}, model__w=(2,), optim__v__m=(2,))


def test_a_file_is_read_strictly() -> None:
    assert parse_text(b'{"axes": ["dp"]}', "a.json").axes == ("dp",)
    with pytest.raises(SpecError, match=r"a\.json is no JSON of ours: a key comes twice"):
        parse_text(b'{"axes": [], "axes": []}', "a.json")


def test_a_hole_an_overlap_and_a_wrong_count_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = laid(spec({"match": "w", "shard": [{"tp": 0}]}), {"tp": 2, "dp": 2}, model__w=(4, 2))
    check(layout)
    true = Layout.rank
    changes: list[tuple[str, Any]] = [
        (r"4 of 8 elements", lambda p: p._replace(primary=p.primary and p.box.offset[0] == 0)),
        (r"overlap", lambda p: p._replace(primary=True)),
        (r"3 copies are said", lambda p: p._replace(copies=3)),
        (r"outside", lambda p: p._replace(box=Box((3, 0), p.box.shape))),
    ]
    for why, change in changes:

        def wrong(self: Layout, rank: int, change: Any = change) -> dict[str, Any]:
            return {
                n: replace(one, patches=tuple(map(change, one.patches)))
                for n, one in true(self, rank).items()
            }

        monkeypatch.setattr(Layout, "rank", wrong)
        with pytest.raises(SpecError, match=rf"rule 'w', model\.w of shape \[4, 2\] .*{why}"):
            check(layout)


def test_sizes_given_later() -> None:
    value = spec({"match": "w", "shard": [{"tp": 0, "unit": "hd"}]}, sizes={"hd": None})
    layout = parse(value, {"hd": 2}).on({"tp": 2}, {"model.w": (6, 1)})
    assert [layout.rank(rank)["model.w"].shape[0] for rank in (0, 1)] == [4, 2]
    with pytest.raises(SpecError, match="size heads is given"):
        parse(value, {"hd": 2, "heads": 1})


def test_the_example_of_the_page() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "layouts.md").read_text()
    value = json.loads(page.partition("```json\n")[2].partition("```")[0])
    weights = {
        "embedding.weight": (250, 8), "norm.weight": (8,),
        **{f"layers.{i}.attn.{x}.weight": ((64, 8) if x == "q" else (16, 8)) for i in range(2) for x in "qkv"},
        **{f"layers.{i}.attn.out.weight": (8, 64) for i in range(2)},
        **{f"layers.{i}.mlp.gate_up.weight": (20, 8) for i in range(2)},
        **{f"layers.{i}.mlp.down.weight": (8, 10) for i in range(2)},
    }  # fmt: skip
    shapes = {f"model.{name}": shape for name, shape in weights.items()}
    shapes |= {f"optim.{name}.exp_avg": shape for name, shape in weights.items()}
    layout = parse(value, {"head": 2}).on({"pp": 2, "dp": 3, "tp": 2}, shapes)
    check(layout)
    assert {"model.head.weight", "optim.flat.exp_avg"} <= {*layout.rank(layout.world - 1)}
    told = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert told >= {*value} - {"axes", "sizes"} | {
        "shard",
        "parts",
        "pad",
        "tie",
        "partial",
        "cast",
        "replicate",
        "views",
    }
