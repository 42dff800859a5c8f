"""Is this node fit to train? `python -m stormjib_runtime.preflight [--peer HOST:PORT] [--others FILE] [--json]`.

Measures the memory, a matrix product on each device, a transfer over loopback, and one to a peer's measuring server; names
what is slow or wrong, and exits 0 when the node is fit, 1 when it is not. An agent runs it before it first joins, as a
fork of its zygote; a Job runs it on a node that was isolated. `judge` is pure.

Bounds for a node alone are very low, so that shared machines pass: they find what is broken, not what is slower than it
should be. That takes others to compare with: `--others` holds what was measured elsewhere, one `--json` line each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stormjib_health.confirm.transfer import Server, measure, measuring_token, parse_address
from stormjib_runtime import codec
from stormjib_runtime.wire import Env

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stormjib_health.wire import Answer

MEMORY, COMPUTE, LOOPBACK, PAIR = "memory", "compute", "loopback", "pair"
FLOORS = {MEMORY: 0.1, COMPUTE: 0.1, LOOPBACK: 0.01, PAIR: 0.001}
"""In giga a second, a tenth or less of what the slowest core or network in use does: below it something is broken."""
SLOW = 0.5
"""Of the median of the others."""
OTHERS = 2
"""Fewer others are no measure: of two that differ, either may be the bad one."""
COPY_BYTES = 32 << 20
"""With its copy more than a core's share of the caches, and little enough for a small pod."""
COPIES = 5
COPY_BUDGET_S = 1.0
TRANSFERS = 5
TRANSFER_BUDGET_S = 1.0
TEXT = 512
EXIT_UNFIT = 1


@dataclass(frozen=True)
class Measured:
    """One thing that was measured."""

    name: str
    """`memory`, `loopback`, `pair`, or `compute` and the device."""
    rate: float = 0.0
    """Giga a second: bytes copied or transferred, operations of a product on the processor's own clock."""
    seconds: float = 0.0
    """What measuring it took, all in all."""
    digest: str = ""
    versions: str = ""
    """Rates and digests of products are compared between equal ones only."""
    wrong: str = ""
    """A result was wrong, or there was none."""
    skipped: str = ""
    """Why it could not be measured, where that is not the node's fault."""


@dataclass(frozen=True)
class Preflight:
    """What was measured, and what follows."""

    ok: bool
    checks: tuple[Measured, ...]
    why: str
    """A sentence: what is slow or wrong, or what was found fit."""


# --- the judge ------------------------------------------------------------------------------------------------------


def judge(checks: Sequence[Measured], others: Sequence[Sequence[Measured]] = ()) -> Preflight:
    """Whether the node is fit: by fixed bounds, and by what the same job's other slots measured, where enough did."""
    faults = [fault for check in checks for fault in _faults(check, _alike(check, others))]
    if faults:
        return Preflight(False, tuple(checks), "; ".join(faults)[: 2 * TEXT])
    return Preflight(True, tuple(checks), "fit: " + ", ".join(map(_figure, checks)))


def _alike(check: Measured, others: Sequence[Sequence[Measured]]) -> list[Measured]:
    """What the others measured of the same, on the same device with the same libraries."""
    key = (check.name, check.versions)
    measured = [other for node in others for other in node if not (other.skipped or other.wrong)]
    return [other for other in measured if (other.name, other.versions) == key]


def _faults(check: Measured, others: Sequence[Measured]) -> Iterable[str]:
    if check.skipped:
        return
    if check.wrong:
        yield f"{check.name}: {check.wrong}"
        return
    floor = FLOORS[check.name.split(" ")[0]]
    if check.rate < floor:
        yield f"{_figure(check)} is slow: any node does {floor:g}"
    elif len(others) >= OTHERS:
        median = statistics.median(other.rate for other in others)
        if check.rate < SLOW * median:
            yield f"{_figure(check)} is slow: the median of {len(others)} others is {median:.3g}"
    yield from _other_bits(check, others)


def _other_bits(check: Measured, others: Sequence[Measured]) -> Iterable[str]:
    """Most of the others agree with each other, and not with us."""
    votes = Counter(other.digest for other in others if other.digest)
    if not check.digest or not votes:
        return
    digest, most = votes.most_common(1)[0]
    if digest != check.digest and most >= OTHERS and 2 * most > votes.total():
        yield (
            f"{check.name} is wrong: digest {check.digest[:12]}, {most} of {votes.total()} others have {digest[:12]} "
            f"on the same ({check.versions})"
        )


def _figure(check: Measured) -> str:
    if check.skipped:
        return f"{check.name} not measured ({check.skipped})"
    unit = "Gop/s" if check.name.startswith(COMPUTE) else "GB/s"
    return f"{check.name} {check.rate:.3g} {unit}"


# --- what is measured -----------------------------------------------------------------------------------------------


def measure_memory(size: int = COPY_BYTES) -> Measured:
    """The best of some copies of a buffer that no cache holds; the last one is compared with its source."""
    begin = time.monotonic()
    try:
        source = bytearray(random.Random(0).randbytes(1 << 20) * (size >> 20))
        target = bytearray(size)
    except MemoryError:
        return Measured(MEMORY, skipped=f"no {2 * size >> 20} MiB free")
    times: list[float] = []
    view = memoryview(target)
    while not times or (len(times) < COPIES and time.monotonic() - begin < COPY_BUDGET_S):
        start = time.monotonic()
        view[:] = source
        times.append(time.monotonic() - start)
    wrong = "" if target == source else "a copy differs from its source"
    return Measured(MEMORY, size / min(times) / 1e9, time.monotonic() - begin, wrong=wrong)


def measure_compute() -> list[Measured]:
    """The fixed product on every GPU that is visible, else on a core."""
    begin = time.monotonic()
    try:
        from stormjib_health.probe import compute  # imports torch, which an image of programs need not have
    except ImportError as error:
        return [Measured(COMPUTE, skipped=str(error)[:TEXT])]
    found = []
    for device in compute.devices():
        answer = compute.measure(device)
        found.append(_product(device, answer, compute.operations(device), time.monotonic() - begin))
        begin = time.monotonic()
    return found


def _product(device: str, answer: Answer, operations: float, seconds: float) -> Measured:
    one = answer.cpu_s or answer.seconds
    return Measured(
        f"{COMPUTE} {device}",
        operations / one / 1e9 if one else 0.0,
        seconds,
        answer.digest,
        answer.versions,
        wrong=answer.text,
    )


async def measure_loopback() -> Measured:
    """The best of some transfers to a server in this process: what the host itself allows."""
    begin = time.monotonic()
    token = measuring_token(os.urandom(16).hex())
    server = Server(token)
    await server.start()
    try:
        answers = [await measure(f"127.0.0.1:{server.port}", token)]
        while answers[-1].ok and len(answers) < TRANSFERS and time.monotonic() - begin < TRANSFER_BUDGET_S:
            answers.append(await measure(f"127.0.0.1:{server.port}", token))
    finally:
        await server.close()
    return _transfer(LOOPBACK, max(answers, key=_rate), begin)


async def measure_pair(peer: str, secret: str) -> Measured:
    """A transfer to the measuring server of another agent of the job, whose agents have the token `secret`."""
    begin = time.monotonic()
    return _transfer(PAIR, await measure(peer, measuring_token(secret)), begin)


def _transfer(name: str, answer: Answer, begin: float) -> Measured:
    wrong = "" if answer.ok or answer.turned_away else answer.text
    skipped = answer.text if answer.turned_away else ""
    return Measured(name, _rate(answer), time.monotonic() - begin, wrong=wrong, skipped=skipped)


def _rate(answer: Answer) -> float:
    return answer.bytes / answer.seconds / 1e9 if answer.seconds else 0.0


async def run(peer: str, secret: str) -> tuple[Measured, ...]:
    """Measure everything, one after the other; the path to `peer` only where one is given. Raises OSError where there are
    no sockets to be had."""
    found = [measure_memory(), *measure_compute(), await measure_loopback()]
    return (*found, await measure_pair(peer, secret)) if peer else tuple(found)


# --- the command ----------------------------------------------------------------------------------------------------


def read_others(path: str) -> list[tuple[Measured, ...]]:
    """What other nodes have measured: one line of `--json` each. Raises OSError, or DecodeError that names the line."""
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            found.append(codec.decode(Preflight, line).checks)
        except codec.DecodeError as error:
            raise codec.DecodeError(f"{path}, line {number}: {error}") from error
    return found


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(
        prog="stormjib_runtime.preflight", description="Is this node fit to train?"
    )
    parser.add_argument("--peer", default="", help="HOST:PORT of the measuring server of another agent")
    parser.add_argument("--others", default="", help="file with the --json lines of other nodes")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    words = parser.parse_args()
    secret = os.environ.get(Env.TOKEN, "")
    try:
        if words.peer:
            parse_address(words.peer)
        if words.peer and not secret:
            parser.error(f"--peer needs the token of the job's agents in {Env.TOKEN.value}")
        others = read_others(words.others) if words.others else []
    except (ValueError, OSError) as error:
        parser.error(str(error))
    result = judge(asyncio.run(run(words.peer, secret)), others)
    print(codec.encode(result).decode() if words.json else _text(result), flush=True)
    sys.exit(0 if result.ok else EXIT_UNFIT)


def _text(result: Preflight) -> str:
    lines = [f"{_figure(check):40} in {check.seconds:.2f} s" for check in result.checks]
    return "\n".join([*lines, result.why])


if __name__ == "__main__":
    main()
