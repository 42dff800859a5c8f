"""Everything that the runtime itself can find wrong.

RuntimeFault
├── CommandError      the command line or the environment asks for something that cannot be
├── ZygoteError       the zygote is unfit, or has gone
├── StoreError        the store of a generation did not come up
├── CheckpointError   the checkpoint child refused, failed or went away
└── CheckError        a check of this node could not be made
"""

from __future__ import annotations


class RuntimeFault(Exception):
    """Base of the runtime's own errors: the message says what is wrong, where, and what to do."""


class CommandError(RuntimeFault):
    """The command line or the environment asks for something that cannot be."""


class ZygoteError(RuntimeFault):
    """The zygote is unfit to fork ranks, or has gone. Ranks can still start by exec."""


class StoreError(RuntimeFault):
    """The store of a generation did not come up."""


class CheckpointError(RuntimeFault):
    """The checkpoint child refused a request, failed at it, or went away."""


class CheckError(RuntimeFault):
    """A check of this node could not be made; nothing is said about the node."""
