"""From recorded metrics to the CSV, to differences and headlines, to the page that is made of them."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer.testing

from entropy_fork.common.errors import EntropyForkError
from examples.research.experiment import __main__ as experiment
from examples.research.experiment import page as pages
from examples.research.experiment.arms import QUESTIONS
from examples.research.experiment.comparison import (
    by_arm,
    common_tokens,
    headline,
    minus,
    missing,
    of_question,
    told,
)
from examples.research.experiment.power import pairs_needed
from examples.research.experiment.results import CURVES, Result, finished, merged, read_csv, settings_of, write_csv
from examples.research.experiment.runs import wanted
from examples.research.experiment.statistics import Difference, difference, spread_interval
from examples.research.experiment.tasks import TASKS

DEMO = TASKS["demo"]
CONTROLS = QUESTIONS["controls"]
#: of a real run of ``top20`` with seed 1 at the commit db9da15: what the CSV is made of, at four of its steps
RECORDED = {
    0: {"val-core/cpu_demo/acc/mean@1": 0.341796875},
    1: {
        "critic/score/mean": 0.4609375, "actor/entropy": 0.18988288938999176, "actor/grad_norm": 0.75,
        "response_length/mean": 23.9765625,
        "prompt_length/mean": 22.6875, "perf/total_num_tokens": 5973.0, "timing_s/step": 4.340796062002482,
        "entropy_fork/kept_ratio": 0.2000651678071033, "entropy_fork/kept_tokens": 614.0,
    },
    2: {
        "critic/score/mean": 0.4375, "actor/entropy": 0.18369291722774506, "response_length/mean": 23.5703125,
        "prompt_length/mean": 22.75, "perf/total_num_tokens": 5929.0, "timing_s/step": 4.138214127997344,
        "entropy_fork/kept_ratio": 0.20019887305270137, "entropy_fork/kept_tokens": 604.0,
    },
    3: {
        "critic/score/mean": 0.5546875, "actor/entropy": 0.17663171887397766, "response_length/mean": 23.46875,
        "prompt_length/mean": 22.8125, "perf/total_num_tokens": 5924.0, "timing_s/step": 5.444523443002254,
        "timing_s/testing": 7.662090754005476, "val-core/cpu_demo/acc/mean@1": 0.484375,
        "entropy_fork/kept_ratio": 0.2003994673768309, "entropy_fork/kept_tokens": 602.0, "actor/grad_norm": 1.25,
        "training/filter_groups/evicted_samples": 5.0, "training/filter_groups/discarded_surplus_samples": 2.0,
    },
}  # fmt: skip


def folder_with(folder: Path, runs: dict[str, dict[str, object]], overrides: Iterable[str] = ()) -> Path:
    """A folder as ``run`` leaves it."""
    for name, saved in runs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.json").write_text(json.dumps(saved))
    (folder / "overrides.json").write_text(json.dumps(list(overrides)))
    return folder


def without_mask(metrics: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in values.items() if not name.startswith("entropy_fork/")}
        for step, values in metrics.items()
    }


def made(arm: str, seed: int, accuracy: list[float], tokens: float = 600.0, steps: int = 30) -> Result:
    """A run with these accuracies at equal distances, and so many trained tokens in each step."""
    curves = {name: np.full(steps + 1, np.nan) for name in CURVES}
    curves["accuracy"][:: steps // (len(accuracy) - 1)] = accuracy
    for name, value in {"reward": 0.5, "entropy": 0.2, "response_length": 24.0, "kept_ratio": 0.2}.items():
        curves[name][1:] = value
    curves["response_tokens"][1:], curves["trained_tokens"][1:] = 3000.0, tokens
    settings = settings_of(1, steps // (len(accuracy) - 1), ())
    return Result("demo", steps, settings, seed, arm, "abc", curves)


def test_the_columns_are_those_of_the_recorded_metrics(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "runs", {"top20-seed1": {"metrics": RECORDED, "seconds": 60.0, "commit": "abc"}})
    write_csv(finished(folder, DEMO), tmp_path / "demo.csv")
    with (tmp_path / "demo.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    of_every = {"task": "demo", "arm": "top20", "seed": "1", "steps": "3", "commit": "abc"}
    assert all(row.items() >= of_every.items() for row in rows)
    assert {row["settings"] for row in rows} == {"val_kwargs.n=1 test_freq=3"}
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["accuracy"] for row in rows] == ["0.3417969", "", "", "0.484375"]
    assert {name: value for name, value in rows[3].items() if name in CURVES} == {
        "accuracy": "0.484375", "reward": "0.5546875", "entropy": "0.1766317", "response_length": "23.46875",
        "kept_ratio": "0.2003995", "response_tokens": str(int(128 * 23.46875)), "trained_tokens": "602",
        "seconds": "13.10661", "grad_norm": "1.25", "dropped_groups": "7",
    }  # fmt: skip
    assert [row["dropped_groups"] for row in rows] == ["", "0", "0", "7"]
    assert [rows[0][name] for name in CURVES[1:]] == [""] * 9


def test_without_a_mask_every_response_token_is_trained_on(tmp_path: Path) -> None:
    saved = {"metrics": without_mask(RECORDED), "seconds": 60.0, "commit": "abc"}
    (result,) = finished(folder_with(tmp_path, {"all-seed2": saved}), DEMO)
    assert result.curves["trained_tokens"][1:].tolist() == [128 * 23.9765625, 128 * 23.5703125, 128 * 23.46875]
    assert result.curves["kept_ratio"][1:].tolist() == [1.0] * 3
    assert result.tokens.tolist() == [0.0, 128 * (23.9765625 + 23.5703125 + 23.46875)]


def test_runs_that_do_not_say_their_commit_need_it_said(tmp_path: Path) -> None:
    of_before = {"metrics": RECORDED, "seconds": 60.0}
    runs = {"top20-seed1": of_before, "top20-seed2": of_before | {"commit": "new"}}
    folder = folder_with(tmp_path, runs, ["data.seed=9"])
    with pytest.raises(EntropyForkError, match=r"top20-seed1/metrics.json does not say .* --made-at COMMIT"):
        finished(folder, DEMO)
    found = finished(folder, DEMO, "old")
    assert [one.commit for one in found] == ["old", "new"]
    assert {one.settings for one in found} == {"val_kwargs.n=1 test_freq=3 data.seed=9"}


def test_what_is_no_run_of_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EntropyForkError, match="there is no arm 'top30'"):
        finished(folder_with(tmp_path / "1", {"top30-seed1": {"metrics": RECORDED, "commit": "abc"}}), DEMO)
    alone = folder_with(tmp_path / "3", {"top20-seed1": {"metrics": RECORDED, "commit": "abc"}})
    (alone / "overrides.json").unlink()
    with pytest.raises(EntropyForkError, match=r"overrides.json is not there: copy it"):
        finished(alone, DEMO)
    with pytest.raises(EntropyForkError, match="has no finished run"):
        experiment.collect(tmp_path / "nowhere", "demo", tmp_path / "demo.csv", None)
    elsewhere = {step: {"val-core/other/acc/mean@1": 0.5} for step in (0, 3)}
    with pytest.raises(EntropyForkError, match="it is no run of the task demo"):
        finished(folder_with(tmp_path / "2", {"top20-seed1": {"metrics": elsewhere, "commit": "abc"}}), DEMO)


def test_runs_of_two_machines_merge_and_a_csv_reads_as_it_was_written(tmp_path: Path) -> None:
    first, second = made("all", 1, [0.3, 0.5]), made("all", 2, [0.3, 1 / 3])
    shorter = made("all", 1, [0.3, 0.4], steps=12)
    file = tmp_path / "demo.csv"
    write_csv(merged([first], [second, shorter]), file)
    text = file.read_text()
    again = read_csv(file)
    assert {one.identity for one in again} == {one.identity for one in (first, second, shorter)}
    write_csv(merged(again, [second]), file)
    assert file.read_text() == text, "a run that is there is not added again, rounded or not"


def test_the_same_run_with_other_numbers_is_one_error() -> None:
    there, now = made("matched", 3, [0.3, 0.5]), made("matched", 3, [0.3, 0.6])
    with pytest.raises(EntropyForkError) as error:
        merged([there], [now])
    for said in ("arm matched, seed 3, 30 steps", "At step 30 its accuracy is 0.5 (made at abc), and now 0.6"):
        assert said in str(error.value)
    slower = made("matched", 3, [0.3, 0.5])
    there.curves["seconds"][1:] = 60.0
    slower.curves["seconds"][1:] = 99.0
    (kept,) = merged([there], [slower])
    assert (kept.curves["seconds"][1:] == 60.0).all(), "other seconds are no other numbers; the first ones stay"


def test_an_older_csv_lacks_the_newer_curves(tmp_path: Path) -> None:
    write_csv([made("all", 1, [0.3, 0.5])], tmp_path / "new.csv")
    with (tmp_path / "new.csv").open() as handle:
        rows = [{name: row[name] for name in row if name != "grad_norm"} for row in csv.DictReader(handle)]
    with (tmp_path / "old.csv").open("w") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (result,) = read_csv(tmp_path / "old.csv")
    assert np.isnan(result.curves["grad_norm"]).all()
    assert result.accuracy.tolist() == [0.3, 0.5]
    newer = made("all", 1, [0.3, 0.5])
    newer.curves["grad_norm"][1:] = 0.25
    (filled,) = merged([result], [replace(newer, commit="later")])
    assert (filled.curves["grad_norm"][1:] == 0.25).all(), (
        "what the older CSV lacks is taken from the same run, collected again"
    )
    assert filled.commit == "abc"


def test_runs_of_a_seed_must_start_alike() -> None:
    """Another start is another model or other problems, and the runs would be no pair."""
    there = [made("all", 1, [0.3, 0.5]), made("all", 2, [0.4, 0.5])]
    assert len(merged(there, [made("top20", 1, [0.3, 0.6])])) == 3
    with pytest.raises(EntropyForkError) as error:
        merged(there, [made("top20", 2, [0.3, 0.6])])
    for said in ("two runs of seed 2 did not start alike", "of all was 0.4 (made at abc), and of top20 0.3"):
        assert said in str(error.value)


def test_collect_adds_what_is_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {f"top20-seed{seed}": {"metrics": RECORDED, "seconds": 60.0} for seed in (1, 2)}
    folder, file = folder_with(tmp_path / "runs", runs), tmp_path / "demo.csv"
    experiment.collect(folder, "demo", file, "db9da15")
    experiment.collect(folder, "demo", file, "db9da15")
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said] == ["2 runs, 2 of them new", "2 runs, 0 of them new"]


def test_without_a_folder_and_without_a_run_the_csv_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So ``make evidence`` draws the page of a fresh clone."""
    monkeypatch.chdir(tmp_path)
    experiment.collect(None, "sorting", tmp_path / "sorting.csv", None)
    assert ".demo/sorting/controls-30steps has no finished run" in capsys.readouterr().out
    assert not (tmp_path / "sorting.csv").exists()


def test_tokens_are_equal_at_the_largest_number_that_every_run_reaches() -> None:
    all_ = made("all", 1, [0.3, 0.5, 0.6, 0.65, 0.7, 0.8], tokens=3000)
    top = made("top20", 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.75], tokens=600)
    assert common_tokens([all_, top]) == 30 * 600
    values = by_arm([all_, top])
    assert values["top20"]["equal_tokens"][1] == pytest.approx(0.75), "its end"
    assert values["all"]["equal_tokens"][1] == pytest.approx(0.5), "after 6 of its 30 steps"
    lowest = made("matched", 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.75], tokens=500)
    between = by_arm([all_, top, lowest])["all"]["equal_tokens"][1]
    assert between == pytest.approx(0.3 + 0.2 * (30 * 500) / (6 * 3000))
    unknown = made("top50", 1, [0.3, 0.5], tokens=math.nan)
    assert math.isnan(by_arm([all_, unknown])["all"]["equal_tokens"][1])


def test_the_numbers_of_a_run() -> None:
    run = made("top20", 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.75])
    run.curves["entropy"][24:] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    values = {name: of_seed[1] for name, of_seed in by_arm([run])["top20"].items()}
    assert values["accuracy"] == 0.75
    assert values["area"] == pytest.approx(statistics.fmean([0.35, 0.45, 0.55, 0.65, 0.725]))
    assert values["entropy"] == pytest.approx(0.4), "the last 7 of 30 steps"


def test_only_runs_of_the_questions_steps_and_settings_are_compared_in_its_order() -> None:
    some = [made("all", 2, [0.3] * 6), made("top20", 1, [0.3] * 6), made("matched", 1, [0.3] * 6)]
    others = [made("top50", 1, [0.3] * 6), made("all", 1, [0.3] * 6, steps=20), made("all", 1, [0.3] * 4)]
    assert of_question([*reversed(some), *others], CONTROLS) == some
    absent = missing(some, CONTROLS, DEMO)
    assert absent["all"] == [1, 3, 4, 5, 6]
    assert absent["gradient"] == [1, 2, 3, 4, 5, 6]
    everything = [made(arm.name, seed, [0.3] * 6) for arm in CONTROLS.arms for seed in range(1, 7)]
    assert missing(everything, CONTROLS, DEMO) == {}


def test_a_task_may_plan_fewer_arms_and_makes_another_if_asked() -> None:
    sorting, planned = (
        TASKS["sorting"],
        ["all", "top20", "matched", "random20", "bottom80", "surprisal", "next20", "unclipped"],
    )
    assert list(missing([], CONTROLS, sorting)) == planned
    assert [arm.name for arm, _ in wanted(sorting, CONTROLS, (), [1])] == planned
    assert [arm.name for arm, _ in wanted(sorting, CONTROLS, ("gradient",), [1])] == ["gradient"]


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([0.05, 0.07, 0.06], "the top 20% by entropy beats as many random tokens"),
        ([-0.05, -0.07, -0.06], "entropy does not beat matched random tokens: it does worse"),
        ([-0.05, 0.09, 0.03], "entropy is not shown to beat matched random tokens"),
        ([0.01, 0.07, 0.10], "entropy is not shown to beat matched random tokens"),  # by t; above 0 by bootstrap
        ([0.05, 0.07], "nothing can be said yet: an interval needs 3 seeds"),
        ([], "nothing can be said yet: an interval needs 3 seeds"),
    ],
)
def test_the_headline_follows_the_interval_of_t(differences: list[float], says: str) -> None:
    found = difference(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    sentence = headline("a task", found, planned=3)
    assert sentence.startswith(f"On a task, {says}")
    assert ("95% interval" in sentence) == (len(differences) > 2)
    assert sentence.endswith(", 3 seeds).") == (len(differences) > 2)


def test_the_headline_says_how_many_of_the_planned_seeds_are_there() -> None:
    found = difference({1: 0.05, 2: 0.07, 3: 0.06}, dict.fromkeys((1, 2, 3), 0.0))
    assert headline("a task", found, planned=6).endswith(", 3 of 6 planned seeds).")


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        ([0.05, 0.07, 0.06], "6.0 points above B (95% interval 3.5 to 8.5; above in 3 of 3 seeds)"),
        ([-0.05, -0.07, -0.06], "6.0 points below B (95% interval 3.5 to 8.5; above in 0 of 3 seeds)"),
        ([-0.05, 0.09, 0.02], "not clearly above or below B (+2.0 points, 95% interval -15.4 to +19.4; above in 2 of 3 "
                              "seeds)"),
        ([0.05, 0.07], "beside B with too few seeds to say where (2)"),
    ],
)  # fmt: skip
def test_where_an_arm_ends_is_told_by_the_same_interval(differences: list[float], says: str) -> None:
    assert told(difference(dict(enumerate(differences)), dict.fromkeys(range(9), 0.0)), "B") == says


def every_run(gain: float = 0.1, seeds: int = 6) -> list[Result]:
    """All arms of the controls; those by a score end ``gain`` above the others."""
    drawn = np.random.default_rng(0)
    return [
        made(
            arm.name, seed,
            [0.3, 0.4, 0.5, 0.5, 0.6, 0.6 + gain * (arm.name in ("top20", "surprisal")) + drawn.normal(0, 0.01)],
            tokens={"all": 3000, "bottom80": 2400}.get(arm.name, 600),
        )
        for seed in range(1, seeds + 1)
        for arm in DEMO.planned(CONTROLS)
    ]  # fmt: skip


def cells(table: str) -> dict[str, list[str]]:
    """The rows of the tables in Markdown, by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in rows}


def test_the_part_of_a_task_says_what_its_runs_say() -> None:
    runs = of_question(every_run(), CONTROLS)
    text = pages.controls(runs, DEMO, CONTROLS)
    assert text.startswith("**On the demo's order of operations, the top 20% by entropy beats as many random tokens")
    assert "42 runs, made at `abc` (42). Before training the accuracy was 30.0%." in text
    assert "reached 18,000 trained tokens" in text
    assert "No run is missing." in text
    found = minus(by_arm(runs), "top20", "matched", "accuracy")
    low, high = (f"{100 * end:+.1f}" for end in found.t)
    row = cells(pages.differences(runs, CONTROLS))["matched"]
    assert pages.differences(runs, CONTROLS) in text
    assert row[0] == "6"
    assert row[1].startswith(f"**{100 * found.mean:+.1f}**<br>[")
    assert row[1].endswith(f"<br>({low}, {high})")
    assert "top20" not in cells(pages.differences(runs, CONTROLS))


def test_the_part_of_a_task_names_the_runs_that_are_missing() -> None:
    runs = [one for one in every_run() if (one.arm, one.seed) not in {("top20", 2), ("matched", 5), ("matched", 6)}]
    text = pages.controls(of_question(runs, CONTROLS), DEMO, CONTROLS)
    assert "Missing seeds: `top20` 2; `matched` 5, 6." in text
    assert cells(pages.differences(of_question(runs, CONTROLS), CONTROLS))["matched"][0] == "3", "that both have"
    one_seed = pages.controls(of_question(every_run(seeds=1), CONTROLS), DEMO, CONTROLS)
    assert "nothing can be said yet" in one_seed
    assert "nan" not in one_seed
    without = [one for one in every_run() if one.arm != "top20"]
    assert "No seed has `top20`" in pages.controls(of_question(without, CONTROLS), DEMO, CONTROLS)
    assert pages.controls([], DEMO, CONTROLS) == "No run is there yet: `make controls TASK=demo` makes them."


def test_what_else_differs_is_told_of_the_runs_that_logged_it() -> None:
    logged, other, unknown = (made("top20", seed, [0.3, 0.5]) for seed in (1, 2, 3))
    logged.curves["grad_norm"][1:], logged.curves["dropped_groups"][1:] = [1.5] * 10 + [0.5] * 20, 4.0
    other.curves["grad_norm"][1:], other.curves["dropped_groups"][1:] = [1.0] * 28 + [1.1] * 2, 5.0
    rows = cells(pages.what_else_differs([made("all", 1, [0.3, 0.5]), logged, other, unknown]))
    assert rows == {"top20": ["2", "0.92 ± 0.12", "6.0 ± 5.7", "135 ± 21"]}
    assert pages.what_else_differs([unknown]) == "No run here has logged the size of its gradients."
    recipe = (pages.REPOSITORY / "recipes/recipe/dapo.yaml").read_text()
    assert f"clip_grad: {pages.CLIP}" in recipe


def test_the_tasks_are_told_together() -> None:
    text = pages.together({"demo": of_question(every_run(), CONTROLS), "sorting": []}, CONTROLS)
    assert [line.split("?")[0].split(" of")[0] for line in text.splitlines() if line.startswith("- ")] == [
        "- **Which tokens", "- **How many in which answer", "- **Is a fifth enough",
        "- **Is the rest useless", "- **Does the rank among uncertain tokens matter",
        "- **Do the next uncertain tokens beat the lot", "- **Is it the clipping",
        "- **Is a fifth enough without clipping", "- **Is another score as good",
        "- **And is a fifth by that score enough", "- **And a third one",
        "- **Which fifth is ahead at equal trained tokens", "- 42",
    ]  # fmt: skip
    assert " ".join(text.split()).count("On sorting six numbers, ") == 11, "gradient is not planned there"
    assert " ".join(text.split()).count("On the demo's order of operations, ") == 8, (
        "the two doubts are not planned there"
    )
    assert "- 42 of 90 planned runs are there." in text
    said = " ".join(text.split())
    assert "On the demo's order of operations, `top20` ends 9.9 points above `matched` (95% interval" in said
    assert (
        "6 seeds). On sorting six numbers, `top20` ends beside `matched` with too few seeds to say where (0)." in said
    )


def test_the_arms_are_told_by_mean_spread_and_difference_to_all() -> None:
    runs = [
        made(arm, seed, [0.25, final])
        for arm, finals in {"all": (0.5, 0.7), "top20": (0.6, 0.9)}.items()
        for seed, final in enumerate(finals, 1)
    ]
    rows = {row["tokens"]: row for row in pages.arm_rows(runs)}
    assert rows["`top20`"]["accuracy, %"] == "75.0 ± 21.2"
    assert rows["`top20`"]["minus `all`"] == "+15.0 ± 7.1"
    assert rows["`all`"]["minus `all`"] == ""
    assert rows["`top20`"]["by seed"] == "60.0, 90.0"
    (alone,) = pages.arm_rows(runs[:1])
    assert alone["accuracy, %"] == "50.0"


def test_the_page_and_its_plots_are_made_from_whatever_is_there(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    (tmp_path / "evidence").mkdir()
    for name in ("ratios", "scores"):
        (tmp_path / f"evidence/{name}.csv").write_text((pages.EVIDENCE / f"{name}.csv").read_text())
    page.write_text(pages.PAGE.read_text())
    write_csv(every_run(gain=-0.1), tmp_path / "evidence/demo.csv")
    guide = tmp_path / "is_it_working.md"
    guide.write_text(pages.GUIDE.read_text())
    written = pages.write(page, guide)
    assert {file.name for file in written} == {
        "evidence.md", "is_it_working.md",
        *(f"{name}.{end}" for name in ("ratios", "scores", "demo") for end in ("png", "svg")),
    }  # fmt: skip
    assert all(file.stat().st_size > 10_000 for file in written)
    text = page.read_text()
    assert text.count("entropy does not beat matched random tokens: it does worse") == 2, "at the top and in its part"
    assert "| `matched` | the demo's order of operations | 6 seeds |" in guide.read_text()
    before = (tmp_path / "evidence/demo.svg").read_bytes()
    pages.draw(of_question(read_csv(tmp_path / "evidence/demo.csv"), CONTROLS), tmp_path / "evidence/demo")
    assert (tmp_path / "evidence/demo.svg").read_bytes() == before, "the same runs make the same file"


def test_the_seeds_of_a_spread_are_those_of_the_power_command() -> None:
    """A row per arm with three seeds or more; the numbers are those of ``power``'s own test."""
    runs = of_question(every_run(), CONTROLS)
    row = cells(pages.seeds_needed({"demo": runs}))["matched"]
    spread = 100 * minus(by_arm(runs), "top20", "matched", "accuracy").spread
    low, high = spread_interval(spread, 6)
    assert row[2] == f"{spread:.1f} ({low:.1f} to {high:.1f})"
    assert row[-5:] == [f"{pairs_needed(size / spread)} ({pairs_needed(size / high)})" for size in (1, 2, 3, 5, 10)]
    assert "no spread is known" in pages.seeds_needed({"demo": of_question(every_run(seeds=2), CONTROLS)})


def test_no_table_of_the_page_is_typed_by_hand() -> None:
    """The pages are what the CSV files say: ``python -m examples.research.experiment page`` changes nothing."""
    made, places = pages.parts(pages.EVIDENCE), set()
    for page in (pages.PAGE, pages.GUIDE):
        text = page.read_text(encoding="utf-8")
        assert pages.filled(text, made) == text
        places |= {place[1] for place in pages.PLACE.findall(text)}
    assert places == set(made)
    text = pages.PAGE.read_text(encoding="utf-8")
    prose = pages.PLACE.sub("", text)
    assert "±" not in "".join(line for line in prose.splitlines() if line.startswith("|"))


def power(*arguments: str) -> str:
    result = typer.testing.CliRunner().invoke(experiment.app, ["power", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_power_command_counts_seeds_for_the_spread_of_a_csv(tmp_path: Path) -> None:
    runs = every_run()
    write_csv(runs, tmp_path / "demo.csv")
    spread = 100 * minus(by_arm(runs), "top20", "matched", "accuracy").spread
    shown = power("--csv", str(tmp_path / "demo.csv"), "--points", str(spread), "--points", str(spread / 2))
    assert f"final accuracy (sd {spread:.1f})" in " ".join(shown.split())
    assert "top20 minus matched over 6 seeds of demo.csv" in " ".join(shown.split())
    counts = [line.split()[1] for line in shown.splitlines() if line.strip()[:1].isdigit()]
    assert counts == ["10", "34"]


def test_the_power_command_takes_a_spread_and_refuses_too_few_seeds(tmp_path: Path) -> None:
    rows = [line.split() for line in power("--sd", "5", "--points", "4", "--points", "1").splitlines()]
    assert ["4", "15"] in rows
    assert ["1", "199"] in rows
    write_csv(every_run(seeds=2), tmp_path / "demo.csv")
    with pytest.raises(EntropyForkError, match=r"has 2 seeds of both top20 and matched, .* --sd"):
        power("--csv", str(tmp_path / "demo.csv"))
    with pytest.raises(EntropyForkError, match="top30: the arms are all, top50"):
        power("--csv", str(tmp_path / "demo.csv"), "--arm", "top30")


def test_the_bootstrap_alone_would_have_said_otherwise() -> None:
    """The case of the headline that the two intervals see differently."""
    found: Difference = difference({1: 0.01, 2: 0.07, 3: 0.10}, dict.fromkeys((1, 2, 3), 0.0))
    assert found.t[0] < 0 < found.bootstrap[0]


def test_the_readme_says_what_the_runs_say() -> None:
    """Its differences are those of the CSV files, to a tenth of a point, and on the side that it says."""
    readme = " ".join((pages.REPOSITORY / "README.md").read_text(encoding="utf-8").split())

    def points(task: str, arm: str, side: str) -> str:
        runs = of_question(read_csv(pages.EVIDENCE / f"{task}.csv"), CONTROLS)
        found = minus(by_arm(runs), "top20", arm, "accuracy")
        assert f" points {side} " in told(found, arm)
        return f"{100 * abs(found.mean):.1f}"

    matched, of_all = (
        [points(task, arm, side) for task in ("demo", "sorting")]
        for arm, side in (("matched", "above"), ("all", "below"))
    )
    by_lot = [points(task, "random20", "above") for task in ("demo", "sorting")]
    assert f"by {matched[0]} and {matched[1]} points, and a plainly random fifth by {' and '.join(by_lot)}" in readme
    assert f"ends below all tokens: by {of_all[0]} points" in readme
    assert f"by {of_all[1]} points where most are" in readme
    runs = by_arm(of_question(read_csv(pages.EVIDENCE / "sorting.csv"), CONTROLS))
    unclipped = -100 * minus(runs, "unclipped", "all", "accuracy").mean
    assert f"where most are ({unclipped:.1f} without gradient clipping)" in readme
    surprisal = [points(task, "surprisal", "below") for task in ("demo", "sorting")]
    assert f"A fifth by surprisal ends {' and '.join(surprisal)} points above the fifth by entropy" in readme
    for task in ("demo", "sorting"):
        runs = by_arm(of_question(read_csv(pages.EVIDENCE / f"{task}.csv"), CONTROLS))
        assert told(minus(runs, "surprisal", "all", "accuracy"), "all").startswith("not clearly above or below")
    assert "level with all tokens as far as six seeds show" in readme
