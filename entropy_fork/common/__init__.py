"""What every room uses and what imports nothing of ours: errors, whole files, foreign text, progress, recipes."""
