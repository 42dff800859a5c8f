"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# Of an example's wall time nothing follows on a machine that others use too; pytest's own time-out ends what hangs.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
