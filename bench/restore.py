"""What a load costs, beside other loaders on the same machine in the same minutes, and what its proof costs.

`python -m bench.restore [--quick] [--gb 1.1] [--folder DIR] [--json FILE]`. It wants a machine that does nothing else, and a folder on the disk in question.

Every loader fills the same tensors, which have their memory already, and what it filled is compared, bit for bit. *Cold*: nothing of the files is
in the page cache; *warm*: all is. *Memory*: from the slots in a node's memory, as a rank does that starts again there. Without digests is our own
reader with its proof taken out by this bench: there is no such option. *Adopt* is what an agent does for ranks that have died: from memory to the disk.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench.checkpoint import GB, llama, size
from bench.savers import as_given, join_alone
from bench.table import Row, show, write_json
from stormjib_checkpoint import digest, loading, reader
from stormjib_checkpoint.adopting import adopt
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.history import newest
from stormjib_checkpoint.node_memory import Near, staged
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bench.savers import State
    from stormjib_checkpoint.storage import Storage

    Load = Callable[[State], None]

ROUNDS = 7
OURS, BARE = "stormjib", "stormjib without digests"


def loaders(folder: Path, state: State) -> Mapping[str, Load]:
    """Save `state` once with each, and give what loads it into other tensors."""
    root = folder / "stormjib"
    with saved(root, state):
        pass
    storage = Local(root)

    def ours(into: State, near: Near | None = None) -> None:
        point = newest(storage)
        assert point is not None
        reader.load(storage, point, into, near=near)

    def bare(into: State) -> None:
        with (
            mock.patch.object(digest, "partial", return_value=0),
            mock.patch.object(loading, "unproved", return_value=[]),
        ):
            ours(into)

    save_file(state, folder / "safetensors")
    torch.save(state, folder / "torch")
    join_alone()
    dcp.state_dict_saver.save(as_given(state), storage_writer=dcp.filesystem.FileSystemWriter(folder / "dcp"))
    os.sync()
    return {
        OURS: ours,
        BARE: bare,
        "safetensors": lambda into: put(into, load_file(folder / "safetensors")),
        "torch.load, weights only": lambda into: put(into, torch.load(folder / "torch", weights_only=True)),
        "dcp.load": lambda into: dcp.state_dict_loader.load(
            as_given(into), checkpoint_id=folder / "dcp", no_dist=True
        ),
    }


@contextmanager
def saved(root: Path, state: State, memory: str = "") -> Iterator[Engine]:
    """One step of `state` on the disk, and in memory where that is named."""
    engine = Engine(root, memory=memory)
    engine.reserve(state)
    engine.async_save(state, step=1)
    engine.wait()
    yield engine
    engine.close()


def put(into: State, found: State) -> None:
    """What a script does that gets tensors of a loader."""
    for name, tensor in into.items():
        tensor.copy_(found[name])


def cold(folder: Path) -> None:
    """Nothing of these files is in the page cache any more."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(load: Load, into: State, wanted: State) -> tuple[float, float]:
    """Seconds, and of CPU, of one load that has filled what it should."""
    for tensor in into.values():
        tensor.fill_(-1)
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        load(into)
    seconds, used = time.perf_counter() - began, time.process_time() - cpu
    for name, tensor in wanted.items():
        if not torch.equal(into[name], tensor):
            raise SystemExit(f"{name} is not what was saved")
    return seconds, used


def from_files(folder: Path, state: State, rounds: int) -> Iterator[Row]:
    """All loaders in random turns, cold and warm."""
    gigabytes = size(state) / GB
    every = loaders(folder, state)
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    cases = list(itertools.product(every, ("cold", "warm")))
    found: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for name, how in random.sample(cases, len(cases)):
            if how == "cold":
                cold(folder)
            else:
                every[name](into)
            found[name, how].append(timed(every[name], into, state))
    for (name, how), values in found.items():
        case = f"{gigabytes:.2f} GB, {how}"
        yield Row.of("load", case, name, [seconds for seconds, _ in values], "s")
        yield Row.of("CPU", case, name, [cpu / gigabytes for _, cpu in values], "s/GB")
    for how in ("cold", "warm"):
        pairs = zip(found[OURS, how], found[BARE, how], strict=True)
        yield Row.of(
            "load, with digests / without",
            f"{gigabytes:.2f} GB, {how}",
            OURS,
            [a[0] / b[0] for a, b in pairs],
            "x",
        )


def from_memory(folder: Path, state: State, rounds: int) -> Iterator[Row]:
    """From a node's memory: into a rank that starts again, and by an agent to the disk."""
    gigabytes = size(state) / GB
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir="/dev/shm") as memory:
        with saved(folder / "near", state, memory) as engine:
            point = newest(engine.storage)
            assert point is not None
            near = Near(Path(memory))
            loads = [
                timed(lambda to: _load(engine.storage, point, to, near), into, state)[0]
                for _ in range(rounds)
            ]
        yield Row.of("load", f"{gigabytes:.2f} GB, memory", OURS, [s / gigabytes for s in loads], "s/GB")
        yield Row.of(
            "adopt", f"{gigabytes:.2f} GB, memory", OURS, list(_adoptions(folder, memory, rounds)), "s/GB"
        )


def _load(storage: Storage, point: tuple[int, str, str], into: State, near: Near) -> None:
    reader.load(storage, point, into, near=near)


def _adoptions(folder: Path, memory: str, rounds: int) -> Iterator[float]:
    """Seconds per gigabyte, each time as if nothing of the step had reached the disk."""
    for _ in range(rounds):
        shutil.rmtree(next((folder / "near").glob("step-*")))
        os.sync()
        began = time.perf_counter()
        adopted = adopt(Local(folder / "near"), Path(memory))
        seconds = time.perf_counter() - began
        if not adopted.parts:
            raise SystemExit(f"nothing was adopted: {adopted.notes}")
        yield seconds / (next(staged(Path(memory))).record.data.bytes / GB)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of a gigabyte, three rounds")
    parser.add_argument("--gb", type=float, default=1.1)
    parser.add_argument("--folder", type=Path, default=Path.home(), help="on the disk in question")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    state = llama(0.2 if options.quick else options.gb)
    rounds = 3 if options.quick else ROUNDS
    with tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir=options.folder) as name:
        rows = [*from_files(Path(name), state, rounds), *from_memory(Path(name), state, rounds)]
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch", "safetensors"])


if __name__ == "__main__":
    main()
