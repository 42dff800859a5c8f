"""Saving while training goes on: copied to memory during the next forward and backward, hashed and written behind it.

After DataStates-LLM (HPDC'24): parameters and optimizer state do not change between two optimizer steps, so they are copied then,
and only the next optimizer step waits, if it comes too early.
"""

from stormjib_checkpoint.engine.engine import Engine
from stormjib_checkpoint.engine.saving import Figures, Save
from stormjib_checkpoint.engine.totals import Sums, Totals

__all__ = ["Engine", "Figures", "Save", "Sums", "Totals"]
