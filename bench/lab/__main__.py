"""`python -m bench.lab clean`: remove what laboratories left that were killed."""

import sys

from bench.lab import cleaning

if sys.argv[1:] != ["clean"]:
    sys.exit("usage: python -m bench.lab clean")
for name in cleaning.stale():
    cleaning.remove(name)
    print(f"removed {name}")
