"""`stormjib local`: a real Kubernetes cluster on this machine."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from stormjib_local import machine
from stormjib_local import tools as finder
from stormjib_local.cluster import Cluster
from stormjib_local.errors import BadRequest, LocalError

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    no_args_is_help=True, help="A real Kubernetes cluster on this machine: nodes are network namespaces."
)
node_app = typer.Typer(no_args_is_help=True, help="Take a node away, and give it back.")
app.add_typer(node_app, name="node")

Name = Annotated[str, typer.Option(help="Which cluster; several may be up side by side.")]
NodeName = Annotated[str, typer.Argument(help="For example node-2.")]
_out, _err = Console(), Console(stderr=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except LocalError as error:
        _err.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _say(line: str) -> None:
    _err.print(f"[bold]local:[/bold] {line}", highlight=False, soft_wrap=True)


@app.command()
def up(
    name: Name = "dev",
    nodes: Annotated[int | None, typer.Option(help="How many nodes (3 for a new cluster).")] = None,
    mount: Annotated[
        list[Path] | None,
        typer.Option(help="A file or folder that containers see read-only at its own path."),
    ] = None,
) -> None:
    """Bring the cluster up, or complete what is missing of it."""
    with _plain_errors():
        begin = time.monotonic()
        cluster = Cluster(name, say=_say)
        cluster.up(nodes, mount)
        _say(f"[green]cluster {name} is up[/green] after {time.monotonic() - begin:.1f} s")
        _say(f"export KUBECONFIG={cluster.kubeconfig} PATH={cluster.kubectl.parent}:$PATH")


@app.command()
def down(name: Name = "dev") -> None:
    """Take the cluster down; nothing of it stays, its volumes neither."""
    with _plain_errors():
        begin = time.monotonic()
        Cluster(name).down()
        _say(f"cluster {name} is down after {time.monotonic() - begin:.1f} s")


@app.command()
def status(name: Name = "dev") -> None:
    """What runs and what does not. Exit code 1 if something does not."""
    with _plain_errors():
        machine.need_root()
        cluster = Cluster(name)
        table = Table("host", "power", "cable", "API says", "not running")
        missing, nodes = cluster.control_missing(), cluster.status()
        table.add_row("control", "", "", "", ", ".join(missing))
        for node in nodes:
            ready = {True: "Ready", False: "NotReady", None: "unknown"}[node.ready]
            words = ("on" if node.power else "off", "in" if node.cable else "out")
            table.add_row(node.name, *words, ready, ", ".join(node.missing))
        _out.print(table)
        if missing or not all(node.ready and not node.missing for node in nodes):
            raise typer.Exit(1)


@app.command()
def kubeconfig(name: Name = "dev") -> None:
    """Print the path of the administrator's kubeconfig."""
    with _plain_errors():
        cluster = Cluster(name)
        if not cluster.kubeconfig.exists():
            raise BadRequest(f"no cluster {name} is up: `stormjib local up --name {name}`")
        print(cluster.kubeconfig)


@app.command()
def logs(
    component: Annotated[
        str, typer.Argument(help="HOST.COMPONENT, for example control.etcd or node-1.kubelet.")
    ],
    name: Name = "dev",
) -> None:
    """Print a component's log."""
    with _plain_errors():
        folder = Cluster(name).layout.state / "logs"
        known = sorted(path.stem for path in folder.glob("*.log"))
        if component not in known:
            raise BadRequest(f"no log of {component!r}; there are: {', '.join(known) or 'none'}")
        sys.stdout.write((folder / f"{component}.log").read_text(errors="replace"))


@app.command()
def tools() -> None:
    """Fetch or build every binary of the cluster now, so that `up` need not."""
    if code := finder.main():
        raise typer.Exit(code)


@node_app.command()
def cut(node: NodeName, name: Name = "dev") -> None:
    """Pull a node's network cable. What runs on it runs on."""
    with _plain_errors():
        Cluster(name).cut(node)


@node_app.command()
def heal(node: NodeName, name: Name = "dev") -> None:
    """Plug the cable in again."""
    with _plain_errors():
        Cluster(name).heal(node)


@node_app.command()
def stop(node: NodeName, name: Name = "dev") -> None:
    """Take a node's power: every process on it is gone at once."""
    with _plain_errors():
        Cluster(name).stop(node)


@node_app.command()
def start(node: NodeName, name: Name = "dev") -> None:
    """Give a node its power back."""
    with _plain_errors():
        Cluster(name, say=_say).start(node)
