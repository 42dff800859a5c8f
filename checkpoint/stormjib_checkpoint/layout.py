"""Names under the root of a job: the only place that makes or reads them.

step-00001200/g2.7/{rank-00003.safetensors, rank-00003.json, atoms.json, train.json, MANIFEST.json}
generations/g2.7.json
doubts/g2.7.json
hints/g2.7.json
ledger/g2.7/00001101-00001200.jsonl
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MANIFEST = "MANIFEST.json"
ATOMS = "atoms.json"
TRAIN = "train.json"
GENERATIONS = "generations"
DOUBTS = "doubts"
HINTS = "hints"
LEDGER = "ledger"

_NUMBER = r"(0|[1-9][0-9]{0,17})"
_GENERATION = re.compile(rf"{_NUMBER}\.{_NUMBER}")
_STEP = re.compile(r"step-([0-9]{8,18})")
_LEDGER = re.compile(r"([0-9]{8,18})-([0-9]{8,18})\.jsonl")
_RANK = re.compile(r"rank-([0-9]{5,9})\.json")


@dataclass(frozen=True, order=True)
class GenerationId:
    """(incarnation, number): only ever grows. Written `2.7`, in paths `g2.7`."""

    incarnation: int
    number: int

    def __str__(self) -> str:
        return f"{self.incarnation}.{self.number}"

    @staticmethod
    def parse(text: str) -> GenerationId:
        """Read `2.7`. Raises ValueError on anything else, leading zeros included: one generation, one name."""
        match = _GENERATION.fullmatch(text)
        if match is None:
            raise ValueError(f"generation {text[:40]!r} is not of the form INCARNATION.NUMBER, such as 2.7")
        return GenerationId(int(match[1]), int(match[2]))

    def next(self) -> GenerationId:
        """The generation that a script without a coordinator takes after this one."""
        return GenerationId(self.incarnation, self.number + 1)


def step_folder(step: int) -> str:
    """`step-00001200`; a step of more than eight digits just gets longer."""
    return f"step-{step:08d}"


def folder(step: int, generation: GenerationId) -> str:
    """Where one generation's save of one step lies."""
    return f"{step_folder(step)}/g{generation}"


def rank_data(rank: int) -> str:
    """Name of a rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def rank_json(rank: int) -> str:
    """Name of a rank's record, written after its tensors."""
    return f"rank-{rank:05d}.json"


def manifest(step: int, generation: GenerationId) -> str:
    """Path of the file that makes a step exist."""
    return f"{folder(step, generation)}/{MANIFEST}"


def generation_file(generation: GenerationId) -> str:
    """Path of the record of a generation."""
    return f"{GENERATIONS}/g{generation}.json"


def doubt_file(generation: GenerationId) -> str:
    """Path of what a generation has said against its own newest steps."""
    return f"{DOUBTS}/g{generation}.json"


def hint_file(generation: GenerationId) -> str:
    """Path of what says where to look for a generation's newest steps."""
    return f"{HINTS}/g{generation}.json"


def ledger_folder(generation: GenerationId) -> str:
    """Where the samples that a generation consumed are written down."""
    return f"{LEDGER}/g{generation}"


def ledger_file(generation: GenerationId, first: int, last: int) -> str:
    """Path of the ledger segment of steps `first` to `last`, both included."""
    return f"{ledger_folder(generation)}/{first:08d}-{last:08d}.jsonl"


def parse_step(name: str) -> int | None:
    """The step of `step-00001200`, or None where the name is something else."""
    match = _STEP.fullmatch(name)
    step = int(match[1]) if match else None
    return step if step is not None and step_folder(step) == name else None


def parse_generation(name: str) -> GenerationId | None:
    """The generation of `g2.7` or `g2.7.json`, or None."""
    text = name.removesuffix(".json")
    if not text.startswith("g") or _GENERATION.fullmatch(text[1:]) is None:
        return None
    return GenerationId.parse(text[1:])


def parse_rank(name: str) -> int | None:
    """The rank of `rank-00003.json`, or None."""
    match = _RANK.fullmatch(name)
    return int(match[1]) if match else None


def parse_ledger(name: str) -> tuple[int, int] | None:
    """(first, last) of a ledger segment's name, or None."""
    match = _LEDGER.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None
