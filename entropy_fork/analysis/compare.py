"""Compare checkpoints of one run on the same texts (arXiv 2506.01939, section 4): do the forks stay, and what changes?

The folders are read side by side, one part of each at a time. Their parts may end at different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from entropy_fork.analysis.mark_top import TopRatio, find_top, top_masks
from entropy_fork.analysis.order_statistics import PERCENTILES, order_statistics, percentile_ranks
from entropy_fork.analysis.texts import check_complete, digest
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.evaluation.answer_store import is_evaluation
from entropy_fork.tokens.store import parts, read_columns, read_manifest

#: percentiles of the base model's entropies that bound the bins of Fig. 4
BIN_EDGES = tuple(range(5, 100, 5))


def compare(folders: Sequence[Path], top_ratio: float = 0.2) -> dict[str, Any]:
    """Compare what several checkpoints say about the same tokens.

    Args:
        folders: in the order of training; the first is the base, the last the final model.
        top_ratio: ρ, the share of all tokens that counts as each checkpoint's top.

    Returns:
        A dict that JSON can write, with these keys:

        - top_ratio, tokens
        - checkpoints: for each its name, model, mean_entropy, threshold; overlap_base and overlap_final (the share of
          its top positions that are also the base's, and the final model's; Table 1); percentiles (Fig. 5)
        - change (Fig. 4): for each bin of the base's entropies from and to (percent), tokens, and the mean change of
          each checkpoint against the base, nats. All tokens whose entropy equals the edge of a bin are below the edge,
          so bins can have different sizes.

    Raises:
        EntropyForkError: there are fewer than two folders, one is unfinished, or they differ in tokens or temperature.
    """
    _check(folders)
    tops = [find_top(folder, top_ratio) for folder in folders]
    percentiles = [_percentiles(folder, top.num_tokens) for folder, top in zip(folders, tops, strict=True)]
    edges = np.array([percentiles[0][q] for q in BIN_EDGES], dtype=np.float32)

    count, num_bins = len(folders), len(BIN_EDGES) + 1
    sums, change = np.zeros(count), np.zeros((count, num_bins))
    in_bin, with_base, with_final = (np.zeros(size, dtype=np.int64) for size in (num_bins, count, count))
    streams = [_entropy_and_top(folder, top) for folder, top in zip(folders, tops, strict=True)]
    for chunk in _aligned(streams):
        entropy = np.stack([one[0] for one in chunk]).astype(np.float64)
        top = np.stack([one[1] for one in chunk])
        bins = np.searchsorted(edges, chunk[0][0], side="left")
        sums += entropy.sum(1)
        in_bin += np.bincount(bins, minlength=num_bins)
        change += [np.bincount(bins, weights=row - entropy[0], minlength=num_bins) for row in entropy]
        with_base += (top & top[0]).sum(1)
        with_final += (top & top[-1]).sum(1)

    num_tokens, num_top = tops[0].num_tokens, tops[0].num_selected
    checkpoints = [
        {
            "name": name,
            "model": read_manifest(folder).get("model"),
            "mean_entropy": float(sums[place] / num_tokens),
            "threshold": tops[place].threshold,
            "overlap_base": float(with_base[place] / num_top),
            "overlap_final": float(with_final[place] / num_top),
            "percentiles": {str(q): float(value) for q, value in percentiles[place].items()},
        }
        for place, (name, folder) in enumerate(zip(_names(folders), folders, strict=True))
    ]
    bounds = [0, *BIN_EDGES, 100]
    changes = [
        {
            "from": low,
            "to": high,
            "tokens": int(in_bin[place]),
            "change": [float(row[place] / in_bin[place]) if in_bin[place] else None for row in change],
        }
        for place, (low, high) in enumerate(pairwise(bounds))
    ]
    return {"top_ratio": top_ratio, "tokens": num_tokens, "checkpoints": checkpoints, "change": changes}


def _check(folders: Sequence[Path]) -> None:
    if len(folders) < 2:
        raise EntropyForkError("compare needs two folders or more: the first of the base, the last of the final model")
    if answers := [folder for folder in folders if is_evaluation(folder)]:
        raise EntropyForkError(
            f"{answers[0]} is of 'entropy-fork evaluate', and this command compares folders of 'entropy-fork analyze': "
            f"write 'entropy-fork compare-evaluations BEFORE AFTER'"
        )
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        check_complete(folder, manifest)
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        if manifest.get("temperature") != manifests[0].get("temperature"):
            raise EntropyForkError(
                f"{folder} was measured at T = {manifest.get('temperature')} and {folders[0]} at "
                f"{manifests[0].get('temperature')}: entropies can be compared only at the same temperature"
            )
    digests = [digest(folder) for folder in folders]
    for folder, found in zip(folders[1:], digests[1:], strict=True):
        if found != digests[0]:
            raise EntropyForkError(
                f"{folder} does not hold the same prompts and token ids as {folders[0]}: measure its model on them "
                f"with 'entropy-fork analyze MODEL --like {folders[0]} --output FOLDER'"
            )
    if not sum(len(read_columns(folders[0], number, "position")[0]) for number in parts(folders[0])):
        raise EntropyForkError(f"{folders[0]} has no tokens: all of its answers are empty")


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, or their whole paths if two names are the same."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _percentiles(folder: Path, num_tokens: int) -> dict[int, np.float32]:
    def entropies() -> Iterator[np.ndarray]:
        for number in parts(folder):
            yield read_columns(folder, number, "entropy")[0]

    found = order_statistics(entropies, percentile_ranks(num_tokens, PERCENTILES))
    return dict(zip(PERCENTILES, found, strict=True))


def _entropy_and_top(folder: Path, top: TopRatio) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for number, selected in top_masks(folder, top):
        yield read_columns(folder, number, "entropy")[0], selected


def _aligned(
    streams: Sequence[Iterator[tuple[np.ndarray, np.ndarray]]],
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """The same tokens of all streams, in pieces as long as the shortest piece that has been read."""
    held: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(streams)
    while True:
        for place, stream in enumerate(streams):
            while (there := held[place]) is None or not len(there[0]):
                held[place] = next(stream, None)
                if held[place] is None:
                    return
        full = [one for one in held if one is not None]
        length = min(len(one[0]) for one in full)
        yield [(one[0][:length], one[1][:length]) for one in full]
        held = [(one[0][length:], one[1][length:]) for one in full]
