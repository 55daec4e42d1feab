"""Guards of a long run: resume from whole checkpoints only, check the data files, stop a wait that cannot end."""
