"""Forking tokens in a training loop of your own: entropies, kept tokens, weights, loss. No verl, no GPU, no model.

    python examples/quickstart.py

Random numbers stand in for a model's logits. Steps 1 to 4 are what you copy into your loop.
"""

import math

import torch

from entropy_fork.core import Rule, Selector, select_tokens, token_weights

# A batch as most trainers have it: four answers of different lengths, padded on the right. In the third answer, four
# tokens are a tool's output. The response mask is True at the tokens that the policy itself wrote.
torch.manual_seed(0)
mask = torch.arange(30) < torch.tensor([12, 30, 17, 21])[:, None]
mask[2, 5:9] = False
logits = (torch.randn(4, 30, 100) * torch.rand(4, 30, 1) * 6).requires_grad_()  # (answers, positions, vocabulary)
advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])  # one for each answer
lengths = torch.full((len(mask),), mask.shape[1])  # positions of each answer, padding included: the mask excludes it

# 1. The entropy of each next-token distribution in nats, and the log-probability of the token that was drawn.
policy = torch.distributions.Categorical(logits=logits)
entropy, log_prob = policy.entropy().detach(), policy.log_prob(policy.sample())

# 2. Keep the 20% of the response tokens that have the highest entropy: exactly ⌈0.2 N⌉ of N.
rule = Rule(Selector(top_ratio=0.2))
selection = select_tokens(entropy.flatten(), mask.flatten(), lengths, rule.selector)

# 3. Weigh: 0 for a dropped token, N / kept for a kept one, so that a mean over N becomes a mean over the kept tokens.
weights = token_weights(selection.kept, mask.flatten(), lengths, rule.loss_agg_mode, rule.denominator)
kept, weights = selection.kept.view_as(mask), weights.view_as(entropy)

# 4. The usual policy-gradient loss, with one more factor.
loss = -(weights * advantages[:, None] * log_prob)[mask].sum() / mask.sum()
loss.backward()

share, count = rule.selector.top_ratio, selection.num_kept
print(f"kept {count} of {selection.num_tokens} response tokens: ⌈{share} · {selection.num_tokens}⌉ = "
      f"{math.ceil(share * selection.num_tokens)}, entropy at least τ = {selection.threshold:.3f} nats")  # fmt: skip
for number in range(len(mask)):
    signs = zip(mask[number].tolist(), kept[number].tolist(), strict=True)
    print(f"answer {number + 1}:", "".join("#" if kept else "." if own else " " for own, kept in signs).rstrip())
print(f"weight of a kept token {weights[kept].mean():.4f}, of a dropped one {weights[~kept].max():g}")
print(f"loss {loss:.4f}, mean over the kept tokens {-(advantages[:, None] * log_prob)[kept].mean():.4f}")
size = logits.grad.abs().sum(dim=-1)
print(f"positions with a gradient: {(size > 0).sum()}; largest gradient at a dropped one: {size[~kept].max():g}")
