"""How long from a verdict until its node takes no more work, on the local cluster. Medians of five runs and their spread.

`python -m bench.isolation [--quick] [--json FILE]`. What the job's coordinator says is the bench's own; operator, isolator, preflight Jobs
and marks are real. `excluded`: the job will not use the node; `tainted`: nobody will.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # tenants that lie are the tests' own

from cluster.isolation import NO_PEER, Scene, Tenant, hold_operator, opened
from cluster.kube import Kubectl, eventually
from cluster.operator import install

from bench import stage
from bench.demo import say
from bench.table import Row, show, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.stage import Stage

NAMESPACE = "bench"
SUBJECT = "stormjib"
FOREVER_S = 600
"""Nothing shall happen to a marked node while it is measured."""
_NUMBERS = itertools.count(1)
"""Jobs have names of their own: pods of one that was deleted stay for a moment."""


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one run, trusted verdicts only")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with stage.opened("bench", nodes=4) as on, tempfile.TemporaryDirectory() as folder:
        on.make_namespace(NAMESPACE)
        with opened(on.cluster, Path(folder) / "config") as scene:
            rows = measure(on, scene, 1 if options.quick else options.runs, untrusted=not options.quick)
    Console().print(show(rows))
    if options.json:
        write_json(options.json, rows, ["kopf", "kubernetes"])


def measure(on: Stage, scene: Scene, runs: int, *, untrusted: bool) -> list[Row]:
    """Verdicts that are trusted; then such as only a failed preflight makes count."""
    excluded, tainted = zip(*(trusted(scene, on) for _ in range(runs)), strict=True)
    rows = [
        Row.of("excluded", "any verdict, bound 1", SUBJECT, excluded, "s"),
        Row.of("tainted", "trusted verdict, bound 2", SUBJECT, tainted, "s"),
    ]
    if untrusted:
        install(scene.cluster, *NO_PEER)
        hold_operator(scene.system)
        took = [untrusted_and_unfit(scene, on) for _ in range(runs)]
        rows.append(Row.of("tainted", "untrusted verdict and failed preflight, bound 15", SUBJECT, took, "s"))
    return rows


def trusted(scene: Scene, on: Stage) -> tuple[float, float]:
    """Seconds from a verdict of weight 1.0 until the job leaves the node out, and until it is tainted."""
    scene.policy(trustedNamespaces=[NAMESPACE], cooldownSeconds=FOREVER_S)
    with accused(scene, on) as (tenant, since):
        first = since(lambda: tenant.status().get("isolation", {}).get("nodes"))
        return first, since(lambda: scene.tainted(tenant.places[1]))


def untrusted_and_unfit(scene: Scene, on: Stage) -> float:
    """Seconds from an unconfirmed verdict of a stranger to the taint, the slot's leaving and the node's preflight included."""
    scene.policy(cooldownSeconds=FOREVER_S)
    with accused(scene, on, confirmed=False) as (tenant, since):
        tenant.leaves(1)
        return since(lambda: scene.tainted(tenant.places[1]))


@contextmanager
def accused(
    scene: Scene, on: Stage, **verdict: object
) -> Iterator[tuple[Tenant, Callable[[Callable[[], object]], float]]]:
    """A job whose slot 1 has just been accused, and what waits for something and gives the seconds that have passed since."""
    kubectl = Kubectl(on.cluster, NAMESPACE)
    scene.clear()
    tenant = Tenant(scene, kubectl, f"job-{next(_NUMBERS)}")
    said = tenant.accuse(1, **verdict)

    def since(seen: Callable[[], object]) -> float:
        eventually("what follows from the verdict", 60, seen)
        seconds = time.monotonic() - said
        say(f"{seconds:.2f} s")
        return seconds

    try:
        yield tenant, since
    finally:
        kubectl("delete", "trainingjob", tenant.name, "--wait=true")
        scene.clear()


if __name__ == "__main__":
    main()
