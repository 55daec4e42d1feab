r"""Scores of your own: functions that say which tokens matter. Name one on the command line, in this clone's folder:

    python -m verl.trainer.main_ppo <your own command line> \
        +entropy_fork=global entropy_fork.score=examples.own_score:early_forks

The names of the parameters are the fields to read (docs/reference/scores.md). Each is a flat float tensor with one
number per token, and so is the result. The tokens with the highest numbers are kept.
"""

from torch import Tensor


def early_forks(entropy: Tensor, position: Tensor, length: Tensor) -> Tensor:
    """The entropy, times the share of the response that is still to come: a fork at the end decides little."""
    return entropy * (1 - position / length)


def above_reference(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """How far the log-probability of the token is above the reference policy's. A run without one is refused."""
    return log_prob - ref_log_prob
