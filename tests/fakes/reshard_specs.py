"""The layouts of the resharding table: for each row a spec and a mesh for every side of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fakes.reshard_models import MODELS, Net, atoms_of
from stormjib_checkpoint.spec.parsing import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_checkpoint.spec.layout import Layout

AXES = ["pp", "rep", "cp", "dp", "edp", "ep", "etp", "tp"]
STATES: Mapping[str, Mapping[str, str]] = {
    "adamw": {"exp_avg": "like", "exp_avg_sq": "like", "step": "scalar"},
    "lion": {"exp_avg": "like"},
    "sgd": {"momentum_buffer": "like"},
    "adafactor": {"row_var": "like", "col_var": "like", "variance": "like", "step": "scalar"},
    "muon": {"momentum_buffer": "matrix", "exp_avg": "like"},
}
Rule = dict[str, Any]


def fsdp(over: str = "dp") -> Rule:
    """Each tensor cut along its first dimension, weights too."""
    return {"fsdp": {"over": [over], "of": "all"}}


def zero1(*over: str, buffer: str = "flat") -> Rule:
    """The optimizer's state in one flat buffer."""
    return {"zero": {"over": list(over), "of": "states", "buffer": buffer}}


def zero3(over: str = "dp") -> Rule:
    """Each tensor flat by itself, weights too."""
    return {"zero": {"over": [over], "of": "all"}}


def stages(**more: Any) -> Rule:
    """Pipeline stages: the embedding on the first, the head on the last."""
    return {
        "over": "pp", "layers": "layers.{i}.**", "first": ["emb.*", "pos.*"], "last": ["norm.*", "head.*"], **more
    }  # fmt: skip


QKV = {"to": "layers.{i}.attn.wqkv.{p}", "of": [f"layers.{{i}}.attn.w{x}.{{p}}" for x in "qkv"], "dim": 0}
HF = [
    {"to": "model.layers.{i}.self_attn.q_proj.{p}", "of": ["layers.{i}.attn.wq.{p}"], "rope": "heads"},
    {"to": "model.layers.{i}.self_attn.k_proj.{p}", "of": ["layers.{i}.attn.wk.{p}"], "rope": "kv_heads"},
    *(
        {"to": f"model.layers.{{i}}.{new}.{{p}}", "of": [f"layers.{{i}}.{old}.{{p}}"]}
        for old, new in (("attn.wv", "self_attn.v_proj"), ("attn.wo", "self_attn.o_proj"))
    ),
]
HF_EXPERTS = [
    {"to": f"model.layers.{{i}}.experts.{{e}}.{new}.weight", "of": [f"layers.{{i}}.mlp.experts.{{e}}.{old}"]}
    for old, new in (("w1", "up_proj"), ("w2", "down_proj"))
]


def views_of(net: Net) -> list[Rule]:
    """How the model's own tensors are made of atoms."""
    found = []
    if net.qkv == "grouped":
        found.append({**QKV, "groups": "kv_heads"})
    if net.experts_as == "fused":
        each = "layers.{i}.mlp.experts.{e}"
        found += [{"to": f"layers.{{i}}.mlp.{w}", "of": [f"{each}.{w}"], "dim": 0} for w in ("w1", "w2")]
    if net.stacked:
        inner = (
            "norm1.weight",
            "norm2.weight",
            *(f"attn.w{x}.weight" for x in "qkvo"),
            "mlp.w13.weight",
            "mlp.w2.weight",
        )
        found += [{"to": f"layers.{name}", "of": [f"layers.{{i}}.{name}"]} for name in inner]
    return found


def spec_of(
    model: str,
    optimizer: str = "adamw",
    *,
    tp: bool = False,
    pad: Any = (4, "tp"),
    ep: bool = False,
    views: list[Rule] | None = None,
    **fields: Any,
) -> Rule:
    """A spec of one of the models. `views` in place of those that make the model's own tensors; `fields` are those of the spec."""
    net = MODELS[model]
    rules = (_tensor_parallel(net, list(pad)) if tp else []) + (_experts(net) if ep else [])
    if net.tied:
        rules.append({"match": "head.weight", "tie": "emb.weight"})
    return {
        "axes": AXES,
        "sizes": {"heads": net.heads, "kv_heads": net.kv_heads, "head": net.head},
        "rules": rules,
        "views": views_of(net) if views is None else views,
        "state": dict(STATES[optimizer]),
        **fields,
    }


def _tensor_parallel(net: Net, pad: list[Any]) -> list[Rule]:
    heads: Rule = {"tp": 0, "uneven": "front", "unit": "head"}
    group = {"tp": 0, "uneven": "front", "unit": ["heads", "head"]}
    vocabulary = {"pad": {"dim": 0, "to": pad}, "shard": [{"tp": 0}]}
    rules: list[Rule] = [{"match": "emb.weight", **vocabulary}]
    if not net.tied:
        rules.append({"match": "head.weight", **vocabulary})
    if net.qkv == "grouped":
        # A group: the queries of one key-value head, its key and its value.
        size = (net.heads // net.kv_heads + 2) * net.head
        rules.append({"match": "layers.*.attn.wqkv.*", "shard": [{**group, "unit": size}]})
    else:
        rules.append({"match": "layers.*.attn.wq.*", "shard": [heads]})
        rules.append({"match": "layers.*.attn.w{k,v}.*", "shard": [{**heads, "cover": "heads"}]})
    columns = {"tp": 1, "uneven": "front"}
    rules.append({"match": "layers.*.attn.wo.weight", "shard": [{**columns, "unit": "head"}]})
    rules.append({"match": "layers.*.mlp.w2.weight", "shard": [columns]})
    if net.style == "gpt":
        rules.append({"match": "layers.*.mlp.w1.*", "shard": [{"tp": 0, "uneven": "front"}]})
    else:
        parts = {"parts": {"dim": 0, "of": [1, 1]}, "shard": [{"tp": "parts", "uneven": "front"}]}
        rules.append({"match": "layers.*.mlp.w13.weight", **parts})
    return rules


def _experts(net: Net) -> list[Rule]:
    shard = [{"ep": 0, "uneven": "front"}, {"etp": 1}]
    if net.experts_as == "fused":
        shard = [{"ep": 0, "unit": net.ffn}]
    return [{"match": "layers.*.mlp.w{1,2}", "shard": shard}]


@dataclass(frozen=True)
class Side:
    """A spec and a mesh."""

    spec: Rule
    mesh: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One row of the table. The first side saves; each of the others loads, saves, and is loaded by the next."""

    number: str
    model: str
    sides: tuple[Side, ...]
    trap: str
    optimizer: str = "adamw"

    def layouts(self) -> list[Layout]:
        """Of each side."""
        atoms = atoms_of(self.model, self.optimizer)
        return [parse(side.spec).on(side.mesh, atoms) for side in self.sides]


def on(model: str, mesh: Mapping[str, int], optimizer: str = "adamw", **fields: Any) -> Side:
    """A side of a row."""
    return Side(spec_of(model, optimizer, **fields), mesh)


def own(model: str, optimizer: str = "adamw") -> Layout:
    """One rank that has everything, under the names of the model itself: what a script without a layout has."""
    return parse(spec_of(model, optimizer)).on({}, atoms_of(model, optimizer))


def _fsdp(model: str, *ranks: int, optimizer: str = "adamw") -> tuple[Side, ...]:
    return tuple(on(model, {"dp": size}, optimizer, then=fsdp()) for size in ranks)


_ROUTER = {"match": "layers.*.mlp.bias", "partial": {"over": "dp", "union": "mean"}}


def _with_router(side: Side) -> Side:
    """Each data-parallel rank has a bias of its own for the router."""
    return Side({**side.spec, "rules": [*side.spec["rules"], _ROUTER]}, side.mesh)


def _cast(side: Side, dtype: str) -> Side:
    return Side({**side.spec, "rules": [{"match": "**", "cast": dtype}]}, side.mesh)


def _dense_and_experts() -> Side:
    """Two groups of data-parallel ranks: those that have the same experts, and all."""
    side = on("M", {"edp": 2, "ep": 4}, ep=True, then=zero1("edp", "ep"))
    experts = [{**rule, "then": zero1("edp", buffer="experts")} for rule in side.spec["rules"]]
    return Side({**side.spec, "rules": experts}, side.mesh)


_TP2_PP2 = {"pp": 2, "dp": 2, "tp": 2}

ROWS = (
    Row("1", "G", (on("G", {}), on("G", {"dp": 4})), "read once, broadcast"),
    Row("2", "G", tuple(on("G", {"dp": n}, then=zero1("dp")) for n in (4, 3)), "flat pads, moments"),
    Row("3", "G", tuple(on("G", {"dp": n}, then=zero3()) for n in (3, 2)), "each tensor flat by itself"),
    Row("4", "L", _fsdp("L", 8, 7), "odd, ceil tail"),
    Row("5", "L", _fsdp("L", 7, 8), "reverse"),
    Row("6", "X", _fsdp("X", 5, 64), "shards without elements"),
    Row("7", "L", (*_fsdp("L", 4), on("L", {"dp": 6}, then=zero1("dp"))), "box to flat"),
    Row("8", "L", (on("L", {"dp": 6}, then=zero3()), on("L", {"dp": 2, "tp": 2}, tp=True, then=fsdp())), "flat to strided"),
    Row("9", "L", (on("L", {"dp": 2, "tp": 2}, tp=True, then=fsdp()), on("L", {"tp": 4}, tp=True)), "gate and up"),
    Row("10", "L", (on("L", {}), on("L", {"tp": 3}, tp=True)), "8 heads: 3, 3, 2"),
    Row("11", "L", (on("L", {"tp": 2}, tp=True), on("L", {"tp": 4}, tp=True)), "key-value heads on several ranks"),
    Row("12", "F", (on("F", {"tp": 4}, tp=True), on("F", {}, views=HF)), "permutation of rows"),
    Row("13", "F", (on("F", {"tp": 2}, tp=True), on("F", {"pp": 2, "tp": 4}, tp=True, place=stages())), "units and stages"),
    Row(
        "14", "V50257",
        (on("V50257", {"tp": 2}, tp=True, pad=[128]), on("V50257", {"tp": 3}, tp=True, pad=[256, "tp"])),
        "pads differ",
    ),
    Row("15", "V17", (on("V17", {"pp": 8}, place=stages()), on("V17", {"tp": 8}, tp=True)), "last ranks have pads only"),
    Row("16", "LT", (on("LT", {"pp": 2}, place=stages()), on("LT", {})), "one atom on both ends"),
    Row("17", "LT", (on("LT", {}), on("LT", {"pp": 4}, place=stages())), "the tie split again"),
    Row("18", "L16", (on("L16", {"pp": 4}, place=stages()), on("L16", {"pp": 2}, place=stages(chunks=2))), "interleaved"),
    Row("19", "L16", (on("L16", {"pp": 3}, place=stages(counts=[5, 6, 5])), on("L16", {"pp": 5}, place=stages())), "uneven stages"),
    Row(
        "20", "L",
        (on("L", _TP2_PP2, tp=True, place=stages(), then=zero1("dp")), on("L", {"dp": 5}, then=zero1("dp"))),
        "three dimensions to one odd",
    ),
    Row("21", "L", (on("L", {**_TP2_PP2, "cp": 2}, tp=True, place=stages()), on("L", {"dp": 6})), "context ranks are copies"),
    Row(
        "22", "M",
        tuple(_with_router(on("M", {"dp": dp, "ep": ep}, ep=True)) for dp, ep in ((2, 4), (4, 2))),
        "moments of experts, router",
    ),
    Row("23", "M", (on("M", {"ep": 8}, ep=True), on("M", {"ep": 3}, ep=True)), "8 experts: 3, 3, 2"),
    Row("24", "M10", (on("M10", {"ep": 2, "etp": 2}, ep=True), on("M10", {"ep": 5}, ep=True)), "experts cut twice"),
    Row("25", "M-fused", (on("M-fused", {"ep": 4}, ep=True), on("M-fused", {}, views=HF_EXPERTS)), "one tensor to one each"),
    Row("26", "M", (_dense_and_experts(), *_fsdp("M", 6)), "two groups of ranks in one step"),
    Row("27", "S", (*_fsdp("S", 2), on("S", {"pp": 2}, views=[], place=stages())), "stacked layers"),
    Row("28", "G", tuple(on("G", {"rep": a, "dp": b}, then=fsdp()) for a, b in ((2, 4), (3, 2))), "copies"),
    Row("29", "L", tuple(on("L", {"dp": n}) for n in (8, 7, 5, 8)), "three reshapes"),
    Row("30", "G-dropout", tuple(on("G-dropout", {"dp": n}) for n in (4, 3)), "masks"),
    Row("31", "L", (_cast(on("L", {"dp": 4}), "BF16"), _cast(on("L", {"dp": 3}), "F16"), _cast(on("L", {"dp": 2}), "F32")), "types"),
    Row("32", "L", (on("L", {"dp": 4}), *_fsdp("L", 6)), "two groups of parameters"),
    *(
        Row(f"33-{name}", "L", _fsdp("L", 4, 3, optimizer=name), "state of other optimizers", name)
        for name in ("lion", "sgd", "adafactor")
    ),
    Row("34", "L", _fsdp("L", 2, 5, optimizer="muon"), "matrices are never cut", "muon"),
    Row("35", "LoRA", _fsdp("LoRA", 4, 3), "weights without state"),
    Row("36", "L", _fsdp("L", 8, 7), "a rank's file is lost"),
    Row("37", "L", _fsdp("L", 8, 5), "a bit is wrong"),
    Row("38", "L", _fsdp("L", 6), "import of DeepSpeed's universal format"),
    Row("39", "L", _fsdp("L", 4), "export to it"),
    Row("40", "L", _fsdp("L", 4, 3), "torch's own reader"),
    Row("41", "L", (on("L", {"dp": 3, "tp": 2}, tp=True, then=fsdp()),), "import of DCP"),
    Row("42", "L", tuple(on("L", {"dp": n}) for n in (5, 7)), "micro-batches that do not divide"),
)  # fmt: skip
