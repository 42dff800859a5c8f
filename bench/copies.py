"""What a copy of a staged step in another node's memory costs, and finishing a lost node's step from it: both ends on this machine.

`python -m bench.copies [--gigabytes N]`. Needs three times as much memory as N on /dev/shm, and N on the disk of the working folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from stormjib_checkpoint.adopting import adopt_copies
from stormjib_checkpoint.format import PIECE_BYTES, DataFile, RankFile, TrainFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import Records
from stormjib_checkpoint.node_memory import Slot, staged
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.pieces import piece_digest
from stormjib_checkpoint.records import encode
from stormjib_checkpoint.storage import Local

ONE = GenerationId(1, 1)


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

    def begin(self, to: str, givers: list[int]) -> None:
        """Give and keep from now on."""
        self.write({"generation": str(ONE), "slot": self.slot, "to": to, "givers": givers, "processes": 1})

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
    """Print both, per gigabyte."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    gigabytes = parser.parse_args().gigabytes
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir="/dev/shm"))
        )
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir=".")))
        peers = [Peer(folder, slot) for slot in (0, 1)]
        for peer in peers:
            stack.callback(peer.close)
        peers[1].begin("", [0])
        peers[0].begin(f"127.0.0.1:{peers[1].port}", [])
        rows = []
        for step, what in enumerate(("first copy", "copy"), 1):
            stage(peers[0].memory, step, int(gigabytes * 1e9))
            rows.append((what, *copied(peers[0], peers[1], step)))
        peers[0].close()
        rows.append(("finish", *finished(peers[1].copies, root / "job")))
        for what, seconds, cpu_s in rows:
            print(f"{what:10} {seconds / gigabytes:6.2f} s/GB  {cpu_s / gigabytes:5.2f} CPU-s/GB")
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
