"""What it costs to load on another layout than was saved, beside other ways on the same machine in the same minutes.

`python -m bench.reshard [--quick] [--gb 1.1] [--rounds 5] [--cases NAME,…] [--folder DIR] [--json FILE]`. It wants a machine that does
nothing else, and a folder on the disk in question.

Every loader fills the same DTensors in as many processes of one Gloo group, with nothing of the files in the page cache; its time ends when all
ranks have ended. What was loaded is compared with what was saved, in the first round. *Plain* is the faster of two: our own load of what the
target layout itself has saved, and a loop of pread over as many bytes. `rchar` of each process counts what is read, whoever reads it.
The procedure of Universal Checkpointing is done again here, without DeepSpeed: files of ranks to fragments, to a file for each atom, to ranks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import tempfile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from bench.reshard_ranks import Cut, Figures, Job, load, save
from bench.table import Row, show, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.reshard_ranks import Shapes

GB = 1e9
OURS, BLIND, BARE, DCP, UCP = "stormjib", "stormjib without digests", "bare pread", "dcp", "ucp procedure"


class Case(NamedTuple):
    """A layout that saves, and one that loads."""

    name: str
    source: Cut
    target: Cut


CASES = [
    Case("FSDP8 to FSDP7", Cut((8,), (0,)), Cut((7,), (0,))),
    Case("FSDP4 to FSDP6", Cut((4,), (0,)), Cut((6,), (0,))),
    Case("FSDP8 to TP8, columns", Cut((8,), (0,)), Cut((8,), (1,))),
    Case("TP4 x FSDP2 to FSDP6", Cut((2, 4), (0, 1)), Cut((6,), (0,))),
    Case("DP1 to DP4, replicas", Cut((1,), (None,)), Cut((4,), (None,))),
    Case("FSDP4 to HSDP 4x2", Cut((4,), (0,)), Cut((4, 2), (None, 0))),
]


def llama(gigabytes: float, wide: int = 1024) -> Shapes:
    """Names and shapes of weights and moments of a Llama of so many gigabytes in fp32."""
    inner = wide * 8 // 3
    layer = (
        {f"w{n}": (wide, wide) for n in "qkvo"}
        | {f"ffn{n}": (inner, wide) for n in "12"}
        | {"ffn3": (wide, inner)}
    )
    layer_bytes = 12 * (sum(prod(shape) for shape in layer.values()) + wide)
    words = 8000
    layers = max(1, round((gigabytes * GB - 24 * words * wide) / layer_bytes))
    named: dict[str, tuple[int, ...]] = {"tok": (words, wide), "output": (words, wide), "norm": (wide,)}
    for number in range(layers):
        named |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
        named[f"layers.{number}.norm"] = (wide,)
    return {
        f"{part}.{name}": shape
        for name, shape in named.items()
        for part in ("model", "exp_avg", "exp_avg_sq")
    }


def ranks(world: int, folder: Path, body: Callable[..., None], *arguments: object) -> None:
    """Run `body(rank, …)` in as many processes of a Gloo group, forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.reshard_ranks"])
    meeting = str(folder / f"meeting-{secrets.token_hex(4)}")
    processes = [
        context.Process(target=_rank, args=(rank, world, meeting, body, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"a rank of {body.__name__} has failed")


def _rank(
    rank: int, world: int, meeting: str, body: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    body(rank, *arguments)
    dist.destroy_process_group()


class Bench:
    """One case."""

    def __init__(self, case: Case, shapes: Shapes, folder: Path) -> None:
        self._case, self._shapes, self._folder = case, shapes, folder
        self._needed = 4 * sum(map(prod, shapes.values()))
        """Bytes that the ranks want together: those that many of them want count once."""
        for how in ("stormjib", "dcp", "ucp"):
            ranks(case.source.world, folder, save, case.source, shapes, str(folder / how), how)
        ranks(case.target.world, folder, save, case.target, shapes, str(folder / "same"), "stormjib")

    def rows(self, rounds: int) -> Iterator[Row]:
        """The figures of all loaders, in turns."""
        subjects = [OURS, BLIND, DCP, UCP, "same shape", BARE]
        turns = [(number, subject) for number in range(rounds) for subject in _rotated(subjects, number)]
        jobs = [self._job(subject, compare=number == 0 and subject != BARE) for number, subject in turns]
        target, out = self._case.target, str(self._folder / "figures")
        ranks(target.world, self._folder, load, target, self._shapes, jobs, out)
        every = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(target.world)]
        found: dict[str, list[Figures]] = {subject: [] for subject in subjects}
        for (_, subject), *of_ranks in zip(turns, *every, strict=True):
            seconds, read, beside = zip(*of_ranks, strict=True)
            found[subject].append(Figures(max(seconds), sum(read), max(beside)))
        yield from self._rows(found)

    def _job(self, subject: str, *, compare: bool) -> Job:
        root, source = self._root(subject)
        return Job(OURS if subject == "same shape" else subject, str(root), source, compare)

    def _rows(self, found: Mapping[str, Sequence[Figures]]) -> Iterator[Row]:
        name = self._case.name
        plain = [min(a.seconds, b.seconds) for a, b in zip(found["same shape"], found[BARE], strict=True)]
        for subject, figures in found.items():
            seconds = [one.seconds for one in figures]
            yield Row.of("load", name, subject, seconds, "s")
            yield Row.of(
                "load / plain", name, subject, [s / p for s, p in zip(seconds, plain, strict=True)], ""
            )
            yield Row.of("read / needed", name, subject, [one.read / self._needed for one in figures], "")
            yield Row.of(
                "memory beside the state", name, subject, [one.beside / 1e6 for one in figures], "MB"
            )
        shares = [1 - b.seconds / a.seconds for a, b in zip(found[OURS], found[BLIND], strict=True)]
        yield Row.of("share of the digest", name, OURS, [100 * share for share in shares], "%")

    def _root(self, subject: str) -> tuple[Path, Cut]:
        if subject == "same shape":
            return self._folder / "same", self._case.target
        name = {DCP: "dcp", UCP: "ucp"}.get(subject, "stormjib")
        return self._folder / name, self._case.source


def _rotated(subjects: list[str], by: int) -> list[str]:
    at = by % len(subjects)
    return subjects[at:] + subjects[:at]


def measure(cases: Sequence[Case], shapes: Shapes, folder: Path, rounds: int) -> Iterator[Row]:
    """All rows."""
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir=folder) as name:
            yield from Bench(case, shapes, Path(name)).rows(rounds)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of a gigabyte, one case, two rounds")
    parser.add_argument("--gb", type=float, default=1.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="", help="names, or parts of them, with commas between")
    parser.add_argument("--folder", type=Path, default=Path.home(), help="on the disk in question")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = options.cases.split(",") if options.cases else [""]
    cases = [case for case in CASES if any(part in case.name for part in wanted)]
    gigabytes, rounds = options.gb, options.rounds
    if options.quick:
        cases, gigabytes, rounds = cases[:1], 0.1, 2
    rows = list(measure(cases, llama(gigabytes), options.folder, rounds))
    Console(width=160).print(show(rows))
    if options.json:
        write_json(options.json, rows, ["torch"])


if __name__ == "__main__":
    main()
