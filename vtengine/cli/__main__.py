"""`python -m vtengine.cli` is `vtengine`."""

import sys

from vtengine.cli.command import main

sys.exit(main())
