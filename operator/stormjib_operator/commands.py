"""`stormjib health`: what was found about a job, and what it rests on. Reads the job's status through kubectl."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from stormjib_operator.models import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_operator.models import FaultStatus

app = typer.Typer(no_args_is_help=True, help="Health of training jobs: watch verdicts, explain one.")
_out = Console(soft_wrap=True, highlight=False)

Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="As kubectl's; default the context's.")
]
CHUNK = 1 << 16


@app.command()
def watch(
    job: Annotated[
        str | None, typer.Argument(help="A TrainingJob; all of the namespace if left out.")
    ] = None,
    namespace: Namespace = None,
) -> None:
    """Print each fault of the jobs as it is found, and go on until interrupted."""
    said: set[tuple[str, str, str]] = set()
    for found in _stream([*_words(job, namespace), "--watch"]):
        for name, fault in reversed([(n, f) for n, status in _jobs(found) for f in status.faults]):
            key = (name, fault.time, fault.cause)
            if key not in said:
                said.add(key)
                _out.print(f"{fault.time} {name}: {line(fault)}", markup=False)


@app.command()
def explain(
    job: Annotated[str, typer.Argument(help="A TrainingJob.")],
    fault: Annotated[int, typer.Argument(help="Which fault: 0 is the newest.")] = 0,
    namespace: Namespace = None,
) -> None:
    """Say what a fault of a job was, who it was, and what that rests on."""
    ((_, status),) = _jobs(next(_stream(_words(job, namespace))))
    if not status.faults:
        _out.print(f"{job} has no faults", markup=False)
        return
    if not 0 <= fault < len(status.faults):
        raise typer.BadParameter(f"fault {fault} is not there; {job} has 0 to {len(status.faults) - 1}")
    _explain(status.faults[fault])


def line(fault: FaultStatus) -> str:
    """One fault in one line: `RankHang, rank 5, slot 2 on node-3: rank 5 issued ...`."""
    who = f", rank {fault.rank}" if fault.rank is not None else ""
    where = f", slot {fault.slot}" if fault.slot is not None else ""
    node = f" on {fault.node_name}" if fault.node_name else ""
    said = fault.message.partition("\n")[0]
    return f"{fault.cause}{who}{where}{node}{': ' + said if said else ''}"


def _explain(fault: FaultStatus) -> None:
    _out.print(line(fault), markup=False)
    verdict = fault.verdict
    if verdict is None:
        _out.print(fault.message, markup=False)
        return
    blame = "the program, no node" if verdict.software else f"{verdict.scope} {list(verdict.culprits) or ''}"
    sure = f"{verdict.confidence_percent} %{', confirmed' if verdict.confirmed else ''}"
    seconds = verdict.detection_milliseconds / 1000
    _out.print(
        f"{verdict.syndrome} in generation {verdict.generation}: {blame}; {sure}; found in {seconds:.2f} s",
        markup=False,
    )
    table = Table("what", "who", "value", "others", box=None)
    for row in verdict.evidence:
        table.add_row(row.name, row.who, row.value, row.others)
    _out.print(table)
    if verdict.stack:
        _out.print(verdict.stack, markup=False)


def _words(job: str | None, namespace: str | None) -> list[str]:
    return [*([job] if job else []), *(["--namespace", namespace] if namespace else [])]


def _jobs(found: dict[str, Any]) -> Iterator[tuple[str, Status]]:
    """Name and status of each job in an answer, which is one job or a list."""
    for each in found.get("items", [found]):
        try:
            yield each["metadata"]["name"], Status.model_validate(each.get("status", {}))
        except ValidationError as error:
            raise typer.BadParameter(f"the cluster's TrainingJob is of another version: {error}") from error


def _stream(words: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON documents that kubectl prints, one after the other."""
    command = ["kubectl", "get", "trainingjobs", "--output", "json", *words]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise typer.BadParameter("kubectl is not there; install it, and point it at your cluster") from None
    with process:
        yield from _documents(process)
    if process.returncode:
        raise typer.Exit(process.returncode)


def _documents(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    if process.stdout is None:
        return
    decoder, text = json.JSONDecoder(), ""
    while chunk := process.stdout.read1(CHUNK):  # type: ignore[attr-defined]
        text = (text + chunk.decode(errors="replace")).lstrip()
        while text:
            try:
                found, end = decoder.raw_decode(text)
            except ValueError:
                break  # not whole yet
            yield found
            text = text[end:].lstrip()
