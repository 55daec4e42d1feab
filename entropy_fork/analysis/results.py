"""What ``analyze`` and ``compare`` print and write: tables, CSV, JSON and figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from entropy_fork.analysis import plots
from entropy_fork.analysis.summary import PAPER, summarise
from entropy_fork.analysis.token_scores import TOP
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import spreadsheet_cell
from entropy_fork.common.installing import why_missing
from entropy_fork.common.output_folder import write_whole
from entropy_fork.common.progress import task
from entropy_fork.core.scores import Score
from entropy_fork.evaluation.results import TextTable
from entropy_fork.tokens.store import parts

SUMMARY, COMPARISON, FIGURES = "summary.json", "comparison.json", "figures"

#: how many tokens of highest and of lowest entropy are printed, and how many words of a score; the CSV has all of them
PRINTED, PRINTED_WORDS = 20, 4


def check_installed() -> None:
    """Raise an EntropyForkError if the extra ``analysis`` is missing: before an hour of measuring, not after it."""
    missing = [name for name in ("matplotlib", "pyarrow", "wordcloud") if find_spec(name) is None]
    if missing:
        raise EntropyForkError(why_missing(missing, "analysis"))


def summarise_and_write(
    folder: Path, min_count: int, scores: Sequence[Score] = (), top_ratio: float = TOP
) -> dict[str, Any]:
    """Summarise a folder of tokens, write the results beside them, and show how far this is.

    Args:
        folder: of tokens, complete.
        min_count: how often a token must have been seen to be in the tables of highest and lowest entropy.
        scores: scores that the user asked for, beside the built-in ones.
        top_ratio: ρ of the overlap between a score and the entropy.

    Returns:
        What :func:`~entropy_fork.analysis.summary.summarise` returns.

    Raises:
        EntropyForkError: the folder cannot be summarised.
    """
    with task("summary", len(parts(folder))) as shown:
        summary = summarise(folder, min_count, advance=shown.advance, scores=scores, scores_top_ratio=top_ratio)
    with task("figures"):
        write_summary(summary, folder)
    return summary


def write_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """Write ``summary.json``, CSV files and figures of one folder."""
    write_whole(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    edges = summary["histogram"]["edges"]
    bins = [
        {"from": low, "to": high, "tokens": count}
        for low, high, count in zip(edges, edges[1:], summary["histogram"]["tokens"], strict=False)
    ]
    percentiles = [{"percentile": q, "entropy": value} for q, value in summary["percentiles"].items()]
    scores = [
        {key: value for key, value in row.items() if key not in ("percentiles", "words")}
        | {f"percentile_{q}": value for q, value in row["percentiles"].items()}
        for row in summary["scores"]
    ]
    words = [{"score": row["score"], **word} for row in summary["scores"] for word in row["words"]]
    for name, rows in (
        ("tokens_highest", summary["highest"]),
        ("tokens_lowest", summary["lowest"]),
        ("histogram", bins),
        ("percentiles", percentiles),
        ("positions", summary["positions"]),
        ("kinds", summary["cells"]),
        ("steps", summary["steps"]),
        ("scores", scores),
        ("scores_words", words),
    ):
        _write_csv(rows, folder / f"{name}.csv")
    plots.save(plots.of_summary(summary), folder / FIGURES)


def write_comparison(comparison: Mapping[str, Any], folder: Path) -> None:
    """Write ``comparison.json``, CSV files and figures of a comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / COMPARISON, json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
    checkpoints = comparison["checkpoints"]
    overlap = [{key: value for key, value in one.items() if key != "percentiles"} for one in checkpoints]
    percentiles = [{"name": one["name"], **one["percentiles"]} for one in checkpoints]
    change = [
        {key: row[key] for key in ("from", "to", "tokens")}
        | {one["name"]: value for one, value in zip(checkpoints, row["change"], strict=True)}
        for row in comparison["change"]
    ]
    for name, rows in (("overlap", overlap), ("change", change), ("percentiles", percentiles)):
        _write_csv(rows, folder / f"{name}.csv")
    plots.save(plots.of_comparison(comparison), folder / FIGURES)


def summary_tables(summary: Mapping[str, Any], printed: int = PRINTED) -> list[tuple[str, TextTable]]:
    """(title, table) of one folder, with ``printed`` tokens of highest and of lowest entropy."""
    if not summary["tokens"]:
        return []
    rows = [["answers", f"{summary['answers']:,}", ""], ["tokens", f"{summary['tokens']:,}", ""]]
    rows += [["mean entropy", f"{summary['mean_entropy']:.4f}", ""]]
    for edge, share in summary["share_below"].items():
        paper = PAPER.get(f"share_below_{edge}")
        rows.append([f"tokens below {edge} nats", f"{share:.2%}", "" if paper is None else f"{paper:.2%}"])
    for q in ("50", "80", "90", "95", "99"):
        paper = PAPER.get(f"percentile_{q}")
        rows.append([f"{q}th percentile", f"{summary['percentiles'][q]:.4f}", "" if paper is None else f"{paper:.3f}"])
    if summary["manifest"].get("threshold") is not None and summary["manifest"].get("top_ratio") is not None:
        name = f"threshold of the top {summary['manifest']['top_ratio']:.4g}"
        rows.append([name, f"{summary['manifest']['threshold']:.4f}", ""])
    tables = [("entropy (nats)", TextTable(["measure", "here", "paper, Qwen3-8B"], rows))]

    parts = [(row["section"], row) for row in summary["sections"]] + [(row["kind"], row) for row in summary["kinds"]]
    tables.append(("by part of the answer", _sums_table("part", parts)))
    if summary["steps"]:
        tables.append(("by training step", _sums_table("step", [(str(row["step"]), row) for row in summary["steps"]])))
    top = f"top {summary['scores_top_ratio']:.4g}"
    tables.append((f"scores, and how far they agree with the entropy in their {top}", _scores_table(summary["scores"])))
    for end in ("highest", "lowest"):
        tokens = [(plots.shown(row["piece"]), row) for row in summary[end][:printed]]
        title = f"{end} mean entropy, of the {summary['seen_often']:,} tokens seen {summary['min_count']} times or more"
        if tokens:
            tables.append((title, _sums_table("token", tokens)))
    return tables


def _scores_table(scores: Sequence[Mapping[str, Any]]) -> TextTable:
    header = ["score", "mean", "50%", "80%", "99%", "overlap", "rank correlation", "highest words"]
    rows = []
    for row in scores:
        correlation = row["rank_correlation_with_entropy"]
        words = "  ".join(plots.shown(word["piece"]) for word in row["words"][:PRINTED_WORDS])
        values = (row["mean"], *(row["percentiles"][q] for q in ("50", "80", "99")))
        agreement = [f"{row['overlap_with_entropy']:.1%}", "–" if correlation is None else f"{correlation:.2f}"]
        rows.append([plots.shown(row["score"]), *(f"{value:.4g}" for value in values), *agreement, words or "–"])
    return TextTable(header, rows)


def comparison_tables(comparison: Mapping[str, Any]) -> list[tuple[str, TextTable]]:
    """(title, table) of a comparison: the paper's Table 1, Fig. 5 and Fig. 4."""
    checkpoints = comparison["checkpoints"]
    overlap = TextTable(
        ["checkpoint", "mean entropy", "threshold", "with the base", "with the final"],
        [
            [plots.shown(one["name"]), f"{one['mean_entropy']:.4f}", f"{one['threshold']:.4f}"]
            + [f"{one[key]:.2%}" for key in ("overlap_base", "overlap_final")]
            for one in checkpoints
        ],
    )
    chosen = ("5", "20", "40", "50", "60", "80", "90", "95", "99")
    percentiles = TextTable(
        ["checkpoint", *(f"{q}%" for q in chosen)],
        [[plots.shown(one["name"]), *(f"{one['percentiles'][q]:.4f}" for q in chosen)] for one in checkpoints],
    )
    change = TextTable(
        ["base's percentiles", "tokens", *(plots.shown(one["name"]) for one in checkpoints[1:])],
        [
            [f"{row['from']}–{row['to']}%", f"{row['tokens']:,}"]
            + ["–" if value is None else f"{value:+.4f}" for value in row["change"][1:]]
            for row in comparison["change"]
        ],
    )
    return [
        (f"overlap of the top {comparison['top_ratio']:.4g} positions (the paper's Table 1)", overlap),
        ("percentiles of the entropy, nats (Fig. 5)", percentiles),
        ("mean change of the entropy against the base, nats (Fig. 4)", change),
    ]


def _sums_table(what: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> TextTable:
    def cells(name: str, row: Mapping[str, Any]) -> list[str]:
        forks = row["fork_share"]
        return [name, f"{row['tokens']:,}", f"{row['mean_entropy']:.4f}", "–" if forks is None else f"{forks:.1%}"]

    return TextTable([what, "tokens", "mean entropy", "forks"], [cells(*row) for row in rows])


def _write_csv(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write rows under their keys as CSV. Without rows an older file is deleted and none is written."""
    if not rows:
        file.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(spreadsheet_cell, rows[0]))
    writer.writerows([spreadsheet_cell(row[key]) for key in rows[0]] for row in rows)
    write_whole(file, text.getvalue())
