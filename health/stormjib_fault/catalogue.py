"""All faults, by name and by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_fault import delay, inside, network, parts, processes
from stormjib_fault.words import FaultError

if TYPE_CHECKING:
    from stormjib_fault.fault import Fault
    from stormjib_fault.words import Draw
    from stormjib_fault.world import World

FAULTS: dict[str, type[Fault]] = {
    each.name: each
    for each in (
        *(processes.Kill, processes.Abort, processes.Segfault, processes.OutOfMemory, inside.Raise),
        *(processes.Stop, inside.StopBetween, inside.StopInside, processes.Freeze),
        *(inside.Sleep, inside.HoldGil, inside.DeviceWait, inside.Skip, inside.Resize),
        *(inside.Delay, inside.SlowData, processes.DutyCycle, processes.Quota),
        *(network.OneWay, network.BothWays, network.LinkDown, network.Partition),
        *(network.SlowSender, network.SlowReceiver, network.SlowLink, network.LossIn, network.LossLink),
        *(delay.Latency, network.Flapping, network.Congestion, network.CongestedSwitch),
        *(inside.Rotating, inside.Varying, inside.LongPhase, inside.Evaluation, inside.OneSaves),
        *(inside.Compile, inside.FirstStep, inside.Flip, inside.FlipGradient, inside.NotFinite),
        *(inside.StuckColumn, parts.AgentStopped, parts.AgentKilled, parts.AgentCut),
        *(parts.CoordinatorKilled, parts.Pause, parts.SkewedClocks),
    )
}
ROWS: tuple[str, ...] = tuple(f"F{number}" for number in range(1, 18))


def of_row(row: str) -> list[type[Fault]]:
    """The faults of a row, in the order of the catalogue. Raises FaultError naming the rows that there are."""
    found = [fault for fault in FAULTS.values() if fault.row == row]
    if not found:
        raise FaultError(f"no row {row!r}; rows: {', '.join(ROWS)}")
    return found


def make(world: World, draw: Draw) -> Fault:
    """The fault that was drawn, in this world. Raises FaultError naming the faults that there are."""
    if draw.fault not in FAULTS:
        raise FaultError(f"no fault {draw.fault!r}; faults: {', '.join(FAULTS)}")
    return FAULTS[draw.fault](world, draw)
