"""A fixed matrix product: how fast this device is, and whether it computes what others of its kind compute.

`python -m stormjib_health.probe.compute [--device cpu|cuda:N]` prints one line, the JSON of a `wire.Answer`. An agent starts it
as a fork of its zygote, beside ranks that may be busy: so it is small, has one thread, and says processor time as well.

Two products. The first has operands of full precision; the SHA-256 of its bits is compared between equal devices and
libraries only, because the order of a sum is the library's choice. The second has whole numbers whose sums a double
holds exactly, so that its row and column sums can be checked here, with nobody to compare with.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import re
import statistics
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from stormjib_health.wire import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

CPU_SIZE, GPU_SIZE = 512, 2048
"""Rows of the operands: some milliseconds on a core, some tenths of one on a GPU."""
REPEATS = 9
BUDGET_S = 0.15
"""No repetition begins later than this: a slow core gets fewer."""
EXACT_SIZE = 256
_EXACT_BITS = 21
"""Of an operand, sign included: a sum of EXACT_SIZE products has 48, and a double holds 53."""
_MIX = 2654435761
"""Knuth's multiplicative hash: neighbours get values that have nothing to do with each other."""


def devices() -> list[str]:
    """What there is to measure: every visible GPU, else a core."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def measure(device: str) -> Answer:
    """Run both products on `device`; the answer's `id` is 0. `text` says what is wrong with a result, if anything.

    `seconds` and `cpu_s` are medians for one product of `operations`. Not `ok` where torch cannot use the device, or has no
    memory for it.
    """
    torch.set_num_threads(1)
    try:
        return _measure(device)
    except RuntimeError as error:
        return Answer(0, ok=False, text=f"{device}: {error}"[:512])


def _measure(device: str) -> Answer:
    left, right = operand(1, _size(device), device), operand(2, _size(device), device)
    walls, cpus, digests = _repeat(lambda: left @ right, device)
    text = wrong_product(device)
    if len(digests) > 1:
        text = f"one product gave {len(digests)} results in {len(walls) + 1} runs; {text}".rstrip("; ")
    return Answer(
        0,
        ok=True,
        seconds=statistics.median(walls),
        cpu_s=0.0 if _is_gpu(device) else statistics.median(cpus),
        digest=min(digests),
        versions=versions(device),
        text=text,
    )


def operations(device: str) -> float:
    """Additions and multiplications of the product that is timed."""
    return 2.0 * _size(device) ** 3


def operand(seed: int, size: int, device: str = "cpu") -> torch.Tensor:
    """A square matrix of 24-bit fractions in [-0.5, 0.5): float32, made by whole numbers alone, so equal everywhere."""
    return (_hashed(seed, size, device) & 0xFFFFFF).to(torch.float32) / 2**24 - 0.5


def whole_operand(seed: int, size: int) -> torch.Tensor:
    """A square matrix of whole numbers of _EXACT_BITS bits, sign included: int64."""
    return (_hashed(seed, size, "cpu") & ((1 << _EXACT_BITS) - 1)) - (1 << (_EXACT_BITS - 1))


def _hashed(seed: int, size: int, device: str) -> torch.Tensor:
    counted = torch.arange(size * size, dtype=torch.int64, device=device).reshape(size, size)
    counted = counted + seed * size * size
    return (counted * _MIX % 2**32) >> 8 ^ counted


def _repeat(product: Callable[[], torch.Tensor], device: str) -> tuple[list[float], list[float], set[str]]:
    """Wall times, processor times and different digests of some runs; the first warms the library up and is not timed."""
    digests = {digest(product())}
    walls: list[float] = []
    cpus: list[float] = []
    begin = time.monotonic()
    while not walls or (len(walls) < REPEATS and time.monotonic() - begin < BUDGET_S):
        wall, cpu = time.monotonic(), time.process_time()
        result = product()
        if _is_gpu(device):
            torch.cuda.synchronize(device)
        cpus.append(time.process_time() - cpu)
        walls.append(time.monotonic() - wall)
        digests.add(digest(result))
    return walls, cpus, digests


def digest(result: torch.Tensor) -> str:
    """SHA-256 of the bits, in row order. Without numpy, which an image need not have."""
    held = result.detach().cpu().contiguous()
    return hashlib.sha256(ctypes.string_at(held.data_ptr(), held.nbytes)).hexdigest()


def wrong_product(device: str) -> str:
    """Where a product of whole numbers is wrong; empty where it is right."""
    left, right = whole_operand(3, EXACT_SIZE), whole_operand(4, EXACT_SIZE)
    found = left.to(device, torch.float64) @ right.to(device, torch.float64)
    return compare(left, right, found.cpu().to(torch.int64))


def compare(left: torch.Tensor, right: torch.Tensor, found: torch.Tensor) -> str:
    """Check `found` = left x right by the sums of its rows and columns: all int64, all exact, far cheaper than the product."""
    ones = torch.ones(left.shape[0], dtype=torch.int64)
    rows = (found @ ones != left @ (right @ ones)).nonzero().flatten().tolist()
    columns = (ones @ found != (ones @ left) @ right).nonzero().flatten().tolist()
    if not rows and not columns:
        return ""
    return f"a product of whole numbers is wrong in rows {_few(rows)}, columns {_few(columns)}"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (f" and {len(numbers) - 4} more" if len(numbers) > 4 else "")


def versions(device: str) -> str:
    """What must be equal for two digests to be comparable: the device and what computes on it."""
    if _is_gpu(device):
        return f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}; CUDA {torch.version.cuda}"
    blas = re.findall(r"(?:Math Kernel Library|OpenBLAS|MKL-DNN|NVPL|ArmPL)[^\n(]*", torch.__config__.show())
    capability = torch.backends.cpu.get_cpu_capability()
    return "; ".join(
        [cpu_name(), capability, f"torch {torch.__version__}", *(each.strip() for each in blas)]
    )[:512]


def cpu_name() -> str:
    """Name, family and model of the processor: libraries choose their kernels by them."""
    with open("/proc/cpuinfo") as file:
        text = file.read(4096)
    names = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
    found = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in names]
    return " ".join([platform.machine(), *(match[1].strip() for match in found if match)])


def _size(device: str) -> int:
    return GPU_SIZE if _is_gpu(device) else CPU_SIZE


def _is_gpu(device: str) -> bool:
    return not device.startswith("cpu")


def main() -> None:
    """Entry point of the module: one line on stdout."""
    parser = argparse.ArgumentParser(prog="stormjib_health.probe.compute")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    print(json.dumps(asdict(measure(parser.parse_args().device))), flush=True)


if __name__ == "__main__":
    main()
