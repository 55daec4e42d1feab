"""Compute a score, and the condition ``where``, for the tokens of a batch; and try a user's own before a run starts.

The result does not depend on the order of the responses: a function that looks at one token at a time cannot see it,
and :func:`try_out` refuses any other function that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fork.core.flat import gather, groups, pieces, row_slices, scatter
from entropy_fork.core.randomness import drawn
from entropy_fork.core.scores import Score
from entropy_fork.core.user_function import in_one_line
from entropy_fork.core.where import Where

#: the fields that follow from the lengths of the responses and their seeds
OF_ROWS = ("position", "length", "draw")


def needed_fields(score: Score, where: Where | None) -> tuple[str, ...]:
    """The fields that a selection reads, without those of :data:`OF_ROWS`."""
    names = dict.fromkeys((*score.fields, *(where.fields if where else ())))
    return tuple(name for name in names if name not in OF_ROWS)


@dataclass(frozen=True)
class Tokens:
    """The response tokens of a batch, with what is known about each.

    Attributes:
        fields: the fields that the batch has, without those of :data:`OF_ROWS`: float, each of shape (num_tokens,).
        eligible: bool or int, same shape: the response mask.
        lengths: int64, shape (num_responses,): tokens per response.
        seeds: int64, shape (num_responses,): the seed of each response's draws.
        window: int64, shape (num_responses,): responses with the same number are seen together by a function that looks
            at several tokens: those of a mini-batch.
        in_order: whether a user's function sees the responses of a window in the order of their seeds, whatever their
            order here. A sum of floats depends on it in its last bits.
    """

    fields: Mapping[str, Tensor]
    eligible: Tensor
    lengths: Tensor
    seeds: Tensor
    window: Tensor
    in_order: bool = True

    def field(self, name: str) -> Tensor:
        """A field, float, shape (num_tokens,).

        Raises:
            ValueError: the batch does not have it.
        """
        if name in OF_ROWS:
            return _of_rows(name, self.lengths, self.seeds)
        if name not in self.fields:
            raise ValueError(f"it reads {name}, which this batch does not have")
        return self.fields[name]

    def score(self, score: Score) -> Tensor:
        """The score of each token: float32 (``random``: float64), shape (num_tokens,).

        Raises:
            ValueError: the function fails, does not return one float for each token, or returns one for an eligible
                token that is not finite. The message names the score.
        """
        try:
            if score.same_as:  # the field itself, not a copy
                values = self.field(score.same_as)
                return values if values.dtype == torch.float64 else values.to(torch.float32)
            return self._apply(score.function, score.fields, score.elementwise, score.is_own, torch.float32)
        except ValueError as error:
            raise ValueError(f"score={score.name}: {error}") from error

    def where(self, where: Where) -> Tensor:
        """Which eligible tokens are in a pool at all: bool, shape (num_tokens,).

        Raises:
            ValueError: as :meth:`score`, for answers that must be bool.
        """
        try:
            is_own = not where.elementwise
            found = self._apply(where.function, where.fields, where.elementwise, is_own, torch.bool)
            return found & self.eligible.bool()
        except ValueError as error:
            raise ValueError(f"where={where.text}: {error}") from error

    def _apply(
        self, function: Callable[..., Tensor], names: Sequence[str], elementwise: bool, is_own: bool, dtype: torch.dtype
    ) -> Tensor:
        fields = {name: self.field(name) for name in names}
        num_tokens = self.eligible.numel()
        result = torch.zeros(num_tokens, dtype=dtype)
        eligible = self.eligible.bool()
        if elementwise:
            for piece in pieces(num_tokens):
                given = {name: field[piece] for name, field in fields.items()}
                values = _called(function, given, dtype).to(result.dtype)
                _check_finite(values, eligible[piece])
                result[piece] = values
            return result
        for members, slices in groups(self.window, self.lengths):
            tokens = self._by_seed(members) if is_own and self.in_order else slices
            seen = gather(eligible, tokens)
            if not seen.any():
                continue
            everything = bool(seen.all())  # then no more copies
            given = {name: gather(field, tokens) for name, field in fields.items()}
            if not everything:
                given = {name: values[seen] for name, values in given.items()}
            values = _called(function, given, dtype).to(dtype)
            _check_finite(values)
            if not everything:
                values = torch.zeros(seen.numel(), dtype=dtype).masked_scatter_(seen, values)
            scatter(result, tokens, values)
        return result

    def _by_seed(self, members: Tensor) -> list[slice]:
        """Where the tokens of some responses are, in the order of the responses' seeds."""
        ends = self.lengths.cumsum(0)
        ordered = members[torch.argsort(self.seeds[members])].tolist()
        return [slice(int(ends[row] - self.lengths[row]), int(ends[row])) for row in ordered]


def _called(function: Callable[..., Tensor], fields: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    expected = next(iter(fields.values())).shape
    try:
        values = function(**fields)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"it raised {in_one_line(error)}") from error
    if not isinstance(values, Tensor) or values.shape != expected:
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(f"it must return a tensor with one value per token, shape {tuple(expected)}, and gave {got}")
    is_right = values.dtype == torch.bool if dtype == torch.bool else values.is_floating_point()
    if not is_right:
        kind = "bool (compare something)" if dtype == torch.bool else "a float type (write .float())"
        raise ValueError(f"its tensor must be of {kind}, and is of {values.dtype}")
    return values.detach()


def _check_finite(values: Tensor, eligible: Tensor | None = None) -> None:
    """Raise a ValueError if the value of an eligible token is not finite."""
    for piece in pieces(values.numel()):
        finite = values[piece].isfinite()
        if eligible is not None:
            finite |= ~eligible[piece]
        if not finite.all():
            raise ValueError(f"it gave {values[piece][~finite][0].item()} for a token; write one that is always finite")


def _of_rows(name: str, lengths: Tensor, seeds: Tensor) -> Tensor:
    if name == "length":
        return lengths.to(torch.float32).repeat_interleave(lengths)
    if name == "draw":
        return torch.from_numpy(drawn(lengths.cpu().numpy(), seeds))
    values = torch.empty(int(lengths.sum()), dtype=torch.float32)
    counting = torch.arange(int(lengths.max()) if lengths.numel() else 0, dtype=torch.float32)
    for row in row_slices(lengths.cpu().numpy()):
        values[row] = counting[: row.stop - row.start]
    return values


def try_out(score: Score, where: Where | None = None) -> None:
    """Try a score and a condition on a made-up batch, before a run starts.

    The batch has tokens that the model was certain of (H = 0, ln p = 0) and responses with an advantage of 0, as runs
    have them.

    Raises:
        ValueError: what :meth:`Tokens.score` raises; or a function changes what it is given, gives the same tokens
            other scores at a second call, or looks at the order of the responses.
    """
    order = torch.tensor([3, 0, 4, 1, 2])
    for key, text, function in (
        ("score", score.name, lambda tokens: tokens.score(score)),
        *((("where", where.text, lambda tokens: tokens.where(where)),) if where else ()),
    ):
        tokens = _made_up()
        before = {name: values.clone() for name, values in tokens.fields.items()}
        first = function(tokens).clone()
        if any(not torch.equal(values, tokens.fields[name]) for name, values in before.items()):
            raise ValueError(f"{key}={text}: it changes the fields that it is given; write to a copy")
        if not torch.equal(first, function(tokens)):
            raise ValueError(
                f"{key}={text}: a second call gives the same tokens other values. For random numbers, read the field "
                f"'draw'"
            )
        rows = first.split(tokens.lengths.tolist())
        expected = torch.cat([rows[row] for row in order])
        if not torch.allclose(function(_rows_of(tokens, order)).double(), expected.double(), rtol=1e-4, atol=1e-6):
            raise ValueError(
                f"{key}={text}: the values of a token change with the order of the responses, which differs between "
                f"runs on other numbers of ranks. Let them depend on the token's fields, and on all tokens together"
            )
        function(_rows_of(tokens, order[:1]))  # a mini-batch may have one response, of one token


def _made_up() -> Tokens:
    lengths = torch.tensor([7, 12, 5, 1, 9])
    random = torch.Generator().manual_seed(20)
    entropy = torch.rand(34, generator=random) * 3
    surprisal = -torch.rand(34, generator=random).clamp(min=1e-4).log()
    certain = torch.arange(34) % 5 == 0
    entropy[certain] = surprisal[certain] = 0.0
    advantage = torch.tensor([1.2, -0.7, 0.0, 0.4, -1.5]).repeat_interleave(lengths)
    noise = torch.randn(34, generator=random) * 0.1
    fields = {
        "entropy": entropy,
        "log_prob": -surprisal,
        "advantage": advantage,
        "ref_log_prob": -surprisal + noise,
        "rollout_log_prob": -surprisal + noise.flip(0),
        "sum_pi_squared": (-entropy).exp(),
    }
    ours, seeds, window = torch.ones(34, dtype=torch.bool), torch.arange(5) + 11, torch.zeros(5).long()
    return Tokens(fields, ours, lengths, seeds, window, in_order=False)


def _rows_of(tokens: Tokens, rows: Tensor) -> Tokens:
    lengths = tokens.lengths.tolist()

    def taken(values: Tensor) -> Tensor:
        parts = values.split(lengths)
        return torch.cat([parts[row] for row in rows])

    fields = {name: taken(values) for name, values in tokens.fields.items()}
    eligible, window = taken(tokens.eligible), tokens.window[rows]
    return Tokens(fields, eligible, tokens.lengths[rows], tokens.seeds[rows], window, in_order=False)
