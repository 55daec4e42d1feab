"""Show which tokens of a tiny model's answers have the highest entropy, and how many of them are the task's choices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from examples.tiny_world import Rollout, roll_out

STYLES = ("bold white on red", "black on yellow")
"""Of the kinds of choices, in their order."""

NO_CHOICE_STYLE = "black on cyan"


class Choice(Protocol):
    """The characters ``start:end`` of an answer that were chosen, and what kind of choice that is."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def kind(self) -> Enum: ...


FindChoices = Callable[[str], Sequence[Choice]]
"""Finds the choices in an answer."""


@dataclass(frozen=True)
class TokenEntropy:
    """One generated token, the entropy (nats) of the distribution it was drawn from, and which choice it is if any."""

    text: str
    entropy: float
    kind: Enum | None


@torch.inference_mode()
def response_entropies(model: PreTrainedModel, rollouts: list[Rollout], pad_token_id: int) -> list[list[float]]:
    """Entropy in nats of the softmax at temperature 1, at the position that produced each response token."""
    rows = [torch.tensor(rollout.prompt_ids + rollout.response_ids) for rollout in rollouts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    # Not `input_ids != pad`: a sampled pad token is part of the response.
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    return [
        entropies[row, len(rollout.prompt_ids) - 1 : len(rollout.prompt_ids) + len(rollout.response_ids) - 1].tolist()
        for row, rollout in enumerate(rollouts)
    ]


def label_tokens(
    tokenizer: PreTrainedTokenizerBase, find_choices: FindChoices, rollout: Rollout, entropies: list[float]
) -> list[TokenEntropy]:
    """Join the tokens of a response with their entropies and with the choices found in its text.

    A token is a choice if it is the first that contains characters of the choice. Further tokens of the same choice
    only spell it.
    """
    texts = [tokenizer.decode([token]) for token in rollout.response_ids]
    offsets = list(pairwise(accumulate(map(len, texts), initial=0)))
    kinds: dict[int, Enum] = {}
    for choice in find_choices(rollout.text):
        position = next((i for i, (_, end) in enumerate(offsets) if end > choice.start), None)
        if position is not None:
            kinds[position] = choice.kind
    return [
        TokenEntropy(text, entropy, kinds.get(position))
        for position, (text, entropy) in enumerate(zip(texts, entropies, strict=True))
    ]


def entropy_threshold(responses: list[list[TokenEntropy]], top: float) -> float:
    """The entropy that the `top` share of all tokens of the batch reaches."""
    entropies = torch.tensor([token.entropy for response in responses for token in response])
    return torch.quantile(entropies, 1 - top).item()


def token_table(responses: list[list[TokenEntropy]], min_count: int, rows: int) -> Table:
    """The token strings of highest mean entropy among those seen often enough."""
    seen: dict[str, list[TokenEntropy]] = defaultdict(list)
    for response in responses:
        for token in response:
            seen[token.text].append(token)
    means = {
        text: sum(token.entropy for token in tokens) / len(tokens)
        for text, tokens in seen.items()
        if len(tokens) >= min_count
    }
    table = Table("token", "mean entropy", "seen", "as a choice", title=f"Tokens seen at least {min_count} times")
    for text in sorted(means, key=means.__getitem__, reverse=True)[:rows]:
        tokens = seen[text]
        chosen = sum(token.kind is not None for token in tokens) / len(tokens)
        table.add_row(Text(repr(text)), f"{means[text]:.3f}", str(len(tokens)), f"{chosen:.0%}")
    return table


def share_table(responses: list[list[TokenEntropy]], threshold: float, top: float, kinds: Sequence[Enum]) -> Table:
    """For each kind of choice: its share of the kept tokens and of all tokens, and how much of it is kept."""
    tokens = [token for response in responses for token in response]
    kept = [token for token in tokens if token.entropy >= threshold]
    table = Table(
        "kind",
        f"of the top {top:.0%}",
        "of all tokens",
        "kept",
        "mean entropy",
        title=f"Threshold {threshold:.3f} nats",
    )

    def add(label: str, wanted: Sequence[Enum | None]) -> None:
        of_kind = [token for token in tokens if token.kind in wanted]
        of_kept = [token for token in kept if token.kind in wanted]
        mean = sum(token.entropy for token in of_kind) / max(1, len(of_kind))
        table.add_row(
            label,
            f"{len(of_kept) / len(kept):.1%}",
            f"{len(of_kind) / len(tokens):.1%}",
            f"{len(of_kept) / max(1, len(of_kind)):.1%}",
            f"{mean:.3f}",
        )

    for kind in kinds:
        add(f"{kind.value} chosen", [kind])
    if len(kinds) > 1:
        add("any of these", kinds)
    add("anything else", [None])
    return table


def coloured(response: list[TokenEntropy], threshold: float, styles: dict[Enum | None, str]) -> Text:
    """A response with the kept tokens highlighted in the colour of their kind."""
    text = Text()
    for token in response:
        text.append(token.text, style=styles[token.kind] if token.entropy >= threshold else "dim")
    return text


def command(find_choices: FindChoices, kinds: Sequence[Enum]) -> Callable[..., None]:
    """The command that measures a task's model, for typer.

    Args:
        find_choices: finds the choices in an answer.
        kinds: the kinds of choices that it finds.
    """
    styles: dict[Enum | None, str] = {**dict(zip(kinds, STYLES, strict=False)), None: NO_CHOICE_STYLE}

    def main(
        model: Annotated[Path, typer.Option(help="The model directory, with its tokenizer.")],
        data: Annotated[Path, typer.Option(help="A parquet file of problems.")],
        top: Annotated[float, typer.Option(min=0.01, max=1, help="Share of tokens of highest entropy to keep.")] = 0.2,
        min_count: Annotated[int, typer.Option(min=1, help="Leave rarer tokens out of the table.")] = 30,
        rows: Annotated[int, typer.Option(min=1, help="Rows of the token table.")] = 30,
        examples: Annotated[int, typer.Option(min=0, help="Answers to print.")] = 5,
        seed: int = 0,
    ) -> None:
        """Measure the entropy of each sampled token and compare the top tokens with the choices of the task."""
        set_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        language_model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        ).eval()
        prompts = [messages[-1]["content"] for messages in Dataset.from_parquet(str(data))["prompt"]]
        rollouts = roll_out(language_model, tokenizer, prompts)
        entropies = response_entropies(language_model, rollouts, tokenizer.pad_token_id)
        responses = [label_tokens(tokenizer, find_choices, *pair) for pair in zip(rollouts, entropies, strict=True)]
        threshold = entropy_threshold(responses, top)

        console = Console()
        console.print(token_table(responses, min_count, rows))
        console.print(share_table(responses, threshold, top, kinds))
        for prompt, response in list(zip(prompts, responses, strict=True))[:examples]:
            console.print(Text(f"\n{prompt}", style="italic"))
            console.print(coloured(response, threshold, styles))
        if examples:
            legend = Text("\nkept: ")
            for kind, style in styles.items():
                legend.append(f" {kind.value if kind else 'other'} ", style=style).append(" ")
            console.print(legend)

    return main
