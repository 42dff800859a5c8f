"""`stormjib-fault`: break something in the pod that this runs in, by exec in a job's own container.

    kubectl exec POD -c trainer -- python3 -m stormjib_fault inject stop --rank 3 --seconds 5

What needs more than the pod's own rights (network, agents, cgroups) is refused with a sentence.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING

from stormjib_fault import world
from stormjib_fault.catalogue import FAULTS, make
from stormjib_fault.words import Draw, FaultError, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

PROVE_S = 10.0


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    options = _parser().parse_args(words)
    if options.verb == "list":
        _list()
        return 0
    try:
        _inject(options)
    except FaultError as error:
        print(f"stormjib-fault: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stormjib-fault", description="Injects a fault into this pod's ranks."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all faults, and where each can be injected")
    inject = verbs.add_parser("inject", help="inject one fault, prove it, heal it")
    inject.add_argument("fault", help="a name that `list` shows")
    inject.add_argument("--rank", type=int, required=True, help="the victim's global rank")
    inject.add_argument("--severity", type=float, help="see `list`; default: the middle of its range")
    inject.add_argument(
        "--seconds", type=float, default=0.0, help="heal after this long; 0: leave it as it is"
    )
    return parser


def _list() -> None:
    for fault in FAULTS.values():
        low, high = fault.severities
        severity = "" if low == high == 1 else f" Severity {low:g} to {high:g}."
        where = "laboratory only" if fault.laboratory else "any pod"
        print(f"{fault.row:4}{fault.name:17}{where:16}{' '.join((fault.__doc__ or '').split())}{severity}")


def _inject(options: argparse.Namespace) -> None:
    kind = FAULTS.get(options.fault)
    if kind is not None and kind.laboratory:
        raise Refused(
            f"{options.fault} needs rights that a job's pod does not have; use the laboratory (bench/lab)"
        )
    low, high = kind.severities if kind else (1.0, 1.0)
    severity = options.severity if options.severity is not None else (low * high) ** 0.5
    fault = make(world.here(), Draw(options.fault, options.rank, severity=severity))
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    truth = fault.truth()
    fault.arm()
    try:
        fault.inject()
        print(json.dumps({"truth": asdict(truth), "proof": fault.prove(PROVE_S)}), flush=True)
        if options.seconds:
            ended.wait(options.seconds)
    finally:
        if options.seconds:
            fault.heal()
