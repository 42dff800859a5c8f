"""Stacks of a process that runs no Python: asked for by a signal, which must never end anybody."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from stormjib_health.records import stack
from stormjib_health.records.stack import MAX_TEXT, stack_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HOLDS_THE_GIL = """
import ctypes, sys, threading
from pathlib import Path
from stormjib_health.records import stack
stack.install(Path(sys.argv[1]))
sys.setswitchinterval(1000)
begun = threading.Event()
def other():
    begun.set()
    threading.Event().wait()
threading.Thread(target=other, daemon=True).start()
begun.wait()  # whoever has the GIL keeps it until it blocks, so the other thread is in its own wait by then
def stuck():
    print("ready", flush=True)
    while True:  # a signal ends one sleep
        ctypes.PyDLL(None).sleep(600)
stuck()
"""
PLAIN = "print('ready', flush=True); import time; time.sleep(600)"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(program: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", program, str(stack_path(tmp_path, 0))]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def until(value: Callable[[], str]) -> str:
    deadline = time.monotonic() + 10
    while not value() and time.monotonic() < deadline:
        time.sleep(0.01)
    return value()


def test_a_process_that_holds_the_gil_tells_its_stacks(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = start(HOLDS_THE_GIL)
    path = stack_path(tmp_path, 0)
    assert stack.read(path) == ""
    for _ in range(2):  # the second answer replaces the first
        assert stack.ask(process.pid, path)
        text = until(lambda: stack.read(path) if "in stuck" in stack.read(path) else "")
        assert text.startswith("Current thread")
        assert text.count("in stuck") == 1
        assert "in other" in text, "the other thread is told too"
    assert process.poll() is None


def test_a_process_without_the_handler_is_not_signalled(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = start(PLAIN)
    path = stack_path(tmp_path, 0)
    path.touch()
    assert not stack.ask(process.pid, path)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert not stack.ask(process.pid, path)


def test_what_is_read_is_bounded_and_begins_with_the_thread_that_took_the_signal(tmp_path: Path) -> None:
    path = tmp_path / "0.stack"
    assert stack.read(path) == ""
    others = "\n\n".join(f"Thread 0x{n} (most recent call first):\n" + "  File\n" * 50 for n in range(40))
    path.write_text(others + "\n\nCurrent thread 0x9 (most recent call first):\n  File main\n")
    text = stack.read(path)
    assert text.startswith("Current thread 0x9")
    assert len(text.encode()) == MAX_TEXT
    path.write_bytes(b"\xff" * (1 << 20))
    assert len(stack.read(path).encode()) <= MAX_TEXT
