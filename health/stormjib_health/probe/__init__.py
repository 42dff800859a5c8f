"""The probe: lives in a rank, sees every call on every process group through torch's own hooks, and records it.

It is installed before the script (`probe.install`), without its help. What a script may add is here, and needs no torch:
torch shows the optimizer, compilation and its own loader, but not what a loop calls a checkpoint or an evaluation.
"""

from __future__ import annotations

from stormjib_health.probe.current import enter, phase, tell

__all__ = ["enter", "phase", "tell"]
