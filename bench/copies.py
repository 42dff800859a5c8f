"""What a copy of a staged step in another node's memory costs, and finishing a lost node's step from it: both ends on this machine.

`python -m bench.copies [--quick] [--gb 1.0] [--json FILE]`. Needs three times as much memory as that on /dev/shm, and room for it on the disk
of the working folder. Both processes are as nice as can be, so their times are those of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from bench.table import Row, show, write_json
from stormjib_checkpoint.adopting import adopt_copies
from stormjib_checkpoint.format import PIECE_BYTES, DataFile, RankFile, TrainFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.node_memory import Slot, staged
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.records import encode
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE = GenerationId(1, 1)
ROUNDS = 5
GB = 1e9


class Peer:
    """`python -m stormjib_checkpoint.peers` of one node."""

    def __init__(self, folder: Path, slot: int) -> None:
        self.memory, self.copies, self.slot = folder / f"steps-{slot}", folder / f"copies-{slot}", slot
        words = [sys.executable, "-m", "stormjib_checkpoint.peers", str(self.memory), str(self.copies)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.write({"token": "t", "port": 0})
        self.port = json.loads(_pipe(self.process.stdout).readline())["port"]

    def write(self, line: dict[str, Any]) -> None:
        """One line of the agent."""
        pipe = _pipe(self.process.stdin)
        pipe.write(json.dumps(line).encode() + b"\n")
        pipe.flush()

    def begin(self, to: int, givers: list[int]) -> None:
        """Give to this port of this machine (0: nobody), and keep, from now on."""
        where = {"host": "127.0.0.1" if to else "", "port": to}
        self.write({"generation": str(ONE), "slot": self.slot, **where, "givers": givers, "processes": 1})

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Its input ends, and so does it."""
        self.process.communicate()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("no pipe")
    return pipe


def stage(memory: Path, step: int, size: int) -> None:
    """A step of random bytes, as a rank stages it, in the same slot as the one before."""
    slot = Slot(memory / "0" / "0")
    slot.folder.mkdir(parents=True, exist_ok=True)
    slot.clear()
    pieces = []
    with open(slot.data, "wb") as file:
        for start in range(0, size, PIECE_BYTES):
            piece = os.urandom(min(PIECE_BYTES, size - start))
            pieces.append(piece_digest(piece))
            file.write(piece)
    record = RankFile(
        step=step, generation=ONE, rank=0, world=1, attempt="a", data=DataFile(size, PIECE_BYTES, tuple(pieces)),
        atoms={}, ties={}, absent=(), scalars={}, samples={},
    )  # fmt: skip
    slot.tell(Records(encode(record), encode(TrainFile(step, ONE, {}))))


def copied(giver: Peer, keeper: Peer, step: int, limit_s: float = 300.0) -> tuple[float, float]:
    """Seconds until a step that was just staged is whole with its keeper, and the processor seconds of both processes."""
    cpu, began = giver.cpu_s() + keeper.cpu_s(), time.monotonic()
    while step not in [one.record.step for one in staged(keeper.copies / str(giver.slot))]:
        if time.monotonic() - began > limit_s:
            raise TimeoutError("no copy")
        time.sleep(0.002)
    return time.monotonic() - began, giver.cpu_s() + keeper.cpu_s() - cpu


def round_of(gigabytes: float) -> Iterator[tuple[str, float, float]]:
    """What is measured once, with seconds and processor seconds: all in new folders, with new processes."""
    with ExitStack() as stack:
        memory = stack.enter_context(tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir="/dev/shm"))
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir="."))
        peers = [Peer(Path(memory), slot) for slot in (0, 1)]
        for peer in peers:
            stack.callback(peer.close)
        peers[1].begin(0, [0])
        peers[0].begin(peers[1].port, [])
        for step, what in enumerate(("first copy", "copy"), 1):
            stage(peers[0].memory, step, int(gigabytes * GB))
            yield what, *copied(peers[0], peers[1], step)
        peers[0].close()
        yield "finish", *finished(peers[1].copies, Path(root) / "job")


def finished(copies: Path, root: Path) -> tuple[float, float]:
    """Seconds until a lost node's step is on the disk, and the processor seconds for it."""
    storage = Local(str(root))
    open_generation(storage, str(ONE), "job", ())
    cpu, began = _own_cpu_s(), time.monotonic()
    if adopt_copies(storage, copies).parts != ((2, 0),):
        raise RuntimeError("not adopted")
    return time.monotonic() - began, _own_cpu_s() - cpu


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of a gigabyte, once")
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gigabytes = 0.2 if options.quick else options.gb
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(1 if options.quick else ROUNDS):
        for what, seconds, cpu_s in round_of(gigabytes):
            found.setdefault(what, []).append((seconds / gigabytes, cpu_s / gigabytes))
    rows: list[Row] = []
    for what, values in found.items():
        case = f"{gigabytes:g} GB, {what}"
        rows.append(Row.of("time", case, "stormjib", [seconds for seconds, _ in values], "s/GB"))
        rows.append(Row.of("CPU", case, "stormjib", [cpu_s for _, cpu_s in values], "s/GB"))
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, [])


if __name__ == "__main__":
    main()
