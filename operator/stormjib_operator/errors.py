"""Errors of the operator.

StormjibOperatorError
├── ApiError                 the API server said no, or nothing
│   ├── Refused              it understood and will not: quota, admission, invalid, forbidden
│   ├── Conflict             the object has changed, or exists already
│   └── Unreachable          no answer, or one that says: later
├── CoordinatorError         the coordinator's answer cannot be used
└── SettingsError            the operator's own environment is wrong
"""

from __future__ import annotations


class StormjibOperatorError(Exception):
    """Base of all errors of this package."""


class ApiError(StormjibOperatorError):
    """The API server said no, or nothing. `code` is the HTTP status, 0 where there was none."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Refused(ApiError):
    """The request was understood and will not be carried out: quota, admission, invalid, forbidden."""


class Conflict(ApiError):
    """The object has changed since it was read, or exists already."""


class Unreachable(ApiError):
    """No answer, or one that says: later."""


class CoordinatorError(StormjibOperatorError):
    """The coordinator did not answer, or not in a form that can be used."""


class SettingsError(StormjibOperatorError):
    """The operator's environment lacks something, or holds a value that makes no sense: names the variable."""
