"""A task with known forks that a tiny model learns on two CPU cores: build it, train on it, look at its forks."""
