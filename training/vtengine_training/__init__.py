"""Training for vtengine: the glance world, supervised cold start, and what reinforcement learning adds on top."""
