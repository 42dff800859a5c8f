"""Stacks of a rank that may hold the GIL: faulthandler writes them on a signal, from C, into a file beside the ring.

The rank installs the handler before the script; its agent asks and reads. The signal would end a process that does
not handle it, so the agent looks first whether the kernel has a handler for it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

SIGNAL = signal.SIGRTMIN + 7
"""A real-time signal: none of the classic ones is free in every script."""
MAX_TEXT = 4096
_MAX_FILE = 1 << 16
_OPEN = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


def stack_path(folder: Path, local_rank: int) -> Path:
    """Where the stacks of a local rank are written, in the folder of the pages (`STORMJIB_PAGE_DIR`)."""
    return folder / f"{local_rank}.stack"


def install(path: Path) -> None:
    """In the rank: from now on the signal writes the stacks of all threads to `path`."""
    # Kept open for good, and appended to: the agent empties the file between two questions.
    faulthandler.register(SIGNAL, os.open(path, _OPEN, 0o600), all_threads=True, chain=False)


def ask(pid: int, path: Path) -> bool:
    """In the agent: have the stacks of process `pid` written. False where it has no handler, or is gone."""
    if not handles(pid):
        return False
    try:
        os.truncate(path, 0)
        os.kill(pid, SIGNAL)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def handles(pid: int) -> bool:
    """Whether the kernel has a handler of the process for the signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(masks) and bool(int(masks[0], 16) >> (SIGNAL - 1) & 1)


def read(path: Path) -> str:
    """In the agent: what was written so far, the thread that took the signal (the main one) first; at most `MAX_TEXT`
    bytes. Empty where nothing was."""
    try:
        with open(path, "rb", buffering=0) as file:
            text = (file.read(_MAX_FILE) or b"").decode(errors="replace")
    except FileNotFoundError:
        return ""
    threads = [thread.strip("\n") for thread in text.split("\n\n")]
    threads.sort(key=lambda thread: not thread.startswith("Current thread"))
    return "\n\n".join(threads).encode()[:MAX_TEXT].decode(errors="ignore")
