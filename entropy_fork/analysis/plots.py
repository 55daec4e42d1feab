"""The figures of the analyses. Each function takes what ``summary.py`` or ``compare.py`` returns, and makes a Figure.

The figures have no background, and colours that can be read on white and on black. pyplot is not used, because it keeps
every figure of a process in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_fork.common.foreign_text import figure_label, visible

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE = "#808890", "#3b8fd9", "#e08a2c"
#: from the low percentiles to the high ones; both ends are far from white and black
COLORS = "plasma"
#: at most this many characters of a word in a cloud
LONGEST = 24


def entropy_histogram(summary: Mapping[str, Any]) -> Figure:
    """Tokens by entropy on a logarithmic scale, with the 80th percentile and the threshold of the selection."""
    figure, axes = _figure("entropy (nats)", "tokens")
    edges, tokens = summary["histogram"]["edges"], summary["histogram"]["tokens"]
    axes.stairs(tokens, edges, fill=True, color=BLUE)
    axes.set_yscale("log", nonpositive="clip")
    if "80" in summary["percentiles"]:
        percentile = summary["percentiles"]["80"]
        axes.axvline(percentile, color=ORANGE, label=f"80th percentile: {percentile:.3f} nats")
    threshold, ratio = summary["manifest"].get("threshold"), summary["manifest"].get("top_ratio")
    if threshold is not None and ratio is not None:
        axes.axvline(threshold, color=INK, linestyle=":", label=f"top {ratio:.0%}: {threshold:.3f} nats and more")
    _legend(axes)
    return figure


def entropy_by_position(summary: Mapping[str, Any]) -> Figure:
    """Mean entropy and share of forks along the answer."""
    figure, axes = _figure("place in the answer (%)", "mean entropy (nats)")
    rows = [row for row in summary["positions"] if row["tokens"]]
    middle = [50 * (row["from"] + row["to"]) for row in rows]
    axes.plot(middle, [row["mean_entropy"] for row in rows], color=BLUE, label="mean entropy")
    axes.set_ylim(bottom=0)
    if rows and rows[0]["fork_share"] is not None:
        right = axes.twinx()
        right.plot(middle, [100 * row["fork_share"] for row in rows], color=ORANGE, label="forks")
        right.set_ylabel("forks (%)", color=INK)
        right.set_ylim(bottom=0)
        _style(right)
        right.spines["right"].set_visible(True)
        _legend(axes, [*axes.lines, *right.lines])
    return figure


def entropy_by_kind(summary: Mapping[str, Any]) -> Figure:
    """Mean entropy of thinking and of the answer, and of formulas, code, final answer and other text."""
    figure, axes = _figure("mean entropy (nats)", "")
    rows = [(row["section"], row) for row in summary["sections"]] + [(row["kind"], row) for row in summary["kinds"]]
    means = [row["mean_entropy"] for _, row in rows]
    bars = axes.barh(range(len(rows)), means, height=0.6, color=BLUE)
    axes.bar_label(bars, [f"{mean:.3f}" for mean in means], color=INK, padding=4)
    axes.set_xlim(0, 1.2 * max(means, default=0) or 1)  # room for the numbers
    names = [
        f"{name}\n{row['tokens']:,} tokens" + ("" if row["fork_share"] is None else f", {row['fork_share']:.1%} forks")
        for name, row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.invert_yaxis()
    return figure


def word_cloud(tokens: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> Figure:
    """The tokens of ``summary["highest"]`` or ``["lowest"]``; the first of the table are the largest.

    Args:
        tokens: rows of the summary, in its order.
        others: the tokens of the other cloud. A word that is in both, or twice in one, keeps its outer spaces (␣).
    """
    import matplotlib.colors
    from matplotlib import font_manager
    from matplotlib.figure import Figure
    from wordcloud import WordCloud

    sizes: dict[str, float] = {}
    bare = Counter(piece.strip("␣") for piece in {shown(token["piece"]) for token in (*tokens, *others)})
    for place, token in enumerate(tokens):
        word = shown(token["piece"])
        if bare[word.strip("␣")] == 1:
            word = word.strip("␣") or word
        sizes.setdefault(word if len(word) <= LONGEST else word[:LONGEST] + "…", len(tokens) - place)
    figure = Figure(figsize=(7, 4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_axis_off()
    if sizes:
        inks = [matplotlib.colors.to_hex(color) for color in _colors(6)]
        cloud = WordCloud(
            width=700, height=400, scale=2, mode="RGBA", background_color=None, random_state=0,
            font_path=font_manager.findfont("DejaVu Sans"), relative_scaling=0.5,
            color_func=lambda *_, random_state, **__: random_state.choice(inks),
        )  # fmt: skip
        axes.imshow(cloud.generate_from_frequencies(sizes).to_array(), interpolation="bilinear")
    return figure


def entropy_change(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 4: mean change of the entropy against the base, per 5% of the base's tokens."""
    figure, axes = _figure("percentile of the base's entropy", "mean change (nats)")
    bins = comparison["change"]
    names = _names(comparison)
    middle = [(row["from"] + row["to"]) / 2 for row in bins]
    for place, color in zip(range(1, len(names)), _colors(len(names) - 1), strict=True):
        axes.plot(middle, [row["change"][place] for row in bins], ".-", color=color, label=names[place])
    axes.axhline(0, color=INK, linewidth=0.8)
    _legend(axes)
    return figure


def percentile_evolution(comparison: Mapping[str, Any]) -> Figure:
    """Fig. 5: percentiles of the entropy over the checkpoints."""
    figure, axes = _figure("", "entropy (nats)")
    checkpoints = comparison["checkpoints"]
    percentiles = [q for q in checkpoints[0]["percentiles"] if int(q) % 10 == 0 or q in ("95", "99")]
    for q, color in zip(percentiles, _colors(len(percentiles)), strict=True):
        values = [checkpoint["percentiles"][q] for checkpoint in checkpoints]
        axes.plot(range(len(values)), values, ".-", color=color, label=f"{q}%")
    _checkpoints(axes, comparison)
    axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return figure


def overlap(comparison: Mapping[str, Any]) -> Figure:
    """Table 1: how many of the top ρ positions are also those of the base, and of the final model."""
    figure, axes = _figure("", f"of the top {comparison['top_ratio']:.0%} positions (%)")
    for key, label, color in (("overlap_base", "with the base", BLUE), ("overlap_final", "with the final", ORANGE)):
        values = [100 * checkpoint[key] for checkpoint in comparison["checkpoints"]]
        axes.plot(range(len(values)), values, ".-", color=color, label=label)
    _checkpoints(axes, comparison)
    _legend(axes)
    return figure


def of_summary(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures of one folder that have something to show, by name."""
    if not summary["tokens"]:
        return {}
    figures = {
        "entropy_histogram": entropy_histogram(summary),
        "entropy_by_position": entropy_by_position(summary),
        "entropy_by_kind": entropy_by_kind(summary),
    }
    ends = (("highest", "lowest"), ("lowest", "highest"))
    clouds = {f"words_{end}": word_cloud(summary[end], summary[other]) for end, other in ends if summary[end]}
    return figures | clouds


def of_comparison(comparison: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures of a comparison, by name."""
    return {
        "overlap": overlap(comparison),
        "entropy_change": entropy_change(comparison),
        "percentile_evolution": percentile_evolution(comparison),
    }


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG. The same figure always gives the same file."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "entropy-fork"}):
        for name, figure in figures.items():
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                file = folder / f"{name}.{kind}"
                temporary = folder / f".{name}.{kind}"
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
                temporary.replace(file)
                files.append(file)
    return files


def shown(piece: str) -> str:
    """A token for tables and clouds, with its outer spaces and its invisible characters made visible."""
    inner = piece.strip(" ")
    before = len(piece) - len(piece.lstrip(" "))
    after = len(piece) - len(inner) - before
    signs = {"\n": "⏎", "\t": "⇥"}
    return "␣" * before + visible("".join(signs.get(character, character) for character in inner)) + "␣" * after


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, which="both")
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def _legend(axes: Axes, lines: Sequence[Artist] | None = None) -> None:
    """A legend above the plot, where it hides nothing."""
    handles = axes.get_legend_handles_labels()[0] if lines is None else lines
    labels = [str(handle.get_label()) for handle in handles]
    if labels:
        axes.legend(
            handles, labels, frameon=False, labelcolor=INK, fontsize=9, ncols=1 if max(map(len, labels)) > 24 else 2,
            loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.5, columnspacing=1.2,
        )  # fmt: skip


def _checkpoints(axes: Axes, comparison: Mapping[str, Any]) -> None:
    names = _names(comparison)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0)


def _names(comparison: Mapping[str, Any]) -> list[str]:
    return [figure_label(shown(checkpoint["name"])) for checkpoint in comparison["checkpoints"]]


def _colors(count: int) -> list[Any]:
    import matplotlib

    colors = matplotlib.colormaps[COLORS]
    return [colors(0.15 + 0.65 * place / max(1, count - 1)) for place in range(count)]
