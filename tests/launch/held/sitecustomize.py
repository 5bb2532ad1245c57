"""Holds ranks of pre-training before their first step, for tests that end a job at that moment.

With this folder in PYTHONPATH, a rank that starts while the file ``APOLLO_TEST_HOLD`` exists waits until it is removed.
"""

import os
import sys
import time

_hold = os.environ.get("APOLLO_TEST_HOLD")
# Ranks alone: their launchers have the same words later in their command lines.
if _hold and "RANK" in os.environ and "apollo_dist.pretrain" in sys.orig_argv[:4]:
    while os.path.exists(_hold):
        time.sleep(0.1)
