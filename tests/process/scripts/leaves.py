"""Leaves to python's exit what careful scripts do themselves: an open file, objects with `__del__`, a cycle."""

import sys


class Late:
    def __init__(self, name: str) -> None:
        self.name = name
        self.itself = self

    def __del__(self) -> None:
        print("finalised", self.name, file=sys.stderr)


late = Late("a global")
file = open(sys.argv[1], "w")  # noqa: SIM115  never closed, on purpose
file.write("written at exit")


def use() -> Late:
    return late
