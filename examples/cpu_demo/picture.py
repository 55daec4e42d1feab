"""Draw the README's picture: two answers, each token with its entropy, its colour and its weight in the loss.

The numbers come from a folder that 'entropy-fork analyze' wrote. Kept is the exact top ρ of all tokens of all answers.
The weights are those that training would give with the whole folder as one mini-batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import numpy as np
import torch
import typer

from entropy_fork.core.rule import TOKEN_MEAN
from entropy_fork.core.weighting import token_weights
from entropy_fork.tokens.store import AnswerTokens, read_answers, read_manifest

WIDTH, LEFT, CHARACTER, GAP = 880, 148, 10.3, 4
TALLEST, NATS = 52, 1.25  # the bar of so many nats
STYLE = """
  svg { --paper: #ffffff; --line: #d0d7de; --ink: #1f2328; --faint: #59636e; --warm: #f58a2c; --hot: #a8430b }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --line: #3d444d; --ink: #f0f6fc; --faint: #9198a1; --warm: #d9691c; --hot: #ffa657 }
  }
  text { font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: var(--ink) }
  .token { font: 17px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; white-space: pre }
  .faint { fill: var(--faint) } .hot { fill: var(--hot) } .bold { font-weight: 700 }
  .middle { text-anchor: middle } .end { text-anchor: end }
"""


def answer_of(answer: AnswerTokens, weights: np.ndarray, threshold: float, top: float) -> list[str]:
    """One answer as SVG: its entropies as bars, its tokens, their weights."""
    base = top + TALLEST
    line = base - TALLEST * threshold / NATS
    verdict = "right" if answer.score == 1 else "wrong"
    parts = [
        f'<text class="faint end" x="{LEFT - 16}" y="{base - 4}">entropy, nats</text>',
        f'<text class="bold end" x="{LEFT - 16}" y="{base + 22}">{verdict}, reward {answer.score:.0f}</text>',
        f'<text class="faint end" x="{LEFT - 16}" y="{base + 47}">weight in loss</text>',
    ]
    x = float(LEFT)
    for piece, entropy, weight in zip(answer.pieces, answer.entropy, weights, strict=True):
        text = "end" if piece.startswith("<|") else piece.strip()
        letters, style = len(text) * CHARACTER, "token bold" if weight else "token faint"
        width, middle = letters + 6, x + letters / 2 + 3
        height = TALLEST * min(entropy, NATS) / NATS
        shade = 0.06 + 0.94 * min(entropy, NATS) / NATS
        parts += [
            f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="var(--warm)"/>',
            f'<rect x="{x:.1f}" y="{base + 2}" width="{width:.1f}" height="28" rx="4" fill="var(--warm)" '
            f'fill-opacity="{shade:.2f}"/>',
            f'<text class="{style}" x="{x + 3:.1f}" y="{base + 22}" textLength="{letters:.1f}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text>',
            f'<text class="middle {"hot bold" if weight else "faint"}" x="{middle:.1f}" y="{base + 47}">'
            f"{weight:.2g}</text>",
        ]
        x += width + GAP
    return [
        *parts,
        f'<path d="M{LEFT} {line:.1f}H{x:.1f}" stroke="var(--hot)" stroke-dasharray="4 4"/>',
        f'<text class="hot" x="{x + 4:.1f}" y="{line + 4:.1f}">τ</text>',
    ]


def main(
    tokens: Annotated[Path, typer.Option(help="Written by 'entropy-fork analyze --prompts'.")],
    answers: Annotated[tuple[int, int], typer.Option(help="Two answers to one question.")] = (259, 515),
    output: Annotated[Path, typer.Option(help="The SVG. The README's is docs/pictures/forking_tokens.svg.")] = Path(
        "forking_tokens.svg"
    ),
) -> None:
    """Draw two answers of a folder."""
    manifest = read_manifest(tokens)
    everything = list(read_answers(tokens))
    kept = torch.from_numpy(np.concatenate([answer.selected for answer in everything]))
    lengths = torch.tensor([len(answer.token_ids) for answer in everything])
    weights = token_weights(kept, torch.ones_like(kept), lengths, TOKEN_MEAN).split(lengths.tolist())

    shown = [everything[number] for number in answers]
    question = shown[0].prompt.removeprefix("User:\n").removesuffix("\nAssistant:\n")
    notes = (
        "Where the model hesitates, an answer can go another way. These tokens alone are trained on: of the",
        f"{len(kept):,} tokens of {len(everything):,} answers exactly ⌈{manifest['top_ratio']:g} · N⌉ = "
        f"{int(kept.sum()):,}, whose entropy is at least τ = {manifest['threshold']:.3f}.",
    )
    height = 356
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>Two answers to one question; the policy gradient is taken on the tokens of highest entropy</title>"
        f"<style>{STYLE}</style>",
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="var(--paper)" '
        f'stroke="var(--line)"/>',
        f'<text class="faint end" x="{LEFT - 16}" y="34">question</text>',
        f'<text class="token" style="font-size:15px" x="{LEFT}" y="34">{escape(question)}</text>',
    ]
    for number, answer in enumerate(shown):
        top = 52 + number * 128
        parts += answer_of(answer, weights[answers[number]].numpy(), manifest["threshold"], top)
    for number, note in enumerate(notes):
        parts.append(f'<text class="faint" x="{LEFT}" y="{height - 38 + 20 * number}">{escape(note)}</text>')
    parts.append("</svg>")
    output.write_text("\n".join(parts) + "\n", encoding="utf-8")
    typer.echo(f"written: {output}, with the answers {answers[0]} and {answers[1]} of {tokens}")


if __name__ == "__main__":
    typer.run(main)
