"""Everything this package raises on purpose.

LocalError
├── NotRoot            the cluster needs namespaces, mounts and cgroups
├── BadRequest         a name, number or path that cannot work
├── ToolMissing        a binary could be neither found, downloaded nor built
├── CommandFailed      a program that we ran ended with an error
├── ApiError           the API server refused or did not answer
└── Timeout            something did not happen before its deadline
"""

from __future__ import annotations


class LocalError(Exception):
    """Root of the tree; its text is meant for the person at the terminal."""


class NotRoot(LocalError):
    """The caller is not root."""


class BadRequest(LocalError):
    """The request names something that cannot work, and the text says what would."""


class ToolMissing(LocalError):
    """A binary could be neither found, downloaded nor built."""


class CommandFailed(LocalError):
    """A program ended with an error; the text holds its last lines."""


class ApiError(LocalError):
    """The API server refused (`status` is the HTTP code) or could not be reached (`status` is 0)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Timeout(LocalError):
    """A condition did not become true before its deadline."""
