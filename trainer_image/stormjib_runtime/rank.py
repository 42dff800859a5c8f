"""What a training script may import of the runtime: its page, nothing else. Importing this installs nothing."""

from __future__ import annotations

from functools import cache

from stormjib_runtime.page import Page


@cache
def page() -> Page | None:
    """This rank's page, or None where no agent runs the script (plain `python`, or plain torchrun)."""
    return Page.from_env()
