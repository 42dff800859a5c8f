"""`python -m stormjib_trainer [--config FILE.toml] [--set section.key=value ...]`, under any launcher or none."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stormjib_trainer import config, environment
from stormjib_trainer.errors import CorruptedStep, TrainerError

EXIT_FAILED = 1
EXIT_USAGE = 2
"""Another try would end the same."""


def main(arguments: list[str] | None = None) -> int:
    """Run one rank; the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m stormjib_trainer", description="Train a small Llama on bytes."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML; without it, the defaults")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one value"
    )
    options = parser.parse_args(arguments)
    try:
        settings = config.load(options.config, options.set)
        from stormjib_trainer.loop import train  # torch is imported only when the configuration is sound

        return train(settings, environment.read())
    except TrainerError as error:
        print(f"stormjib_trainer: {error}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, CorruptedStep) else EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
