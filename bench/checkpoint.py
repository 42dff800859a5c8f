"""What a save costs training, beside other savers on the same machine in the same minutes.

`python -m bench.checkpoint [--quick] [--gb 1.1] [--wide 768] [--forward-ms 500] [--cores spare|none|both] [--only NAME,...] [--folder DIR] [--json FILE]`.
It wants a machine that does nothing else, and a folder on the disk in question.

The loop is a forward that leaves the state alone and an optimizer that adds one to every number of it. *Lost* is the time of the steps from
a save until two steps after it was durable, less the time of as many steps without a save, run right before or after, in random order. After
every save what was written is read back and compared, bit for bit. torch_checkpointing is a row where it is installed
(`.venv/bin/uv pip install --python .venv/bin/python torch-checkpointing==0.1.1`); `make setup` does not.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from bench.health_cost import interval
from bench.savers import Nothing, savers
from bench.table import Row, show, write_json
from stormjib_checkpoint.engine.arena import Arena
from stormjib_checkpoint.files import Posix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.savers import Saver, State

PAIRS, PAIRS_MOST = 5, 15
"""For each saver; for ours and the two that lose least."""
SETTLE = 2
"""Steps after it is durable: late effects count as lost."""
GB = 1e9


@dataclass
class Tally:
    """What was measured of one saver in one case."""

    lost_s: list[float] = field(default_factory=list)
    hot_s: list[float] = field(default_factory=list)
    """Call and waits before updates, together."""
    durable_s: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)


class Adder(torch.optim.Optimizer):
    """Adds one to all that it holds: whole numbers below 2^24, so that every step's state is known exactly."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__([{"params": list(tensors)}], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            torch._foreach_add_(group["params"], 1.0)


class Loop:
    """Forward, the saver's wait, and the update."""

    def __init__(self, state: State, forward_ms: float) -> None:
        self.optimizer = Adder(list(state.values()))
        self.left, self.right = torch.randn(512, 1024), torch.randn(1024, 1024)
        self._forwards = 1
        self._forwards = max(1, round(forward_ms / 1e3 / statistics.median(self._times(30))))

    def _times(self, number: int) -> Iterator[float]:
        for _ in range(number):
            began = time.perf_counter()
            self._forward()
            yield time.perf_counter() - began

    def _forward(self) -> None:
        for _ in range(self._forwards):
            self.left @ self.right

    def step(self, saver: Saver) -> float:
        """One step; the seconds that it waited before its update."""
        self._forward()
        began = time.perf_counter()
        saver.before_update()
        waited = time.perf_counter() - began
        self.optimizer.step()
        return waited


def llama(gigabytes: float, wide: int = 768) -> State:
    """Names and shapes of a small Llama with Adam's moments, as many layers as make so many gigabytes; whole numbers in fp32."""
    draw = torch.Generator().manual_seed(0)
    inner, words = wide * 8 // 3, max(1000, min(32_000, int(gigabytes * 29_000)))
    layer = (
        {f"w{n}": (wide, wide) for n in "qkvo"}
        | {f"ffn{n}": (inner, wide) for n in "123"}
        | {"norm": (wide,)}
    )
    outer = {"tok_embeddings": (words, wide), "output": (words, wide), "norm": (wide,)}
    state: State = {}
    numbers = (f"layers.{number}." for number in itertools.count())
    named = {f"{name}.weight": shape for name, shape in outer.items()}
    while True:
        for name, shape in named.items():
            for part in ("model", "optim.exp_avg", "optim.exp_avg_sq"):
                values = torch.randint(0, 1 << 20, shape, generator=draw, dtype=torch.int32)
                state[f"{part}.{name}"] = values.to(torch.float32)
            state[f"optim.step.{name}"] = torch.zeros(())
        if size(state) >= gigabytes * GB:
            return state
        prefix = next(numbers)
        named = {f"{prefix}{name}.weight": shape for name, shape in layer.items()}


def size(state: State) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def cpu_s() -> float:
    """Processor time of this process and of its living children: some peers save in one."""
    own = os.getpid()
    tick = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == own:
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def with_save(loop: Loop, state: State, saver: Saver, number: int) -> tuple[int, float, float, float, float]:
    """Save, and step until two steps after it is durable: steps, seconds, seconds in the hot path, until durable, and of CPU."""
    cpu, began = cpu_s(), time.perf_counter()
    saver.save(state, number)
    hot = time.perf_counter() - began
    durable: list[float] = []

    def watch() -> None:  # sees the moment, and not the end of the step in progress
        saver.finish()
        durable.append(time.perf_counter() - began)

    if saver.durable():
        watch()
    watcher = threading.Thread(target=watch if not durable else lambda: None)
    watcher.start()
    steps = 0
    waited = 0.0
    while not durable:
        waited += loop.step(saver)
        steps += 1
        if not watcher.is_alive() and not durable:
            saver.finish()  # raises what went wrong
    for _ in range(SETTLE):
        waited += loop.step(saver)
    seconds = time.perf_counter() - began
    watcher.join()
    return steps + SETTLE, seconds, hot + waited, durable[0], cpu_s() - cpu


def without(loop: Loop, steps: int) -> tuple[float, float]:
    """Seconds, and of CPU, of as many steps."""
    nothing = Nothing()
    cpu, began = cpu_s(), time.perf_counter()
    for _ in range(steps):
        loop.step(nothing)
    return time.perf_counter() - began, cpu_s() - cpu


def pair(loop: Loop, state: State, saver: Saver, number: int, tally: Tally, first: bool, usual: int) -> int:
    """One save and as many steps without, in random order; how many steps that was."""
    before = random.random() < 0.5
    alone = without(loop, usual) if before else (0.0, 0.0)
    steps, seconds, hot, durable, cpu = with_save(loop, state, saver, number)
    check(saver, state, steps)
    rested()
    if before and steps != usual:
        alone = tuple(value * steps / usual for value in alone)  # type: ignore[assignment]
    elif not before:
        alone = without(loop, steps)
    if first:
        tally.first_s.append(durable)
        return steps
    tally.lost_s.append(seconds - alone[0])
    tally.hot_s.append(hot)
    tally.durable_s.append(durable)
    tally.cpu_s_per_gb.append((cpu - alone[1]) / (size(state) / GB))
    return steps


def check(saver: Saver, state: State, steps: int) -> None:
    """What was saved is what the state was so many steps ago, bit for bit."""
    loaded = saver.load(state)
    for name, tensor in state.items():
        if not torch.equal(loaded[name] + steps, tensor):
            raise SystemExit(f"{type(saver).__name__} has saved another {name} than there was")


def rested() -> None:
    """The disk has nothing to do any more."""
    gc.collect()
    os.sync()
    time.sleep(0.2)


def measured(
    folder: Path, state: State, forward_ms: float, only: Sequence[str], pairs: int
) -> dict[str, Tally]:
    """All savers in one process, in random turns; those that lose least, and ours, once more as often."""
    loop = Loop(state, forward_ms)
    makers = savers(folder, loop.optimizer, state)
    tallies = {name: Tally() for name in makers if not only or name in only}
    made: dict[str, Saver] = {}
    usual = dict.fromkeys(tallies, 3)
    for name, tally in tallies.items():
        began = time.perf_counter()
        made[name] = makers[name]()
        tally.start_s.append(time.perf_counter() - began)
    numbers = itertools.count(1)

    def turn(names: Sequence[str], first: bool = False) -> None:
        for name in random.sample(list(names), len(names)):
            usual[name] = pair(loop, state, made[name], next(numbers), tallies[name], first, usual[name])
            clear(folder)

    turn(list(tallies), first=True)
    for _ in range(pairs):
        turn(list(tallies))
    peers = sorted(
        (n for n in tallies if n != "stormjib"), key=lambda n: statistics.median(tallies[n].lost_s)
    )
    for _ in range(PAIRS_MOST - PAIRS if pairs == PAIRS else 0):
        turn([name for name in ("stormjib", *peers[:2]) if name in tallies])
    for saver in made.values():
        saver.close()
    return tallies


def clear(folder: Path) -> None:
    """Each starts on the same empty disk; ours has a retention of its own."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != "stormjib":
            shutil.rmtree(path)


def rows(case: str, tallies: dict[str, Tally], gigabytes: float) -> list[Row]:
    """One row for each figure of each saver."""
    found: list[Row] = []
    for name, tally in tallies.items():
        lost = [1e3 * value for value in tally.lost_s]
        found += [
            Row.of("lost", case, name, lost, "ms"),
            Row("lost, 95 %", case, name, *middle_and_interval(lost), len(lost), "ms"),
            Row.of("call and waits", case, name, [1e3 * value for value in tally.hot_s], "ms"),
            Row.of("durable", case, name, tally.durable_s, "s"),
            Row.of("rate", case, name, [gigabytes / value for value in tally.durable_s], "GB/s"),
            Row.of("CPU", case, name, tally.cpu_s_per_gb, "s/GB"),
            Row.of("first save", case, name, tally.first_s, "s"),
            Row.of("start", case, name, tally.start_s, "s"),
        ]
    return found


def middle_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval."""
    low, high = interval(values)
    return _r(statistics.median(values)), _r(low), _r(high)


def disk(folder: Path, gigabytes: float, rounds: int) -> list[Row]:
    """The disk's own rate: threads times length of a write, past the page cache, synced; in random turns."""
    arena = Arena(int(gigabytes * GB))  # pages of its own, as direct I/O wants them
    arena.touch()
    torch.frombuffer(arena.view, dtype=torch.uint8).random_(0, 255)
    view = arena.view
    combinations = list(itertools.product((1, 2, 4), (4, 16, 64)))
    rates: dict[tuple[int, int], list[float]] = {one: [] for one in combinations}
    for _ in range(rounds):
        for threads, megabytes in random.sample(combinations, len(combinations)):
            rates[threads, megabytes].append(
                len(view) / GB / _written(folder / "raw", view, threads, megabytes << 20)
            )
            rested()
    return [
        Row.of("rate", f"{threads} threads, {megabytes} MiB", "disk", values, "GB/s")
        for (threads, megabytes), values in rates.items()
    ]


def _written(path: Path, view: memoryview, threads: int, length: int) -> float:
    files = Posix()
    began = time.perf_counter()
    descriptor = files.open_new_direct(str(path))
    files.reserve(descriptor, len(view))
    offsets = iter(range(0, len(view), length))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            part = view[offset : offset + length]
            while part:
                count = files.write_at(descriptor, part, offset)
                part, offset = part[count:], offset + count

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    files.sync(descriptor)
    files.close(descriptor)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def _r(value: float) -> float:
    return round(value, 3)


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of a gigabyte, two pairs, three savers")
    parser.add_argument("--gb", type=float, default=1.1)
    parser.add_argument(
        "--wide", type=int, default=768, help="of the model: 284 makes 2,444 tensors of 1.1 GB"
    )
    parser.add_argument("--forward-ms", type=float, default=500)
    parser.add_argument("--cores", choices=["spare", "none", "both"], default="both")
    parser.add_argument("--only", default="", help="names of savers, with commas between")
    parser.add_argument("--folder", type=Path, default=Path.home(), help="on the disk in question")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.gb, options.forward_ms, options.cores = 0.1, 100, "spare"
        options.only = options.only or "stormjib,safetensors,dcp.async_save lazy stager"
    only = [name for name in options.only.split(",") if name]
    with tempfile.TemporaryDirectory(prefix="stormjib-bench-", dir=options.folder) as name:
        found = run(Path(name), options, only, 2 if options.quick else PAIRS)
    Console().print(show(found))
    if options.json:
        write_json(options.json, found, ["torch", "safetensors"])


def run(folder: Path, options: argparse.Namespace, only: Sequence[str], pairs: int) -> list[Row]:
    """The disk, then each case."""
    state = llama(options.gb, options.wide)
    gigabytes = size(state) / GB
    found = disk(folder, min(gigabytes, 1.1), 2 if options.quick else 5)
    for cores in ("spare", "none") if options.cores == "both" else (options.cores,):
        torch.set_num_threads((os.cpu_count() or 2) - (cores == "spare"))
        inner = folder / cores
        inner.mkdir()
        case = f"{gigabytes:.2f} GB in {len(state):,} tensors, {options.forward_ms:g} ms, {cores}"
        found += rows(case, measured(inner, state, options.forward_ms, only, pairs), gigabytes)
        shutil.rmtree(inner)
    return found


if __name__ == "__main__":
    main()
