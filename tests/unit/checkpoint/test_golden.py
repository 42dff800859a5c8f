"""What a released version of the format has written is read for ever, bit for bit. `fakes.golden` has made it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fakes import golden
from fakes.meshes import raw, zeros
from stormjib_checkpoint.history import newest
from stormjib_checkpoint.ledger import audit
from stormjib_checkpoint.reader import load
from stormjib_checkpoint.records import FORMAT
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.tensors import TAGS
from stormjib_checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def bits(value: object) -> Iterator[object]:
    """A value as what can be compared without exception: types, and floats by their bits."""
    yield type(value)
    if isinstance(value, dict):
        for key in sorted(value, key=repr):
            yield from (key, *bits(value[key]))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from bits(item)
    else:
        yield struct.pack(">d", value) if isinstance(value, float) else value


def to_fill(tied: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: zeros(tuple(t.shape), t.dtype) for name, t in golden.tensors().items()}
    for name, first in golden.TIES.items():
        state[name] = state[first] if tied else torch.zeros_like(state[first])
    return state | dict.fromkeys(golden.VALUES)


def test_1_0_is_kept() -> None:
    assert VERSIONS[0] == "1.0"


@pytest.mark.parametrize("key", [golden.KEY, None])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("written", VERSIONS)
def test_what_a_version_wrote_loads_bit_for_bit(written: str, tied: bool, key: bytes | None) -> None:
    storage, state = Local(GOLDEN / written, key=key), to_fill(tied)
    point = newest(storage)
    assert point is not None
    state |= {name: ... for name, value in golden.VALUES.items() if value is ...}
    train = load(storage, point, state)
    wanted = golden.tensors()
    wanted |= {name: wanted[first] for name, first in golden.TIES.items()}
    assert [name for name, tensor in wanted.items() if raw(state[name]) != raw(tensor)] == []
    assert list(bits({name: state[name] for name in golden.VALUES})) == list(bits(golden.VALUES))
    assert list(bits(train)) == list(bits(golden.TRAIN))
    assert len(wanted) == len(TAGS) + 5
    assert [flaw for _, flaw in verify(storage, point)] == [None, None]
    found = audit(storage)
    assert {step: tuple(found.ids(step)) for step in found.steps} == golden.SAMPLES
    assert found.problems == ()


@pytest.mark.skipif(FORMAT not in VERSIONS, reason="the one of this version is made when it is released")
def test_the_golden_checkpoint_is_what_this_version_writes(tmp_path: Path) -> None:
    golden.write(str(tmp_path))
    ours, kept = ({str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()} for root in (tmp_path, GOLDEN / FORMAT))  # fmt: skip
    assert ours.keys() == kept.keys()
    assert [name for name in kept if ours[name] != kept[name]] == []
