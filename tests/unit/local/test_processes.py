"""Finding the processes of a cluster: also those that are just becoming another program."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stormjib_local.processes import MARKER, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

WORD = f"{MARKER}=x/node-1/containerd".encode()


@pytest.fixture
def restless(tmp_path: Path) -> Iterator[int]:
    """A process that executes itself anew, again and again."""
    program = tmp_path / "again"
    program.write_text('#!/bin/sh\nexec "$0"\n')
    program.chmod(0o755)
    process = subprocess.Popen([program], env={MARKER: "x/node-1/containerd", "PATH": os.environ["PATH"]})
    yield process.pid
    process.kill()
    process.wait()


def test_a_process_that_executes_another_program_keeps_its_marker(restless: int) -> None:
    path, empty, deadline = Path(f"/proc/{restless}/environ"), 0, time.monotonic() + 30
    while empty < 5 and time.monotonic() < deadline:
        empty += not path.read_bytes()
        assert WORD in environment(restless)
    assert empty == 5, "the kernel never showed it without an environment: nothing was tested"


def test_who_has_no_environment_or_is_gone_is_not_waited_for() -> None:
    begin = time.monotonic()
    process = subprocess.Popen(["/bin/sleep", "60"], env={})
    try:
        deadline = time.monotonic() + 10
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes() and time.monotonic() < deadline:
            pass
        assert environment(process.pid) == b""
    finally:
        process.kill()
    while Path(f"/proc/{process.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
        assert time.monotonic() < deadline
    assert environment(process.pid) == b"", "a zombie"
    process.wait()
    assert environment(process.pid) == b""
    assert environment(2) == b"", "a thread of the kernel, or nobody"
    assert time.monotonic() - begin < 5
