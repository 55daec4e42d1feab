"""Sample answers from the tiny model, and score them as the reward does."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_fork.reward import compute_score
from examples.cpu_demo.world import Problem, check_chain

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Rollout:
    """One sampled response, with the token ids the model saw and produced (the response's end in eos)."""

    prompt_ids: list[int]
    response_ids: list[int]
    text: str


@dataclass(frozen=True)
class Score:
    """Averages over rollouts."""

    accuracy: float
    right_arithmetic: float
    within_rules: float
    mean_tokens: float
    finished: float

    as_dict = asdict


def is_correct(response: str, ground_truth: str) -> bool:
    """Whether the reward of the training is 1."""
    return compute_score("cpu_demo", response, ground_truth)["acc"] == 1.0


@torch.inference_mode()
def roll_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], *, greedy: bool = False
) -> list[Rollout]:
    """Answer every question once, at temperature 1 over the whole vocabulary unless `greedy`."""
    conversations = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    # top_k=0: the library's own default would cut the distribution whose entropy is of interest.
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    rollouts = []
    width = batch["input_ids"].shape[1]
    for prompt_ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], output, strict=True):
        response_ids = row[width:].tolist()
        if tokenizer.eos_token_id in response_ids:
            response_ids = response_ids[: response_ids.index(tokenizer.eos_token_id) + 1]
        text = tokenizer.decode(response_ids, skip_special_tokens=True)
        rollouts.append(Rollout(prompt_ids[mask.bool()].tolist(), response_ids, text))
    return rollouts


def score(problems: list[Problem], rollouts: list[Rollout], eos_token_id: int) -> Score:
    """Judge one rollout per problem."""
    checks = [check_chain(problem, rollout.text) for problem, rollout in zip(problems, rollouts, strict=True)]
    count = len(rollouts)
    return Score(
        accuracy=sum(is_correct(r.text, str(p.answer)) for p, r in zip(problems, rollouts, strict=True)) / count,
        right_arithmetic=sum(check.arithmetic for check in checks) / count,
        within_rules=sum(check.rules for check in checks) / count,
        mean_tokens=sum(len(rollout.response_ids) for rollout in rollouts) / count,
        finished=sum(rollout.response_ids[-1] == eos_token_id for rollout in rollouts) / count,
    )
