"""A port for files in front of another one: a test sees each call before it is done, and may fail it, change it, or never let it return."""

from __future__ import annotations

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from stormjib_checkpoint.files import Files


class Call(NamedTuple):
    """One call of the port. `path` is also known of descriptors: what they were opened by."""

    name: str
    path: str
    arguments: tuple[Any, ...]

    def is_a(self, name: str, path: str = "*") -> bool:
        """Whether it is such a method, on such a path."""
        return fnmatchcase(self.name, name) and fnmatchcase(self.path, path)


Hook = Callable[[Call, Callable[..., Any]], Any]
"""Gets a call and what does it, with arguments of the hook's choice."""


def watched(files: Files, hook: Hook) -> Files:
    """`files`, each call of which goes through `hook`."""
    return cast("Files", _Watched(files, hook))


class _Watched:
    def __init__(self, files: Files, hook: Hook) -> None:
        self._files, self._hook = files, hook
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        do = getattr(self._files, name)

        def call(*arguments: Any) -> Any:
            first = arguments[0]
            path = self._paths.get(first, "") if isinstance(first, int) else first
            result = self._hook(Call(name, path, arguments), do)
            if name.startswith("open_"):
                self._paths[result] = path
            return result

        return call


class Failing:
    """A hook: from the `first` call that is meant on, `times` of them fail with `error`. `fired` counts those that did."""

    def __init__(self, name: str, path: str, error: int, first: int = 1, times: int = 1) -> None:
        self.fired = 0
        self._meant, self._error = (name, path), error
        self._from, self._times, self._seen = first, times, 0

    def __call__(self, call: Call, do: Callable[..., Any]) -> Any:
        if call.is_a(*self._meant):
            self._seen += 1
            if self._from <= self._seen < self._from + self._times:
                self.fired += 1
                if call.name == "close":
                    do(*call.arguments)  # what fails to close is closed all the same
                raise OSError(self._error, os.strerror(self._error), call.path)
        return do(*call.arguments)
