"""Runs a command in this process as `python` would have run it in a fresh one.

The command is what follows `torchrun`: a script, `-m module`, or a folder or zip file with a `__main__.py`. Modules that
are already imported stay imported; everything that a script can see of how it was started is made anew.
"""

from __future__ import annotations

import builtins
import io
import os
import runpy
import sys
import types
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING, NoReturn

from stormjib_runtime import ending
from stormjib_runtime.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Command:
    """A command that ranks run, taken apart."""

    program: str
    arguments: tuple[str, ...]
    module: bool = False
    python: bool = True

    def argv(self, python: str) -> list[str]:
        """The command line that starts it by exec. Unbuffered, as under torchrun: lines appear when they are written."""
        if not self.python:
            return [self.program, *self.arguments]
        return [python, "-u", *(["-m"] if self.module else []), self.program, *self.arguments]


def parse_command(words: Sequence[str]) -> Command:
    """What follows `torchrun`. Raises CommandError on other flags, because a flag that is ignored misleads."""
    rest = list(words)
    module = no_python = False
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        if flag in ("-m", "--module"):
            module = True
        elif flag in ("--no-python", "--no_python"):
            no_python = True
        elif flag == "--":
            break
        else:
            raise CommandError(
                f"command has flag {flag}; only -m and --no-python may stand before the program"
            )
    if not rest:
        raise CommandError("command names no program; give a script, `-m module`, or `--no-python program`")
    if module and no_python:
        raise CommandError("-m and --no-python exclude each other")
    return Command(rest[0], tuple(rest[1:]), module, not no_python)


def run(command: Command) -> NoReturn:
    """Run it as `__main__`, and end this process as python would have ended it."""
    imported = frozenset(sys.modules)
    ending.end(_exit_code(command), imported)


def _exit_code(command: Command) -> int:
    try:
        _run(command)
    except SystemExit as error:
        return ending.code_of(error)
    except BaseException as error:  # noqa: BLE001  the top of a process: whatever the script raised is shown
        return ending.show(error, without=(__file__,))
    return 0


def _run(command: Command) -> None:
    sys.orig_argv = command.argv(sys.executable)
    main = _fresh_main()
    if command.module:
        sys.argv = ["-m", *command.arguments]
        _put_first(os.getcwd())
        _run_module_as_main(command.program)
    elif os.path.isdir(command.program) or _is_archive(command.program):
        sys.argv = [command.program, *command.arguments]
        sys.path.insert(0, command.program)
        _run_module_as_main("__main__", False)
    else:
        sys.argv = [command.program, *command.arguments]
        _put_first(os.path.dirname(os.path.realpath(command.program)))
        _run_file(command.program, main)


# What `python -m` itself calls, and debuggers and profilers too; the public run_module leaves `__main__` as it was.
_run_module_as_main = runpy._run_module_as_main  # type: ignore[attr-defined]


def _run_file(path: str, main: types.ModuleType) -> None:
    main.__file__ = os.path.abspath(path)
    main.__loader__ = SourceFileLoader("__main__", main.__file__)
    main.__dict__["__cached__"] = None
    exec(_code(path), main.__dict__)  # noqa: S102  this is what the module is for


def _code(path: str) -> types.CodeType:
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as error:  # as python says it, and with its exit code
        print(
            f"{sys.executable}: can't open file {os.path.abspath(path)!r}: {_reason(error)}", file=sys.stderr
        )
        raise SystemExit(2) from None
    return compile(source, os.path.abspath(path), "exec", dont_inherit=True)


def _reason(error: OSError) -> str:
    return f"[Errno {error.errno}] {error.strerror}"


def _fresh_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    return main


def _put_first(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)


def _is_archive(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
