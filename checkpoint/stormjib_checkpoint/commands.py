"""`stormjib ckpt`: look at the checkpoints of a job, prove them, audit its samples. Reads only."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from stormjib_checkpoint import history, layout, verify
from stormjib_checkpoint.errors import CheckpointError
from stormjib_checkpoint.ledger import audit as read_audit
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.storage import Local, Storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.format import ResumePoint

app = typer.Typer(no_args_is_help=True, help="Checkpoints of a job: list, show, verify, audit.")
_out = Console(soft_wrap=True)

Root = Annotated[
    Path, typer.Argument(help="The job's folder: <storage>/<namespace>/<job>.", exists=True, file_okay=False)
]
Step = Annotated[int | None, typer.Option(help="A committed step of the history; the newest if left out.")]


@app.command()
def ls(root: Root) -> None:
    """List every save, newest last: committed and in the history, or why it does not count."""
    storage = Local(root)
    with _told():
        points = {(p.step, p.generation) for p in history.committed(storage)}
        table = Table("step", "generation", "world", "GB", "state", box=None)
        for step, generation in history.saves(storage):
            figures = _figures(storage, step, generation)
            state = _state(figures, (step, str(generation)) in points)
            table.add_row(str(step), str(generation), *figures, state)
    _out.print(table)


@app.command()
def show(root: Root, step: Step = None) -> None:
    """Show what a committed step holds: every tensor with type, shape and the ranks that wrote it; every scalar."""
    storage = Local(root)
    with _told():
        point = _point(storage, step)
        content = CommittedStep(storage, point).atoms()
    _out.print(f"step {point.step} of generation {point.generation}, manifest {point.digest}")
    table = Table("name", "type", "shape", "ranks", box=None)
    for name, atom in content.atoms.items():
        ranks = ",".join(str(stored.rank) for stored in atom.boxes)
        table.add_row(name, atom.dtype, "x".join(map(str, atom.shape)) or "scalar", ranks)
    _out.print(table)
    for name, value in content.scalars.items():
        _out.print(f"{name} = {value!r}", markup=False, highlight=False)


@app.command(name="verify")
def verify_step(root: Root, step: Step = None) -> None:
    """Read every byte of a committed step and prove it. Exit code 1 and the file's name where it is damaged."""
    storage = Local(root)
    with _told():
        point = _point(storage, step)
        flaws = [(path, flaw) for path, flaw in verify.verify(storage, point) if flaw is not None]
    for path, flaw in flaws:
        _out.print(f"{path}: {flaw}", markup=False)
    if flaws:
        raise typer.Exit(1)
    _out.print(f"step {point.step} of generation {point.generation} is whole")


@app.command()
def audit(root: Root) -> None:
    """Count the samples along the history of the highest generation. Exit code 1 where steps are missing or damaged."""
    with _told():
        found = read_audit(Local(root))
    fed = sum(len(found.ids(step)) for step in found.steps)
    gaps, twice = found.gaps(), found.twice()
    _out.print(
        f"{len(found.steps)} steps up to {found.last}, {fed} samples, {len(twice)} of them more than once"
    )
    for problem in [*found.problems, *([f"no samples written down for steps {gaps[:20]}"] if gaps else [])]:
        _out.print(problem, markup=False)
    if gaps or found.problems:
        raise typer.Exit(1)


def _figures(storage: Storage, step: int, generation: layout.GenerationId) -> tuple[str, str]:
    """World size and gigabytes, by the manifest; nothing where there is none."""
    point = history.manifest_point(storage, step, generation)
    if point is None:
        return "", ""
    manifest = CommittedStep(storage, point).manifest
    return str(manifest.world), f"{sum(manifest.data.values()) / 1e9:.3f}"


def _state(figures: tuple[str, str], counts: bool) -> str:
    if counts:
        return "committed"
    return "committed, but in no living history" if figures[0] else "not committed"


def _point(storage: Storage, step: int | None) -> ResumePoint:
    points = history.committed(storage)
    found = next((point for point in points if step in (None, point.step)), None)
    if found is None:
        known = ", ".join(str(point.step) for point in points) or "none"
        raise typer.BadParameter(f"no such committed step in the history; there are: {known}")
    return found


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """An error of the library as one line and exit code 1, not as a traceback."""
    try:
        yield
    except CheckpointError as error:
        _out.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error
