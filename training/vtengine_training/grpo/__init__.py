"""Group-relative policy optimisation, pure: advantages, losses, metrics. Nothing here knows a model or a file."""
