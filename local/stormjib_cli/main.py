"""`stormjib`: one command line whose sub-commands each part registers itself.

A part adds itself by an entry point in the group `stormjib.commands` (a typer app). A part that is not installed in
this image simply is not there; one that is there but lacks a dependency says so and which extra brings it.
"""

from __future__ import annotations

import typing
from importlib.metadata import entry_points

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Stormjib keeps a training job training.")


@app.callback()
def root() -> None:
    """Stormjib keeps a training job training."""


def load() -> typer.Typer:
    """The app with every installed part's sub-commands."""
    for entry in sorted(entry_points(group="stormjib.commands"), key=lambda e: e.name):
        try:
            app.add_typer(entry.load(), name=entry.name)
        except ModuleNotFoundError as error:
            app.command(entry.name, help=f"not available: {error}")(_missing(error))
    return app


def _missing(error: ModuleNotFoundError) -> typing.Callable[[], None]:
    def command() -> None:
        raise typer.BadParameter(f"{error}. Install the part that brings it.")

    return command


def main() -> None:
    """Entry point of the `stormjib` command."""
    load()()
