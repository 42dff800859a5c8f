"""`stormjib ckpt export | import | diff | cat | layouts`. Torch is imported where a command needs it: to list steps it is not."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stormjib_checkpoint.layouts import Limits, Machine, table
from stormjib_checkpoint.sizing import Model
from stormjib_checkpoint.telling import OUT, AsJson, Root, Step, on_step, print_json, storage_at, told, warn

if TYPE_CHECKING:
    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.interop.foreign import Foreign
    from stormjib_checkpoint.layouts import Choice
    from stormjib_checkpoint.reader import Checkpoint


class Format(StrEnum):
    """Of somebody else's checkpoints."""

    HF = "hf"
    DCP = "dcp"
    DEEPSPEED = "deepspeed-ucp"


Folder = Annotated[Path, typer.Argument(help="A folder of this machine.")]


def add_to(app: typer.Typer) -> None:
    """Hang the commands into `stormjib ckpt`."""
    app.command(name="export")(export_step)
    app.command(name="import")(import_step)
    app.command()(diff)
    app.command()(cat)
    app.command()(layouts)


def export_step(
    root: Root,
    folder: Folder,
    to: Annotated[Format, typer.Option(help="hf: weights only; the others with the optimizer.")],
    step: Step = None,
) -> None:
    """Write a committed step for Hugging Face, torch.distributed.checkpoint or DeepSpeed into a new folder."""
    from stormjib_checkpoint.interop import dcp, deepspeed, hf

    with told():
        point, checkpoint = _opened(root, step)
        if to is Format.DEEPSPEED:
            deepspeed.export(checkpoint, folder, point.step)
        else:
            (hf if to is Format.HF else dcp).export(checkpoint, folder)
    OUT.print(f"step {point.step} of generation {point.generation} is in {folder}", markup=False)


def import_step(
    folder: Folder,
    root: Annotated[str, typer.Argument(help="A new job's folder, or the URL of a store.")],
    source: Annotated[Format, typer.Option("--from", help="What lies in the folder.")],
    step: Annotated[int, typer.Option(min=0, help="The number that the step gets.")] = 0,
    world: Annotated[int, typer.Option(min=1, help="Into how many files it is cut.")] = 1,
) -> None:
    """Bring what others saved in as a committed step of a new job. Repeat it where it was cut short."""
    from stormjib_checkpoint.interop.inflow import bring_in
    from stormjib_checkpoint.stores.urls import open_storage

    with told():
        foreign = _read(source, folder)
        point = bring_in(open_storage(root), foreign, step, world)
    for note in foreign.notes:
        warn(note)
    OUT.print(f"{len(foreign.sources)} tensors are step {point.step} of generation {point.generation}")


def _opened(root: str, step: int | None) -> tuple[ResumePoint, Checkpoint]:
    from stormjib_checkpoint.reader import Checkpoint

    storage = storage_at(root)
    return on_step(storage, step, lambda point: Checkpoint(storage, point))


def _read(source: Format, folder: Path) -> Foreign:
    from stormjib_checkpoint.interop import dcp, deepspeed, hf

    match source:
        case Format.HF:
            return hf.read(folder)
        case Format.DCP:
            return dcp.read(folder)
        case Format.DEEPSPEED:
            return deepspeed.read(folder)


def diff(
    root: Root,
    other: Annotated[str, typer.Argument(help="Another job's folder, or the same.")],
    step: Step = None,
    other_step: Annotated[int | None, typer.Option(help="Of the other; the newest if left out.")] = None,
    json: AsJson = False,
) -> None:
    """Compare two committed steps tensor by tensor, on however many ranks they were saved. Exit code 1 where they differ."""
    from stormjib_checkpoint.interop.compare import differences

    with told():
        pair = [_opened(root, step)[1], _opened(other, other_step)[1]]
        found = dict(differences(*pair))
    if json:
        print_json(found)
    for name, why in found.items() if not json else ():
        OUT.print(f"{name}: {why}", markup=False)
    if found:
        raise typer.Exit(1)
    if not json:
        OUT.print(f"{len(pair[0].atoms)} tensors and {len(pair[0].scalars)} values are the same")


def cat(
    root: Root,
    name: Annotated[str, typer.Argument(help="A tensor, as `show` names it.")],
    step: Step = None,
    npy: Annotated[Path | None, typer.Option(help="Write it to this new file.")] = None,
    json: AsJson = False,
) -> None:
    """Show the first elements of a tensor, and what they all are like; or write it as a numpy file."""
    from stormjib_checkpoint.interop.compare import facts, to_npy

    with told():
        _, checkpoint = _opened(root, step)
        if npy is not None:
            to_npy(checkpoint, name, npy)
        found = facts(checkpoint, name)
    if json:
        print_json({key: repr(v) if isinstance(v, complex) else v for key, v in found._asdict().items()})
        return
    for key, value in found._asdict().items():
        OUT.print(f"{key:8} {value}", markup=False, highlight=False)


def layouts(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that train when all are well.")],
    parameters: Annotated[float, typer.Option(min=1, help="Of the model: 8e9.")],
    layers: Annotated[int, typer.Option(min=1)],
    heads: Annotated[int, typer.Option(min=1)],
    ranks: Annotated[int, typer.Option(min=1, help="Of each node.")] = 8,
    memory_gb: Annotated[float, typer.Option(min=0, help="Of a rank.")] = 80,
    micro_batches: Annotated[int, typer.Option(min=1, help="Logical ones in a step.")] = 64,
    allow: Annotated[list[int] | None, typer.Option(help="A number of nodes; all if left out.")] = None,
    pp: Annotated[list[int] | None, typer.Option(help="A pipeline degree.")] = None,
    tp: Annotated[list[int] | None, typer.Option(help="A tensor degree.")] = None,
    replicate: Annotated[int, typer.Option(min=1, help="Copies of each shard, where they divide.")] = 1,
    losses: Annotated[int, typer.Option(min=0, help="How many nodes may be lost.")] = 2,
    json: AsJson = False,
) -> None:
    """Show in which layout a job would go on after each loss of a node, and why not in another."""
    limits = Limits(tuple(allow or range(1, nodes + 1)), tuple(pp or (1,)), tuple(tp or (1,)), replicate)
    model = Model(int(parameters), layers, heads, micro_batches=micro_batches)
    rows = table(model, Machine(int(memory_gb * 1e9)), limits, [ranks] * nodes, losses)
    if json:
        print_json([_plain(row) for row in rows])
        return
    shown = Table("nodes", "action", "layout", "trains on", "GB a rank", "s to get there", box=None)
    for lost, row in enumerate(rows):
        best = row.best
        told_of = ("none fits", "", "", "") if best is None else (
            str(best.layout), str(best.nodes), f"{best.memory_bytes / 1e9:.1f}", f"{best.transition.seconds:.1f}"
        )  # fmt: skip
        shown.add_row(str(nodes - lost), row.action.value, *told_of)
    OUT.print(shown)
    for lost, row in enumerate(rows):
        OUT.print(f"not taken with {nodes - lost} nodes:")
        for one in row.rejected:
            OUT.print(f"  {one.nodes} nodes, {one.layout}: {one.reason}", markup=False, highlight=False)


def _plain(row: Choice) -> dict[str, object]:
    best = row.best and {
        **row.best._asdict(),
        "layout": str(row.best.layout),
        "transition": row.best.transition._asdict(),
    }
    rejected = [{**one._asdict(), "layout": str(one.layout)} for one in row.rejected]
    return {"action": row.action.value, "best": best, "rejected": rejected}
