"""Longer studies: whether the choice of tokens matters, and how noisy each form of the policy gradient is."""
