"""One of several ranks that meet, and then wait for each other as a GPU does: without looking. argv: what each does."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from vtengine_training.trainer import watch
from vtengine_training.trainer.ranks import Ranks

watch.GRACE_S = 1.0
ranks = Ranks.join(torch.device("cpu"), 600)
assert ranks.watch is not None
what = sys.argv[1 + ranks.rank]
time.sleep(1)  # the others may still be reading what this one has said
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fails":
    ranks.leave(in_order=False)
    sys.exit(3)
if what == "leaves late":
    time.sleep(3)
if what == "waits":
    time.sleep(600)
ranks.leave()
sys.exit(0)
