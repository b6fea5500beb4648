"""Training: the settings of a run, its optimisers, what saves memory, and the one loop."""
