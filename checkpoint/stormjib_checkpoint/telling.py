"""What the commands of `stormjib ckpt` have in common: where to look, and how to tell."""

from __future__ import annotations

import contextlib
import os
from json import dumps
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import track

from stormjib_checkpoint import history
from stormjib_checkpoint.errors import CheckpointError, MissingCheckpoint
from stormjib_checkpoint.storage import Local
from stormjib_checkpoint.stores.urls import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.storage import Storage

OUT = Console(soft_wrap=True)
T = TypeVar("T")

Root = Annotated[
    str,
    typer.Argument(
        help="The job's folder, <storage>/<namespace>/<job>, or the URL of a store: s3://bucket/job."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Step = Annotated[int | None, typer.Option(help="A committed step of the history; the newest if left out.")]


def storage_at(root: str, *, write: bool = False) -> Storage:
    """The storage of a job that is there."""
    storage = open_storage(root, write=write)
    if isinstance(storage, Local) and not os.path.isdir(storage.root):
        raise typer.BadParameter(f"{root} is no folder")
    return storage


def bar(items: Iterable[T], word: str, total: int | None = None) -> Iterable[T]:
    """The same items, with a progress bar where somebody looks."""
    shown = Console(stderr=True)
    return track(items, word, total, console=shown, transient=True, disable=not shown.is_terminal)


def warn(note: str) -> None:
    """Beside what was asked for."""
    Console(stderr=True, soft_wrap=True).print(note, markup=False)


def print_json(value: object) -> None:
    """For programs."""
    print(dumps(value, indent=1))


def point_of(storage: Storage, step: int | None) -> ResumePoint:
    """A committed step; the newest where none is named."""
    points = history.committed(storage)
    found = next((point for point in points if step in (None, point.step)), None)
    if found is None:
        known = ", ".join(str(point.step) for point in points) or "none"
        raise typer.BadParameter(f"no such committed step in the history; there are: {known}")
    return found


def on_step(storage: Storage, step: int | None, use: Callable[[ResumePoint], T]) -> tuple[ResumePoint, T]:
    """A committed step, and what `use` makes of it. Where none is named and the job deletes it meanwhile: of the newest there is then."""
    point = point_of(storage, step)
    try:
        return point, use(point)
    except MissingCheckpoint:
        if step is not None:
            raise
    return history.at_newest(storage, lambda point: (point, use(point)))


@contextlib.contextmanager
def told() -> Iterator[None]:
    """An error of the library as one line and exit code 1, not as a traceback."""
    try:
        yield
    except CheckpointError as error:
        OUT.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(1) from error
