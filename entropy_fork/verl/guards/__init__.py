"""What looks after a long run: checkpoints that are whole, data files, waits that never end."""
