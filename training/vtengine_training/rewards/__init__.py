"""What an episode is worth: accuracy, format, and the penalty that makes looking twice cost something."""
