"""The method: choose the tokens to train on, and weigh them. It uses torch and numpy only, nothing of verl.

Read the modules in this order. ``rule`` lists every choice, in words. ``scores`` lists what tokens can be ranked by.
``selection`` keeps a share of the tokens of one pool. ``weighting`` computes the weight of each token. ``responses``
does both for all pools and mini-batches of a batch. ``schedule`` changes ρ over the training steps. ``tally`` counts
what was kept. ``ranks`` makes the selection the same on any number of ranks.

More about scores: ``scoring`` computes one for a batch, and tries a user's own before a run. ``where`` reads a
condition, which says what tokens are in a pool at all. ``factors`` makes weights, advantages or clip ranges of a score.
``observed`` compares other scores with the one that is trained on. ``user_function`` imports a user's own.

The others: ``returns`` computes Ψ_t, the factor that the weight is multiplied with. ``entropy`` computes entropies from
logits, and ``lm_head`` computes logits at chosen positions only. ``identity`` names each row of a batch, for ties and
random draws. ``randomness`` and ``flat`` are small tools.

Tensors of this package are *flat*: the response tokens of one row follow those of another, as in the ``values()`` of a
jagged nested tensor, and ``lengths`` says how many belong to each row. There is no padding: it would cost memory and
time, and could get into a quantile.
"""

from entropy_fork.core.rule import Rule, Selector
from entropy_fork.core.selection import Selection, select_tokens
from entropy_fork.core.weighting import token_weights

#: what your own training loop needs; see examples/quickstart.py
__all__ = ["Rule", "Selection", "Selector", "select_tokens", "token_weights"]
