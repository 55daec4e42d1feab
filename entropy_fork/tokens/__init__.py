"""Response tokens on disk with their entropies: training writes them, analysis and report read them."""
