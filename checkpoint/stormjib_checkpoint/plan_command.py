"""`stormjib ckpt plan`: what a load on another layout would cost, before anything is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stormjib_checkpoint.errors import SpecError
from stormjib_checkpoint.forecast import Forecast, forecasts, total
from stormjib_checkpoint.spec.parsing import parse, parse_text
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.telling import OUT, AsJson, Root, Step, on_step, print_json, storage_at, told

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.index import Index
    from stormjib_checkpoint.spec.spec import Spec
    from stormjib_checkpoint.storage import Storage

FSDP = {"axes": ["rep", "dp"], "then": {"fsdp": {"over": ["dp"], "of": "all"}}}
"""Where no spec is given: every tensor cut along its first dimension over `dp`, the same on each of `rep`."""
_AXIS = re.compile(r"([a-z]+)([1-9][0-9]{0,5})")

To = Annotated[
    str, typer.Option("--to", help="Axes and their sizes, the fastest last: dp7, rep2.dp4, pp2.dp3.tp2.")
]
SpecFile = Annotated[
    Path | None,
    typer.Option(
        "--spec", help="A pattern spec, for axes other than dp and rep.", exists=True, dir_okay=False
    ),
]
Size = Annotated[list[str], typer.Option("--size", help="A size that the spec leaves open: head=128.")]
Near = Annotated[
    list[int],
    typer.Option(
        "--near", help="A rank whose file lies in the memory of the node of the new rank of that number."
    ),
]
StorageRate = Annotated[
    float, typer.Option("--gbps", min=0.001, help="What a rank reads from the storage, in GB/s.")
]
MemoryRate = Annotated[
    float, typer.Option("--memory-gbps", min=0.001, help="What a rank reads from memory, in GB/s.")
]


def add_to(app: typer.Typer) -> None:
    """Hang it into the commands."""
    app.command(name="plan")(plan_load)


def plan_load(
    root: Root,
    to: To,
    spec: SpecFile = None,
    size: Size = [],  # noqa: B006 - typer makes a new one
    near: Near = [],  # noqa: B006
    step: Step = None,
    gbps: StorageRate = 1.0,
    memory_gbps: MemoryRate = 5.0,
    json: AsJson = False,
) -> None:
    """Say what a load of a step on another layout would read, and how long that would take. Reads nothing but the index."""
    with told():
        storage = storage_at(root)
        mesh = _mesh(to)
        pattern = _pattern(spec, size)
        _, (index, found) = on_step(
            storage,
            step,
            lambda point: _forecasts(storage, CommittedStep(storage, point), pattern, mesh, near),
        )
    unique = sum(atom.nbytes for atom in index.atoms.values())
    slowest = max(found, key=lambda one: one.storage)
    times = {
        "storage": slowest.storage / gbps / 1e9,
        "memory": max(one.memory for one in found) / memory_gbps / 1e9,
    }
    if json:
        print_json({"bytes": unique, "ranks": [one._asdict() for one in found], "seconds": times})
        return
    OUT.print(_table(found))
    whole = total(found)
    OUT.print(
        f"{_gb(unique)} GB in the checkpoint, {_gb(whole.needed)} wanted, {_gb(whole.storage + whole.memory)} read: "
        f"{(whole.storage + whole.memory) / unique:.3f} of each byte, in {whole.requests} requests"
    )
    for source, seconds in times.items():
        OUT.print(
            f"{source}: {seconds:.3g} s at {gbps if source == 'storage' else memory_gbps:g} GB/s a rank"
        )


def _forecasts(
    storage: Storage, step: CommittedStep, pattern: Spec, mesh: Mapping[str, int], near: Sequence[int]
) -> tuple[Index, list[Forecast]]:
    index = step.atoms()
    layout = pattern.on(mesh, {name: atom.shape for name, atom in index.atoms.items()})
    having = {rank: [rank] for rank in near}
    return index, forecasts(layout, index.atoms, storage.request_bytes, having)


def _mesh(text: str) -> dict[str, int]:
    """`pp2.dp3` as axes and sizes. Raises SpecError."""
    found: dict[str, int] = {}
    for part in text.split("."):
        match = _AXIS.fullmatch(part)
        if match is None or match[1] in found:
            raise SpecError(
                f"--to {text[:80]}: {part[:40]!r} is no axis with a size, or comes twice; such as pp2.dp3.tp2"
            )
        found[match[1]] = int(match[2])
    return found


def _pattern(file: Path | None, sizes: Sequence[str]) -> Spec:
    if file is None:
        return parse(FSDP)
    given = {}
    for text in sizes:
        name, _, number = text.partition("=")
        if not number.isdecimal():
            raise SpecError(f"--size {text[:80]} is not of the form NAME=NUMBER")
        given[name] = int(number)
    return parse_text(file.read_bytes(), str(file), given)


def _table(found: Sequence[Forecast]) -> Table:
    table = Table(
        "rank",
        "GB wanted",
        "GB from the storage",
        "GB from memory",
        "GB from other ranks",
        "requests",
        box=None,
    )
    shown = [*enumerate(found)] if len(found) <= 16 else [*enumerate(found[:8]), *list(enumerate(found))[-8:]]
    for rank, one in shown:
        numbers = (one.needed, one.storage, one.memory, one.received)
        table.add_row(str(rank), *map(_gb, numbers), str(one.requests))
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
