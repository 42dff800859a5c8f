"""What `python -m package` runs."""

import sys

from . import __doc__ as words

print(__name__, __file__, __package__, __spec__, sys.argv, sys.path[0], words)
if len(sys.argv) > 1:
    raise ValueError("inside a module")
