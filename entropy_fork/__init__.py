"""Entropy Fork: reinforcement learning on the forking tokens of a language model, inside an unmodified verl.

``entropy_fork.core`` is the mathematics (torch and numpy only), ``entropy_fork.verl`` is what holds on to verl.
This file imports neither: it is loaded by every process that unpickles one of our classes, often before verl is.
"""

__version__ = "0.1.0"
