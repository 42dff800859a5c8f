"""The small checkpoint that is kept of each released version of the format. `python -m fakes.golden FOLDER` writes this version's, once,
into `tests/unit/checkpoint/golden/VERSION`; after its release nobody changes it.

Two ranks: shards, a shard of nothing, replicas, a tie, a state that is absent, every type, values that JSON cannot hold, a ledger, a key.
"""

from __future__ import annotations

import math
import struct
import sys
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from fakes.meshes import Mesh, held
from fakes.saving import save_parts
from stormjib_checkpoint.commit import commit_step
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import ABSENT, TAGS
from stormjib_checkpoint.tensors import held as whole
from stormjib_checkpoint.writer import Part

if TYPE_CHECKING:
    from stormjib_checkpoint.format import ResumePoint

KEY = b"the key of the golden checkpoint"
WORLD = 2
STEP = 3
SHARDED = {"model.emb": ((5, 3), torch.float32), "model.thin": ((1, 4), torch.bfloat16)}
TIES = {"model.head": "model.emb"}
SAMPLES = {1: (0, 1), 2: (2, 3), 3: (4, 2**63 - 1)}
VALUES: dict[str, Any] = {
    "optim.emb": ABSENT,
    "group.0.betas": (0.9, 0.999),
    "group.0.lr": 0.1,
    "group.0.params": ["model.emb"],
    "numbers": [-0.0, 1e-300, math.inf, -math.inf, 2**64, -(1 << 3000), True, None],
    "other NaN": struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0],
    "keys": {1: "one", -1: {"$tuple": []}, "text": b"\x00\xff", "": ()},
    "tag": {"$float": "not one"},
}
TRAIN: dict[str, Any] = {"step": STEP, "rng": (1, (2, b"state")), "ü": {"nested": [{"deep": {7: ()}}]}}


def pattern(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor whose bytes need no generator of random numbers, so that they are the same for ever."""
    size, most = prod(shape) * dtype.itemsize, 2 if dtype is torch.bool else 256
    data = bytearray((37 * at + 101 * seed + at * at) % most for at in range(size))
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def tensors() -> dict[str, torch.Tensor]:
    """What was saved, by every name but those of ties."""
    found = {name: pattern(shape, dtype, 1) for name, (shape, dtype) in SHARDED.items()}
    found |= {
        f"type.{tag}": pattern((2, 2), dtype, seed)
        for seed, (dtype, tag) in enumerate(sorted(TAGS.items(), key=str))
    }
    return found | {"scalar": pattern((), torch.float32, 5), "nothing": pattern((0, 2), torch.int16, 6)}


def write(root: str) -> ResumePoint:
    """Write the checkpoint of this version."""
    storage, generation = Local(root, key=KEY), GenerationId(2, 7)
    open_generation(storage, str(generation), "job")
    for rank in range(WORLD):
        parts = []
        for name, tensor in tensors().items():
            if name in SHARDED:
                box, _ = list(Mesh((WORLD,), (0,)).boxes(tuple(tensor.shape)))[rank]
                parts.append(held(name, tensor, box, True))
            else:
                parts.append(whole(name, tensor, rank, WORLD))
        fed = {step: ids[rank::WORLD] for step, ids in SAMPLES.items()}
        save_parts(storage, Part(STEP, generation, rank, WORLD), parts, VALUES, TRAIN, fed, TIES)
    return commit_step(storage, str(generation), WORLD, STEP)


if __name__ == "__main__":
    print(write(sys.argv[1]))
