"""Steps with a clock of its own, and saves and stops where its page says."""

import sys
import time

from stormjib_runtime import rank
from stormjib_runtime.wire import EXIT_STOPPED, RankPhase

page = rank.page()
if page is None:
    sys.exit("no page")
page.owns_clock = page.listens = True
page.phase = RankPhase.STEP
step = 0
while not 0 < page.stop_after <= step:
    time.sleep(0.01)
    step += 1
    page.loss, page.step = 1 / step, step
page.saved = step
print("stopped after", step, page.stop_after, flush=True)
sys.exit(EXIT_STOPPED)
