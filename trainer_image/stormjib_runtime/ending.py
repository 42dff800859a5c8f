"""The end of a forked rank: what python does at exit, except tearing down the libraries that the zygote had imported.

Tearing torch down costs a second of CPU and prints what its libraries think of it, and until it is over nobody sees
that the rank has failed. So threads are joined, exit handlers run, the script's own objects are finalised and all output
is flushed, as ever; then the process ends at once. C's own exit handlers do not run.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

INTERRUPTED = -signal.SIGINT
_MASK = 0xFF


def code_of(error: SystemExit) -> int:
    """The exit code that `sys.exit(...)` asked for; a text goes to stderr and means 1."""
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & _MASK
    print(code, file=sys.stderr, flush=True)
    return 1


def show(error: BaseException, without: Collection[str]) -> int:
    """Show an exception as the script's `sys.excepthook` does, without the outer frames of some files; the exit code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in without:
        trace = trace.tb_next
    error.__traceback__ = trace  # the hook shows this one, whichever it is given
    try:
        sys.excepthook(type(error), error, trace)
    except BaseException as broken:  # noqa: BLE001  the top of a process; whatever a hook raises is shown, as by python
        _show_broken_hook(broken, error, trace)
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _show_broken_hook(broken: BaseException, error: BaseException, trace: TracebackType | None) -> None:
    broken.__context__ = None
    if broken.__traceback__ is not None:
        broken.__traceback__ = broken.__traceback__.tb_next
    print("Error in sys.excepthook:", file=sys.stderr)
    sys.__excepthook__(type(broken), broken, broken.__traceback__)
    print("\nOriginal exception was:", file=sys.stderr)
    sys.__excepthook__(type(error), error, trace)


def end(code: int, imported: Collection[str]) -> NoReturn:
    """End this process. `imported` are the modules that were there before the script: they are left alone."""
    with contextlib.suppress(KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]  # what python, and multiprocessing, call at exit
    atexit._run_exitfuncs()
    _finalise(imported)
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    ctypes.CDLL(None).fflush(None)
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _finalise(imported: Collection[str]) -> None:
    """Drop the script and what it imported: open files are written out, and `__del__` is called."""
    # Both are quick, because what the zygote had made is frozen. Files come first: one that is found as part of a
    # cycle may be closed from the inside out, and lose what it holds.
    for thing in gc.get_objects():
        if issubclass(type(thing), io.TextIOWrapper | io.BufferedWriter):
            _flush(thing)
    for name in [name for name in sys.modules if name == "__main__" or name not in imported]:
        del sys.modules[name]
    gc.collect()


def _flush(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, or None
        stream.flush()
