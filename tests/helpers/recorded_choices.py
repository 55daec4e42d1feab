"""What the rules that came before scores choose, as hashes. It runs with the package of then and with today's.

``tests/core/recorded_choices.json`` was made with the last commit that knew no scores, 3ce1f4a:

    git archive 3ce1f4a entropy_fork | tar -x -C OLD
    PYTHONPATH=OLD python tests/helpers/recorded_choices.py > tests/core/recorded_choices.json
"""

from __future__ import annotations

import hashlib
import json
from random import Random

import torch
from torch import Tensor

from entropy_fork.core import responses as core
from entropy_fork.core.responses import Responses, pool_of_responses, weigh_mini_batches
from entropy_fork.core.rule import Rule, Selector

#: the presets of then, and other values of the keys of then
RULES = {
    "global": Rule(Selector(0.2)),
    "official": Rule(Selector(0.2), entropy="current", pool="micro_batch"),
    "paper_v1": Rule(Selector(0.2), entropy="current", pool="micro_batch", denominator="all"),
    "bottom80": Rule(Selector(0.8, "bottom")),
    "random20": Rule(Selector(0.2, "random")),
    "random in the batch": Rule(Selector(0.05, "random"), pool="batch"),
    "band": Rule(Selector(0.2, "band", band_from=0.1)),
    "band by threshold": Rule(Selector(0.5, "band", "threshold", 0.3)),
    "threshold": Rule(Selector(0.35, ties="threshold")),
    "bottom by threshold": Rule(Selector(0.3, "bottom", "threshold")),
    "soft": Rule(Selector(0.4), weight="soft"),
    "soft in the batch": Rule(Selector(0.4), pool="batch", weight="soft", denominator="all"),
    "soft bottom": Rule(Selector(0.6, "bottom"), pool="response", weight="soft"),
    "response": Rule(Selector(0.2), pool="response"),
    "batch": Rule(Selector(0.2), pool="batch"),
    "by sequence": Rule(Selector(0.3), loss_agg_mode="seq-mean-token-mean"),
    "summed": Rule(Selector(0.3), loss_agg_mode="token-sum"),
    "one token": Rule(Selector(0.00001)),
    "everything": Rule(Selector(1.0)),
}


def recorded_answers(seed: int, num_rows: int = 48) -> tuple[Responses, Tensor, Tensor]:
    """Answers, their mini-batches and their micro-batches: the same with any version of torch.

    Four in ten entropies are 0 or one of few values, as with a confident policy and with 16 bits. Some rows are outside
    of the response mask.
    """
    random = Random(seed)
    lengths = [random.randrange(1, 60) for _ in range(num_rows)]
    entropy, eligible = [], []
    for row, length in enumerate(lengths):
        for _ in range(length):
            few, many = random.choice([0.0, 0.0, 0.25, 1.0, 2.5]), 4 * random.random() ** 3
            entropy.append(few if random.random() < 0.4 else many)
            eligible.append(int(row % 11 != 7 and random.random() < 0.9))
    order = list(range(num_rows))
    random.shuffle(order)
    rows = Responses(
        torch.tensor(entropy, dtype=torch.float32),
        torch.tensor(eligible),
        torch.tensor(lengths),
        torch.tensor(order),
        torch.tensor([random.randrange(2**63) for _ in range(num_rows)]),
    )
    mini_batch = torch.tensor([row % 16 // 8 for row in range(num_rows)])
    micro_batch = torch.tensor([row // 5 for row in range(num_rows)])
    return rows, mini_batch, micro_batch


def kept_and_weights(rows: Responses, rule: Rule, mini_batch: Tensor, micro_batch: Tensor) -> tuple[Tensor, Tensor]:
    """The selection and the token weights, with the functions of then or with today's."""
    pool = pool_of_responses(rule.pool, mini_batch, micro_batch)
    if hasattr(core, "choose"):
        choice = core.choose(rows, pool, rule)
        return choice.kept, weigh_mini_batches(rows, choice, mini_batch, rule)
    kept, _ = core.select_in_pools(rows, pool, rule.selector)
    return kept, weigh_mini_batches(rows, kept, mini_batch, rule)  # type: ignore[arg-type]


def choices() -> dict[str, dict[str, str | int]]:
    """For each rule the number of kept tokens, and the hashes of the kept bits and of the float32 weights."""
    found: dict[str, dict[str, str | int]] = {}
    for name, rule in RULES.items():
        kept_bytes, weight_bytes, num_kept = b"", b"", 0
        for seed in range(3):
            rows, mini_batch, micro_batch = recorded_answers(seed)
            kept, weights = kept_and_weights(rows, rule, mini_batch, micro_batch)
            kept_bytes += kept.numpy().tobytes()
            weight_bytes += weights.numpy().astype("<f4").tobytes()
            num_kept += int(kept.sum())
        found[name] = {
            "num_kept": num_kept,
            "kept": hashlib.sha256(kept_bytes).hexdigest(),
            "weights": hashlib.sha256(weight_bytes).hexdigest(),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(choices(), indent=1))
