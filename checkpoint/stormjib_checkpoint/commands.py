"""`stormjib ckpt`: look at the checkpoints of a job, prove them, audit its samples, finish what it left, delete what is old."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from stormjib_checkpoint import commit, history, layout, plan_command, retention, verify
from stormjib_checkpoint.digest.definition import Row, whole
from stormjib_checkpoint.interop import commands as interop
from stormjib_checkpoint.ledger import audit as read_audit
from stormjib_checkpoint.step import CommittedStep
from stormjib_checkpoint.telling import OUT as _out
from stormjib_checkpoint.telling import AsJson, Root, Step
from stormjib_checkpoint.telling import bar as _bar
from stormjib_checkpoint.telling import on_step as _on
from stormjib_checkpoint.telling import print_json as _json
from stormjib_checkpoint.telling import storage_at as _storage
from stormjib_checkpoint.telling import told as _told
from stormjib_checkpoint.telling import warn as _warn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.index import Index
    from stormjib_checkpoint.ledger import Difference
    from stormjib_checkpoint.storage import Storage

app = typer.Typer(
    no_args_is_help=True,
    help="Checkpoints of a job: look, prove, audit, finish, delete, compare, bring out and in.",
)
TOLD = 20
"""Steps or samples that are told of in a text."""
Keep = Annotated[int, typer.Option(min=2, help="Committed steps to keep.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")]


@app.command()
def ls(root: Root, json: AsJson = False) -> None:
    """List every save, newest last: committed and in the history, or why it does not count."""
    with _told():
        storage = _storage(root)
        points = {(p.step, p.generation) for p in history.committed(storage)}
        rows = [_row(storage, step, generation, points) for step, generation in history.saves(storage)]
    if json:
        _json(rows)
        return
    table = Table("step", "generation", "world", "GB", "state", box=None)
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.3f}"
        table.add_row(str(row["step"]), row["generation"], str(row["world"] or ""), size, row["state"])
    _out.print(table)


@app.command()
def show(root: Root, step: Step = None, json: AsJson = False) -> None:
    """Show what a committed step holds: every tensor with type, shape and the ranks that wrote it; every scalar."""
    with _told():
        storage = _storage(root)
        point, content = _on(storage, step, lambda point: CommittedStep(storage, point).atoms())
    tensors: dict[str, dict[str, Any]] = {
        name: {
            "dtype": atom.dtype,
            "shape": list(atom.shape),
            "ranks": atom.ranks,
        }
        for name, atom in content.atoms.items()
    }
    state = _state_digest(content)
    if json:
        rest = {"ties": content.ties, "absent": content.absent, "scalars": content.scalars}
        _json({**point._asdict(), "tensors_digest": state, "tensors": tensors, **rest})
        return
    _out.print(f"step {point.step} of generation {point.generation}, manifest {point.digest}")
    _out.print(f"digest of all tensors: {state or 'none, as it was written before 1.1'}")
    table = Table("name", "type", "shape", "ranks", box=None)
    for name, tensor in tensors.items():
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(name, tensor["dtype"], shape, _short(tensor["ranks"]))
    for name, first in content.ties.items():
        table.add_row(name, "is", first, "")
    for name in content.absent:
        table.add_row(name, "absent", "", "")
    _out.print(table)
    for name, value in content.scalars.items():
        _out.print(f"{name} = {value!r}", markup=False, highlight=False)


def _state_digest(content: Index) -> str | None:
    """Equal for equal tensors, on however many ranks they were saved; None where one has no digest."""
    rows = [
        Row(name, atom.dtype, atom.shape, atom.digest) for name, atom in content.atoms.items() if atom.digest
    ]
    return whole(rows) if len(rows) == len(content.atoms) else None


def _short(ranks: Iterable[int]) -> str:
    """Ranks in growing order, as `0-511,600`."""
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        if runs and rank <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], rank)
        else:
            runs.append((rank, rank))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


@app.command(name="verify")
def verify_step(root: Root, step: Step = None, json: AsJson = False) -> None:
    """Read every byte of a committed step and prove it. Exit code 1 and the file's name where it is damaged."""
    with _told():
        storage = _storage(root)
        point, flaws = _on(storage, step, lambda point: _flaws(storage, point))
    if json:
        _json({**point._asdict(), "damage": flaws})
    for path, flaw in flaws.items() if not json else ():
        _out.print(f"{path}: {flaw}", markup=False)
    if flaws:
        raise typer.Exit(1)
    if not json:
        _out.print(f"step {point.step} of generation {point.generation} is whole")


@app.command()
def finish(root: Root, json: AsJson = False) -> None:
    """Commit what the highest generation left complete and uncommitted, and say why the rest cannot be. For a job that is gone:
    its next generation does the same by itself."""
    with _told():
        storage = _storage(root, write=True)
        newest = history.highest(storage)
        if newest is None:
            raise typer.BadParameter(f"nothing was ever saved in {root}")
        before = {point.step for point in history.committed(storage)}
        given_up = commit.finish(storage, newest.generation, lambda steps: _bar(steps, "committing"))
        after = sorted({point.step for point in history.committed(storage)} - before)
    if json:
        _json({"committed": after, "given_up": given_up})
        return
    for why in given_up:
        _out.print(f"given up: {why}", markup=False)
    _out.print(f"committed: {', '.join(map(str, after)) or 'nothing new'}")


@app.command()
def gc(root: Root, keep: Keep = 2, dry_run: DryRun = False, json: AsJson = False) -> None:
    """Read the newest two steps whole, then delete old saves as the job itself does: never those two, what it resumed from, or the ledger."""
    with _told():
        storage = _storage(root, write=not dry_run)
        newest = history.highest(storage)
        if newest is None:
            raise typer.BadParameter(f"nothing was ever saved in {root}")
        generation = str(newest.generation)
        if dry_run:
            deleted = retention.doomed(storage, generation, keep)
        else:
            deleted = retention.retain(storage, generation, keep, _bar, _warn)
    if json:
        _json({"dry_run": dry_run, "deleted": deleted})
        return
    for folder in deleted:
        _out.print(folder)
    _out.print(f"{len(deleted)} saves {'would be ' if dry_run else ''}deleted")


@app.command()
def audit(root: Root, json: AsJson = False) -> None:
    """Prove the samples along the history of the highest generation: none lost, none twice, over all numbers of ranks. Exit code 1
    where steps are missing, damaged, or not as the cursor of the newest committed step says."""
    with _told():
        found = read_audit(_storage(root))
    gaps, unplanned = found.gaps(), found.unplanned()
    counts = {
        "steps": len(found.steps),
        "last": found.last,
        "samples": sum(len(found.ids(step)) for step in found.steps),
        "twice": len(found.twice()),
        "reshapes": found.reshapes(),
        "planned": found.order is not None,
    }
    if json:
        wrong = [asdict(difference) for difference in unplanned]
        _json({**counts, "gaps": gaps, "unplanned": wrong, "problems": list(found.problems)})
    else:
        _print_audit(counts, [*found.problems, *_told_gaps(gaps), *map(_told_difference, unplanned[:TOLD])])
    if gaps or unplanned or found.problems:
        raise typer.Exit(1)


def _row(
    storage: Storage, step: int, generation: layout.GenerationId, points: Collection[tuple[int, str]]
) -> dict[str, Any]:
    """One save: its world size and bytes by the manifest, None where there is none."""
    row: dict[str, Any] = {"step": step, "generation": str(generation), "world": None, "bytes": None}
    point = history.manifest_point(storage, step, generation)
    if point is None:
        return row | {"state": "not committed"}
    manifest = CommittedStep(storage, point).manifest
    counts = (step, str(generation)) in points
    state = "committed" if counts else "committed, but in no living history"
    return row | {"world": manifest.world, "bytes": sum(manifest.data.values()), "state": state}


def _print_audit(counts: Mapping[str, object], problems: Sequence[str]) -> None:
    _out.print(
        f"{counts['steps']} steps up to {counts['last']}, {counts['samples']} samples, {counts['twice']} of them more than once, "
        f"{counts['reshapes']} changes of the number of ranks"
    )
    for problem in problems:
        _out.print(problem, markup=False)
    if not counts["planned"]:
        _out.print("no cursor says what should have been fed: counted, not proved")
    elif not problems:
        _out.print("every step was fed what its cursor says: none lost, none twice")


def _told_gaps(gaps: Sequence[int]) -> list[str]:
    return [f"no samples written down for steps {gaps[:TOLD]}"] if gaps else []


def _told_difference(difference: Difference) -> str:
    missing, extra = difference.missing, difference.extra
    return (
        f"step {difference.step}: {len(missing)} samples missing {list(missing[:TOLD])}, "
        f"{len(extra)} too many {list(extra[:TOLD])}"
    )


def _flaws(storage: Storage, point: ResumePoint) -> dict[str, str]:
    world = CommittedStep(storage, point).manifest.world
    files = _bar(verify.verify(storage, point), "reading", world)
    return {path: flaw for path, flaw in files if flaw is not None}


interop.add_to(app)
plan_command.add_to(app)
