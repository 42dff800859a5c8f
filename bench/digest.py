"""How fast digests of tensors are computed, beside checksums that could not do the same, each by one thread.

    python -m bench.digest [--quick] [--json FILE]

Memory that no cache holds, and a block as a saver has it after a copy. Per second of processor time, all of them in each round, so that
a machine that others use too is as fast or as slow for all. The twin counts where nothing is compiled; the operations of torch are
for a GPU without a compiler, and stand here for completeness.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash
from rich.console import Console

from bench.table import Row, show, write_json
from stormjib_checkpoint import digest
from stormjib_checkpoint.boxes import Box, whole
from stormjib_checkpoint.digest import on_device, twin
from stormjib_checkpoint.digest.definition import words
from stormjib_checkpoint.format import ITEM_BYTES
from stormjib_checkpoint.hashing import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

GB = 1e9
DTYPES = ("F8_E4M3", "BF16", "F32", "F64", "C128")
"""One of each size."""
LEAST_S = 0.02
"""A measurement repeats what is quicker."""


class Measured(NamedTuple):
    """What is timed: its row, and how many bytes it takes in."""

    case: str
    subject: str
    bytes: int
    run: Callable[[], object]


def subjects(data: bytearray, case: str, slow: int) -> list[Measured]:
    """All that are compared over `data`; the slow ones take its first `slow` bytes."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    view, size = memoryview(data), len(data)
    elements = torch.frombuffer(data, dtype=torch.uint8)
    found = [
        Measured(case, "xxhash.xxh3_64", size, lambda: xxhash.xxh3_64_intdigest(view)),
        Measured(case, "zlib.crc32", slow, lambda: zlib.crc32(view[:slow])),
        Measured(case, "hashlib.sha256", slow, lambda: hashlib.sha256(view[:slow])),
        Measured(case, "hashlib.blake2b", slow, lambda: hashlib.blake2b(view[:slow])),
    ]
    for dtype in DTYPES:
        item = ITEM_BYTES[dtype]
        label, count, fewer = f"{case}, {item}-byte elements", size // item, slow // item
        flat = digest.geometry((count,), whole((count,)))

        def kernel(dtype: str = dtype, box: digest.Geometry = flat, count: int = count) -> int:
            return digest.partial(address, dtype, box, 0, count)

        def in_numpy(dtype: str = dtype, box: digest.Geometry = flat, count: int = fewer) -> int:
            return twin.partial(address, words(dtype), box, 0, count)

        def in_torch(dtype: str = dtype, box: digest.Geometry = flat) -> int:
            return on_device.partial_on_device(elements[:slow], dtype, box, 0)

        found += [
            Measured(label, "kernel", size, kernel),
            Measured(label, "twin in numpy", slow, in_numpy),
            Measured(label, "torch on the processor", slow, in_torch),
        ]
    return [*found, *columns(address, size, case)]


def columns(address: int, size: int, case: str) -> list[Measured]:
    """Boxes of a wide atom, whose elements lie there in runs: the kernel alone."""
    found = []
    for run in (1024, 64, 8, 1):
        rows = size // 4 // run
        box = digest.geometry((rows, 4096), Box((0, 1), (rows, run)))

        def kernel(box: digest.Geometry = box, count: int = rows * run) -> int:
            return digest.partial(address, "F32", box, 0, count)

        found.append(Measured(f"{case}, 4-byte elements in runs of {run}", "kernel", rows * run * 4, kernel))
    return found


def rate(one: Measured) -> float:
    """GB per second of this thread's processor time."""
    times, began = 0, time.thread_time()
    while (seconds := time.thread_time() - began) < LEAST_S:
        one.run()
        times += 1
    return times * one.bytes / GB / seconds


def rows(size: int, rounds: int) -> list[Row]:
    """Every subject in each round, in turn from the front and from the back."""
    torch.set_num_threads(1)
    # Not zeros: every page would be the same one.
    large, block = bytearray(b"0123456789abcdef" * (size // 16)), bytearray(range(256)) * (BLOCK_BYTES // 256)
    all_of_them = [
        *subjects(large, f"{size >> 20} MiB", BLOCK_BYTES * 8),
        *subjects(block, "1 MiB", BLOCK_BYTES // 4),
    ]
    rates: list[list[float]] = [[] for _ in all_of_them]
    for number in range(rounds):
        for at in range(len(all_of_them))[:: -1 if number % 2 else 1]:
            rates[at].append(rate(all_of_them[at]))
    return [
        Row.of("rate", one.case, one.subject, seen, "GB/CPU-s")
        for one, seen in zip(all_of_them, rates, strict=True)
    ]


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of a gigabyte, three rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = rows(128 << 20, 3) if options.quick else rows(512 << 20, 9)
    Console().print(show(found))
    if options.json:
        write_json(options.json, found, ["xxhash", "numpy", "torch"])


if __name__ == "__main__":
    main()
