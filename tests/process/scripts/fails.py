"""Says something on both streams and fails at once. Imports no torch."""

import os
import sys

print("about to fail in generation", os.environ["STORMJIB_GENERATION"])
print("the reason why", file=sys.stderr)
sys.exit(7)
