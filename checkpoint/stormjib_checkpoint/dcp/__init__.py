"""For scripts that use torch.distributed.checkpoint (DCP): the arguments that it knows, and files of ours behind them.

    dcp.async_save(state, checkpoint_id=folder, storage_writer=StormjibWriter(), async_stager=GatedStager())
    dcp.load(state, checkpoint_id=folder, storage_reader=StormjibReader())

A `checkpoint_id` is a root of ours. What is saved there first is step 0, and each later save the step after: nothing is written over, the
newest two are kept, and the newest is loaded. DCP pickles what its ranks tell each other; no file holds a pickle, and none is read.
"""

from stormjib_checkpoint.dcp.reader import StormjibReader
from stormjib_checkpoint.dcp.stager import GatedStager
from stormjib_checkpoint.dcp.writer import StormjibWriter

__all__ = ["GatedStager", "StormjibReader", "StormjibWriter"]
