"""A run that can be read: one line per step instead of everything that verl prints.

Read in this order: ``output`` (what a line of verl's output says), ``view`` (what is shown of it), ``follow`` (the same
from a file: ``entropy-fork watch``). ``entropy_fork/verl/terminal.py`` puts the view on a launcher's terminal.
"""
