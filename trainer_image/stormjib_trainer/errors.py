"""What can go wrong in the trainer, as a tree:

TrainerError
├── ConfigError       a key, a value or a combination in the configuration is wrong; names the knob
├── DataError         there is no text, or too little of it
├── ResumeMismatch    the checkpoint belongs to another run (other data, batch, model); names what differs
├── ResumeFailed      the resume point cannot be loaded; an agent has to choose an older one
└── CorruptedStep     the numbers of a step are wrong, and doing it again did not help; it was not applied
    └── RolledBack    the steps before it are in doubt too: the next generation resumes before them
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of all errors of this package. The message says what is wrong, where, and what to do."""


class ConfigError(TrainerError):
    """The configuration is wrong."""


class DataError(TrainerError):
    """The text cannot be used."""


class ResumeMismatch(TrainerError):
    """The checkpoint was written by a run that differs in something that must not change."""


class ResumeFailed(TrainerError):
    """The resume point cannot be loaded, although the run is the same."""


class CorruptedStep(TrainerError):
    """Loss or gradient cannot be right, twice. The step was not applied, and nothing is saved."""


class RolledBack(CorruptedStep):
    """The state cannot be trusted any more. Nothing is saved; all ranks leave, and an older step is resumed."""
