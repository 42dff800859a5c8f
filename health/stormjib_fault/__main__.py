"""`python3 -m stormjib_fault`: the same as `stormjib-fault`."""

import sys

from stormjib_fault.commands import main

sys.exit(main())
