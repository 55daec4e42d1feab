"""Which tokens are trained on, and with what weight: torch and numpy, nothing of verl.

Read in this order: ``rule`` (every choice, in words), ``selection`` (which tokens of a pool), ``weighting`` (the factor
on each), ``responses`` (both, for the pools and mini-batches of a batch), ``schedule`` (ρ over time), ``tally`` (what
was kept), ``ranks`` (the same on any number of them). Beside them: ``returns``, the forms of Ψ_t, which the weight is
multiplied with; ``lm_head``, where entropies come from, and the LM head at chosen positions. ``identity`` says who a
row is, for ties and draws; ``randomness`` and ``flat`` are small tools of these.

Tensors of this package are *flat*: the response tokens of all rows behind one another, as in the ``values()`` of a
jagged nested tensor, with ``lengths`` saying how many belong to each row. Nothing is padded, so a batch costs what its
tokens cost, and there is no padding that could leak into a quantile.
"""

from entropy_fork.core.rule import Rule, Selector
from entropy_fork.core.selection import Selection, select_tokens
from entropy_fork.core.weighting import token_weights

#: what a loop of one's own needs: examples/quickstart.py
__all__ = ["Rule", "Selection", "Selector", "select_tokens", "token_weights"]
