"""Response tokens on disk with their entropies. Training and analysis write them, analysis and report read them."""
