"""Weights for Hugging Face and from there: sharded safetensors with an index, and `config.json` for our trainer's Llama.

Our rotary positions turn pairs (i, i + half), as `transformers` does, so queries and keys go over as they are. A checkpoint of any other
model keeps its own names, less `model.`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from stormjib_checkpoint.boxes import whole
from stormjib_checkpoint.errors import ExportRefused, ForeignDamaged, ImportRefused
from stormjib_checkpoint.format import AS_BYTES, ITEM_BYTES
from stormjib_checkpoint.interop.foreign import Chunk, Foreign, Source
from stormjib_checkpoint.interop.optimizer import MODEL
from stormjib_checkpoint.interop.outflow import new_folder, streams
from stormjib_checkpoint.shardfile import MAX_HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from stormjib_checkpoint.index import IndexAtom
    from stormjib_checkpoint.reader import Checkpoint

SHARD_BYTES = 4 * 1024**3
"""Of a file, unless one tensor alone is longer."""
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
VOCABULARY = 256
"""Of our trainer: bytes."""

_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
_OURS = re.compile(r"blocks\.(\d+)\.(.+)")
_THEIRS = re.compile(r"model\.layers\.(\d+)\.(.+)")


# --- out --------------------------------------------------------------------------------------------------------------


def export(checkpoint: Checkpoint, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights into a new folder, one file at a time. Raises ExportRefused, which names the tensor, and LoadError."""
    named = {_to_theirs(name, checkpoint): name for name in _weights(checkpoint)}
    config = _config(checkpoint)
    files = list(_filled({new: checkpoint.atoms[old] for new, old in named.items()}, shard_bytes))
    new_folder(folder)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write(folder / file, checkpoint, {name: named[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    size = sum(checkpoint.atoms[old].nbytes for old in named.values())
    _json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    if config is not None:
        _json(folder / CONFIG, config)


def _weights(checkpoint: Checkpoint) -> list[str]:
    """Tensors of the model, each once: of names that are tied the first. Raises ExportRefused."""
    once: dict[int, str] = {}
    for name, atom in sorted(checkpoint.atoms.items()):
        if name.startswith(MODEL):
            once.setdefault(id(atom), name)
            if atom.dtype in AS_BYTES:
                raise ExportRefused(
                    f"{name} is {atom.dtype}, which safetensors do not have; convert it before it is saved"
                )
    if not once:
        raise ExportRefused(f"no tensor is called {MODEL}*, so there are no weights to export")
    return list(once.values())


def _to_theirs(name: str, checkpoint: Checkpoint) -> str:
    own = name.removeprefix(MODEL)
    if not _is_trainers(checkpoint):
        return own
    block = _OURS.fullmatch(own)
    found = f"model.layers.{block[1]}.{_BLOCK[block[2]]}" if block and block[2] in _BLOCK else _NAMES.get(own)
    if found is None:
        raise ExportRefused(f"{name} is no tensor of the trainer's model, whose configuration lies beside it")
    return found


def _is_trainers(checkpoint: Checkpoint) -> bool:
    return "model" in checkpoint.train.get("config", {}) and f"{MODEL}embedding.weight" in checkpoint.atoms


def _config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """`config.json` of our trainer's model; for others whoever made the model has it."""
    if not _is_trainers(checkpoint):
        return None
    model = checkpoint.train["config"]["model"]
    gate = checkpoint.atoms[f"{MODEL}blocks.0.feed_forward.gate.weight"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": model["dim"],
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["heads"],
        "max_position_embeddings": model["context"],
        "rms_norm_eps": 1e-5,
        "rope_theta": model["rope_theta"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model["tied"],
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _filled(atoms: Mapping[str, IndexAtom], shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut into files."""
    names: list[str] = []
    size = 0
    for name, atom in atoms.items():
        if names and size + atom.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += atom.nbytes
    yield names


def _write(path: Path, checkpoint: Checkpoint, named: Mapping[str, str]) -> None:
    # Widest elements first, so that each tensor is aligned without holes.
    ordered = sorted(named.items(), key=lambda pair: (-ITEM_BYTES[checkpoint.atoms[pair[1]].dtype], pair[0]))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for new, old in ordered:
        atom = checkpoint.atoms[old]
        table[new] = {
            "dtype": atom.dtype,
            "shape": list(atom.shape),
            "data_offsets": [end, end + atom.nbytes],
        }
        end += atom.nbytes
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("xb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for _, parts in streams(checkpoint, [old for _, old in ordered]):
            file.writelines(parts)


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# --- in ---------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Foreign:
    """The weights in a folder of safetensors. Raises ForeignDamaged, ImportRefused."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ImportRefused(f"{folder} has no *.safetensors; name the folder of a model")
    ours = _is_ours(folder)
    sources: dict[str, Source] = {}
    for path in paths:
        for name, dtype, shape, start in headers(path):
            own = MODEL + (_to_ours(name) if ours else name)
            if own in sources:
                raise ForeignDamaged(f"{path}: {name} lies in another file too")
            sources[own] = Source(own, dtype, shape, (Chunk(whole(shape), path, start),))
    _all_there(folder, len(sources))
    return Foreign(list(sources.values()), {})


def _all_there(folder: Path, count: int) -> None:
    """Where there is an index, it says how many tensors there are."""
    index = folder / INDEX
    if index.exists():
        wanted = _object(index.read_bytes(), index).get("weight_map", {})
        if len(wanted) != count:
            raise ForeignDamaged(
                f"{index} names {len(wanted)} tensors, and the files hold {count}; copy the folder anew"
            )


def headers(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and first byte of each tensor in a safetensors file. Raises ForeignDamaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise ForeignDamaged(
                f"{path} is no safetensors file: a header of {length} bytes in a file of {size}"
            )
        table = _object(file.read(length), path)
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            fits = 0 <= start <= end <= size - 8 - length
            right = end - start == whole(shape).volume * ITEM_BYTES[dtype]
        except (KeyError, TypeError, ValueError) as error:
            raise ForeignDamaged(f"{path}: the header says nothing sensible of {name[:200]!r}") from error
        if not (fits and right) or any(type(side) is not int or side < 0 for side in shape):
            raise ForeignDamaged(
                f"{path}: {name[:200]!r} does not lie where the header says; copy the file anew"
            )
        yield name, dtype, shape, 8 + length + start


def _object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ForeignDamaged(f"{path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ForeignDamaged(f"{path}: no JSON object")
    return value


def _is_ours(folder: Path) -> bool:
    """Whether it is a model of our trainer: a Llama over bytes, each head with keys of its own."""
    path = folder / CONFIG
    if not path.exists():
        return False
    config = _object(path.read_bytes(), path)
    heads = config.get("num_attention_heads")
    return (
        config.get("model_type") == "llama"
        and config.get("vocab_size") == VOCABULARY
        and config.get("num_key_value_heads", heads) == heads
    )


def _to_ours(name: str) -> str:
    block = _THEIRS.fullmatch(name)
    inside = {theirs: ours for ours, theirs in _BLOCK.items()}
    if block and block[2] in inside:
        return f"blocks.{block[1]}.{inside[block[2]]}"
    names = {theirs: ours for ours, theirs in _NAMES.items()}
    if name not in names:
        raise ImportRefused(f"{name} is no tensor of the trainer's model, which config.json says this is")
    return names[name]
