"""The reward: is the last ``\\boxed{}`` of an answer equal to the ground truth? verl loads ``pkg://entropy_fork.reward``."""

from entropy_fork.reward.score import compare, compute_score, last_boxed, last_boxed_span, plain_number

__all__ = ["compare", "compute_score", "last_boxed", "last_boxed_span", "plain_number"]
