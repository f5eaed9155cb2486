"""One of several ranks that meet, and then wait for each other as a GPU does: without looking. argv: a folder, what
each does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from vtengine_training.trainer import watch
from vtengine_training.trainer.ranks import Ranks

watch.GRACE_S = 4.0  # a process that fails has so long to end
ranks = Ranks.join(torch.device("cpu"), 600)
assert ranks.watch is not None
folder, what = Path(sys.argv[1]), sys.argv[2 + ranks.rank]
(folder / f"met-{ranks.rank}").touch()
while len(list(folder.glob("met-*"))) < ranks.size:  # the others may still be reading what this one has said
    time.sleep(0.01)
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "fails":
    ranks.leave(in_order=False)
    sys.exit(3)
if what == "leaves late":
    time.sleep(1)
if what == "waits":
    time.sleep(600)
ranks.leave()
sys.exit(0)
