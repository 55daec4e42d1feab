"""The mistakes of a first hour: each is named before Ray starts, with what to write, and one does not hide another."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.places import TESTS
from typer.testing import CliRunner

from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.recipes import preset_names
from entropy_fork.preflight.compose import compose_most
from entropy_fork.preflight.launcher import what_the_launcher_says
from entropy_fork.reward.judge import Verdict
from entropy_fork.verl import plugin
from entropy_fork.verl.config.words import check_words
from entropy_fork.verl.early import look
from entropy_fork.verl.early.loggers import knows_wandb_login
from entropy_fork.verl.early.reward import known_sources

Python = Callable[..., subprocess.CompletedProcess[str]]
Line = Callable[..., list[str]]

BOXED = "What is 1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."
RAW_DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1+1?"
)
REWARD = "reward.custom_reward_function"
OURS = (f"{REWARD}.path=pkg://entropy_fork.reward", f"{REWARD}.name=compute_score")


def row(prompt: Any = BOXED, source: str = "mine", truth: Any = "2") -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, "data_source": source, "reward_model": {"style": "rule", "ground_truth": truth}}


def parquet(file: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


@pytest.fixture(autouse=True)
def a_machine_of_a_newcomer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cluster's platform, nobody logged in, nothing in the working directory."""
    monkeypatch.setattr(plugin, "ON_CPU", False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_CONFIG_DIR", "NETRC", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def line(tmp_path: Path) -> Line:
    """A command line without a mistake, with further words; later words win."""

    def make(*words: str, reward: bool = True, logger: bool = True) -> list[str]:
        data = tmp_path / "data.parquet"
        if not data.exists():
            parquet(data, *[row()] * 4)
        return [
            "+entropy_fork=global", "algorithm.adv_estimator=grpo", "actor_rollout_ref.model.path=qwen3-8b",
            f"data.train_files={data}", f"data.val_files={data}", "data.train_batch_size=4",
            "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            *(OURS if reward else ()), *(["trainer.logger=[console]"] if logger else []), *words,
        ]  # fmt: skip

    return make


def said(words: list[str]) -> list[str]:
    """All that would stop a line, as plan, doctor and the launcher say it."""
    composed = compose_most(words)
    return [*composed.problems, *(each.message for each in what_the_launcher_says(composed.config) if each.fatal)]


def test_a_good_line_has_no_problem(line: Line) -> None:
    assert said(line()) == []


@pytest.mark.parametrize("recipe", [name for name in preset_names("recipe") if name != "dapo"])
def test_a_recipe_on_good_data_has_no_problem(line: Line, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "ON_CPU", recipe.endswith("_cpu"))
    files = [word for word in line() if word.startswith("data.") and "files" in word]
    machines = ["actor_rollout_ref.model.path=qwen3-8b"] + ["+cluster=paper_16x8"] * (not recipe.endswith("_cpu"))
    assert said([f"+recipe={recipe}", *machines, *files]) == []


#: the words, and what is said; {X} is a file that the test writes, see FILES
ROWS = [
    # the reward
    ("no-reward", "", r"data source 'mine', for which verl has no reward.*Write reward\.custom_reward_function\.path="),
    ("", "+R.reward_kwargs.time_out=10", r"reward_kwargs\.time_out: .*no such argument\. Did you mean timeout\?"),
    ("", "+R.reward_kwargs.timeout=-1", r"reward_kwargs\.timeout must be positive, not -1"),
    ("", "+R.reward_kwargs.timeout=soon", r"reward_kwargs=\{'timeout': 'soon'\}: TypeError"),
    ("", "R.path=/gone.py", r"custom_reward_function\.path=/gone\.py: there is no file /gone\.py"),
    ("", "R.path=pkg://gone.reward", r"there is no module gone\.reward in this environment"),
    ("", "R.name=compute_scores", r"=compute_scores: .* no function of that name\. Did you mean compute_score\?"),
    ("", "R.path={mine.py} R.name=scores", r"name=scores: .*Did you mean score\?"),
    ("no-reward", "custom_reward_function.path={mine.py}", r"old key that main_ppo does not read\. Write reward\."),
    ("", "data.train_files={dapo.parquet}", r"ask for the answer as 'Answer: …', and the reward reads \\boxed"),
    (
        "",
        "data.train_files={dapo.parquet} algorithm.filter_groups.enable=true algorithm.filter_groups.metric=acc",
        "dynamic sampling would look for a right one without end",
    ),
    (
        "",
        "algorithm.filter_groups.enable=true algorithm.filter_groups.metric=accuracy",
        r"compares algorithm\.filter_groups\.metric=accuracy\. Return it too, or write .*metric=reward",
    ),
    # names
    ("", "algorithm.adv_estimator=grpoo", r"adv_estimator=grpoo is not known\. Did you mean grpo\?"),
    ("", "actor_rollout_ref.rollout.name=vlm", r"rollout\.name=vlm is not known\. Did you mean vllm\?"),
    ("", "A.policy_loss.loss_mode=vanila", r"loss_mode=vanila .*Did you mean vanilla\?"),
    ("", "entropy_fork=off +recipe=qwen3_8b_20k A.policy_loss.loss_mode=vanila", r"=vanila is not known\. Did you"),
    ("", "reward.reward_manager.name=dappo", r"reward_manager\.name=dappo is not known\. Did you mean dapo\?"),
    ("", "trainer.v1.trainer_mode=synk", r"trainer_mode=synk is not known\. Did you mean sync\?"),
    ("", "trainer.resume_mode=atuo", r"resume_mode=atuo is not known\. Did you mean auto\?"),
    # loggers
    ("no-logger", "", r"trainer\.logger has wandb, and nobody is logged in.*WANDB_MODE=offline.*=\[console\]"),
    ("", "trainer.logger=[console,tensorbord]", r"no logger 'tensorbord'\. Did you mean tensorboard\?"),
    ("", "trainer.logger=[console,trackio]", r"the package trackio is not installed\. .*trainer\.logger=\[console\]"),
    # data and checkpoints
    ("", "data.train_files=", r"data\.train_files names no file\. Write data\.train_files=FILE\.parquet"),
    ("", "data.train_files=[]", r"data\.train_files names no file"),
    ("", "data.val_files=null", r"data\.val_files names no file"),
    ("", "data.train_files={folder}", r"folder is a folder\. Write one of its files, such as .*a\.parquet"),
    ("", "data.train_files={data}", r"there is no file .*data\. There is .*data\.parquet"),
    ("", "data.train_files=/gone.parquet", r"there is no file /gone\.parquet"),
    ("", "data.train_files={notes.txt}", r"is not a file that verl reads: its name must end in \.parquet"),
    ("", "data.train_files={questions.jsonl}", r"has no column 'prompt'; it has question\. .*data\.prompt_key=NAME"),
    ("", "data.train_files={texts.jsonl}", r"the first row's prompt is not a list of chat messages"),
    ("", "data.train_files={empty.jsonl}", r"empty\.jsonl has no row"),
    ("", "trainer.resume_mode=resume_path trainer.resume_from_path={folder}/global_step_5",
     r"there is no folder .*/global_step_5\. .*has global_step_10"),
    ("", "trainer.resume_mode=resume_path trainer.resume_from_path={folder}", r"must end in global_step_NUM"),
    ("", "trainer.resume_mode=resume_path", r"resume_path needs trainer\.resume_from_path="),
    ("", "data.custom_cls.path=gone.py data.custom_cls.name=Mine", r"custom_cls\.path=gone\.py: there is no file"),
    # whole numbers
    ("", "data.train_batch_size=64.0", r"data\.train_batch_size=64\.0 is not a whole number\. Write .*=64\."),
    ("", "actor_rollout_ref.rollout.n=16.0", r"rollout\.n=16\.0 is not a whole number\. Write .*n=16\."),
    ("", "data.max_response_length=20k", r"max_response_length=20k is not .*Write .*=20480 or .*=20000"),
    # our nodes
    ("", "entropy_fork=false", r"entropy_fork=false is not a preset\. Write entropy_fork=off, which trains on all"),
    ("", "entropy_fork=null", r"entropy_fork=null is not a preset\. Write entropy_fork=off"),
    ("", "entropy_fork=0.2", r"is not a preset\. Write entropy_fork=global entropy_fork\.top_ratio=0\.2"),
    ("", "entropy_fork=true", r"entropy_fork=true is not a preset\. Write entropy_fork=global"),
    ("", "+entropy_fork=globl", r"globl: there is no such preset\. Did you mean global\? Presets: (?!.*schema)"),
    ("", "entropy_fork.top_ratio=null", r"top_ratio=null is not a number\. Write entropy_fork\.top_ratio=0\.2"),
    ("", "entropy_fork.top_ratio=20%", r"top_ratio=20% is not a number\. Write entropy_fork\.top_ratio=0\.2\."),
    ("", "entropy_fork.top_ratio=[0.1,0.2]", r"is not a number\. Write one value: .*=0\.1\. .*-m .*=0\.1,0\.2"),
    ("", "entropy_fork.top_ration=0.1", r"entropy_fork has no key 'top_ration'\. Did you mean top_ratio\? Keys"),
    ("", "entropy_fork.top_ratio=2", r"top_ratio must be in \(0, 1\]"),
    ("no-preset", "entropy_fork.top_ratio=0.1", r"a node that is not there\. Add \+entropy_fork=global to the line"),
    ("no-preset", "entropy_fork=global", r"the line has none\. Write \+entropy_fork=global\."),
    ("", "+entropy_fork_guards=true", r"is not a preset\. Write \+entropy_fork_guards=on"),
    ("", "+recipe=qwen3_8b_20", r"Could not find 'recipe/qwen3_8b_20'.*Did you mean qwen3_8b_20k\?"),
]  # fmt: skip

FILES: dict[str, Callable[[Path], object]] = {
    "mine.py": lambda file: file.write_text("def score(data_source, solution_str, ground_truth, extra_info): return 1"),
    "dapo.parquet": lambda file: parquet(file, *[row(RAW_DAPO)] * 4),
    "notes.txt": lambda file: file.write_text("1+1"),
    "questions.jsonl": lambda file: file.write_text(json.dumps({"question": "1+1"})),
    "texts.jsonl": lambda file: file.write_text(json.dumps({**row(), "prompt": "1+1"})),
    "empty.jsonl": lambda file: file.write_text(""),
    "folder": lambda file: (file / "global_step_10").mkdir(parents=True) or parquet(file / "a.parquet", row()),
    "data": lambda _: None,
}


def written(words: str, folder: Path) -> list[str]:
    """The words, with the files that they name."""

    def write(match: re.Match[str]) -> str:
        FILES[match[1]](folder / match[1])
        return str(folder / match[1])

    long = words.replace("R.", f"{REWARD}.").replace(" A.", " actor_rollout_ref.actor.")
    long = re.sub(r"^A\.", "actor_rollout_ref.actor.", long)
    return re.sub(r"\{([\w.]+)\}", write, long).split()


@pytest.mark.parametrize(("base", "words", "match"), ROWS, ids=[f"{base}{words}" for base, words, _ in ROWS])
def test_a_mistake_is_named_before_ray(line: Line, tmp_path: Path, base: str, words: str, match: str) -> None:
    start = line(reward=base != "no-reward", logger=base != "no-logger")
    if base == "no-preset" or "+entropy_fork=" in words or "+recipe" in words:
        start = [word for word in start if word != "+entropy_fork=global"]
    more = written(words, tmp_path)
    if "+recipe=qwen3_8b_20k" in more:
        more = ["+recipe=qwen3_8b_20k", "+cluster=paper_16x8", *(word for word in more if word[0] != "+")]
    found = said([*start, *more])
    assert sum(bool(re.search(match, message)) for message in found) == 1, found
    assert not any("Traceback" in message for message in found)


def test_all_mistakes_of_a_line_are_named_at_once(line: Line) -> None:
    found = said(
        line(
            "algorithm.adv_estimator=grpoo", "entropy_fork.top_ration=0.1", "entropy_fork.select=best",
            "trainer.nodes=2", "data.train_batch_size=64.0", "data.train_files=/gone.parquet",
            f"+{REWARD}.reward_kwargs.time_out=10", "trainer.use_v1=false",
            "algorithm.rollout_correction.bypass_mode=true", logger=False,
        )
    )  # fmt: skip
    for part in (
        "grpoo", "top_ration", "trainer.nodes", "64.0", "/gone.parquet", "time_out", "wandb", "use_v1=False",
        "bypass_mode=True", "select must be",
    ):  # fmt: skip
        assert sum(part in message for message in found) == 1, (part, found)


def test_the_launchers_error_lists_all(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """In verl's ``validate_config``, as main_ppo calls it."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = compose_most(
        line("algorithm.adv_estimator=grpoo", "actor_rollout_ref.actor.loss_agg_mode=mean", "trainer.use_v1=false")
    ).config
    monkeypatch.setattr(look, "is_asked_for", lambda _: True)
    with pytest.raises(EntropyForkError) as error:
        validate_config(config, need_reference_policy(config), need_critic(config))
    assert len(error.value.problems) == 4  # loss_agg_mode is wrong for verl and for us
    for part in ("grpoo", "Invalid loss_agg_mode: mean", "not known to entropy_fork", "trainer.use_v1=False"):
        assert part in str(error.value)


def test_a_run_that_asks_for_nothing_of_ours_is_not_looked_at(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import verl.trainer.main_ppo as main_ppo

    monkeypatch.setitem(sys.modules, "__main__", main_ppo)
    asked = compose_most(line()).config
    assert look.is_asked_for(asked)
    for words in (["~entropy_fork"], ["entropy_fork=off"]):
        config = compose_most(line(*words) if words[0] != "~entropy_fork" else line()[1:]).config
        assert not look.is_asked_for(config), words
    guarded = compose_most(line("entropy_fork=off", "+entropy_fork_guards=on")).config
    assert look.is_asked_for(guarded)
    estimator = compose_most(line("algorithm.adv_estimator=reward_to_go")[1:]).config
    assert look.is_asked_for(estimator)


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["+entropy_fork=global", "entropy_fork.top_ratio=0.1"], 0),
        (["+entropy_fork.top_ratio=0.1"], 0),
        (["+recipe=demo_cpu", "entropy_fork=off", "entropy_fork_guards.patience_s=0"], 0),
        (["+recipe=dapo", "entropy_fork.top_ratio=0.1"], 1),
        (["+entropy_fork=global", "entropy_fork.top_ratio=0.1,0.2", "entropy_fork.select=choice(top,bottom)"], 0),
        (["+entropy_fork=global", 'entropy_fork.where="advantage > 0"', "entropy_fork.observe=[rsi,omega]"], 0),
        (["+entropy_fork=global", "entropy_fork.score=entropy,surprisal,my_pkg.scores:mine"], 0),
        (["+entropy_fork=global", "entropy_fork.where=advantage > 0", "entropy_fork.observe=rsi"], 2),
        (["+entropy_fork=global,off"], 0),
        (["+entropy_fork=global,of"], 1),
        (["+entropy_fork=global", "entropy_fork.top_ratio=0.1,most"], 1),
        (["+entropy_fork=global", "entropy_fork.dump_dir=null", "entropy_fork.seed=${data.seed}"], 0),
        (["+mine=masked", "entropy_fork.top_ratio=0.1"], 0),  # a group of the user's may bring the node
        (["~entropy_fork", "my.entropy_fork=false", "+entropy_fork@trainer=global"], 0),
    ],
)
def test_words_about_our_nodes(words: list[str], problems: int) -> None:
    assert len(check_words(words).problems) == problems, check_words(words).problems


def test_a_condition_without_hydras_quotes_is_answered_with_them() -> None:
    (problem,) = check_words(["+entropy_fork=global", "entropy_fork.where=advantage > 0"]).problems
    assert problem.endswith("""'entropy_fork.where="advantage > 0"'.""")


@pytest.mark.parametrize("preset", ["off", "bottom80", "global"])
def test_a_preset_without_its_plus_is_still_the_one_that_was_meant(preset: str) -> None:
    """What ``plan`` says of the mask, beside the error, is that of this preset."""
    found = check_words(["a=1", f"entropy_fork={preset}"])
    assert found.problems == [
        f"entropy_fork={preset} changes a preset, and the line has none. Write +entropy_fork={preset}."
    ]
    assert found.repaired == ["a=1", f"+entropy_fork={preset}"]
    assert check_words(["entropy_fork=globl"]).repaired == ["+entropy_fork=global"]


def test_a_preset_of_the_users_own() -> None:
    found = check_words(["+entropy_fork=mine"], lambda group, option: (group, option) == ("entropy_fork", "mine"))
    assert found.problems == []


def test_who_is_logged_in(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert not knows_wandb_login(home)
    for variables in ({"WANDB_API_KEY": "x"}, {"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}):
        assert knows_wandb_login({**home, **variables})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert knows_wandb_login(home)
    assert not knows_wandb_login({**home, "WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert knows_wandb_login({**home, "WANDB_BASE_URL": "https://wandb.example.org"})


def test_a_login_that_ray_brings_along_counts(line: Line) -> None:
    variables = "+ray_kwargs.ray_init.runtime_env={env_vars:{WANDB_MODE:offline}}"
    assert said(line(variables, logger=False)) == []


def test_the_data_sources_that_verls_own_reward_knows() -> None:
    from verl.utils.reward_score import default_compute_score

    knows = known_sources(default_compute_score)
    assert knows is not None
    assert all(knows(source) for source in ("openai/gsm8k", "math_dapo", "aime2025", "hiyouga/geometry3k", "taco"))
    assert not any(knows(source) for source in ("dapo_math_17k", "mine", ""))
    for unknown in ("dapo_math_17k", "mine"):
        with pytest.raises(NotImplementedError):
            default_compute_score(unknown, "", "")


def test_verls_own_reward_on_its_own_data_has_no_problem(line: Line, tmp_path: Path) -> None:
    for source, prompt in (
        ("openai/gsm8k", 'Let\'s think step by step and output the final answer after "####".'),
        ("math_dapo", RAW_DAPO),
        ("math_dapo", BOXED),  # verl reads both
        ("lighteval/MATH", BOXED),
    ):
        file = parquet(tmp_path / "verls.parquet", *[row(prompt, source)] * 4)
        assert said(line(f"data.train_files={file}", f"data.val_files={file}", reward=False)) == [], source
    file = parquet(tmp_path / "verls.parquet", *[row(BOXED, "openai/gsm8k")] * 4)
    (message,) = said(line(f"data.train_files={file}", f"data.val_files={file}", reward=False))
    assert "as \\boxed{…}, and the reward reads '#### …'" in message


@pytest.mark.process
@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("def score(data_source, solution_str, ground_truth, extra_info, scale=1): return {'score': 1.0}", None),
        ("async def score(data_source, solution_str, ground_truth, extra_info, **kwargs): return 0.5", None),
        ("import gone\ndef score(): pass", "cannot be loaded: ModuleNotFoundError: No module named 'gone'"),
        ("def score(solution_str, ground_truth, scale=1): return 1", "does not take data_source, extra_info"),
        ("def score(data_source, solution_str, ground_truth, extra_info): return 1", "kwargs.scale: .*no such"),
        (
            "def score(data_source, solution_str, ground_truth, extra_info, scale, url): return 1",
            r"needs url, which nobody gives\. Write \+reward\.custom_reward_function\.reward_kwargs\.url=VALUE",
        ),
        (
            "def score(data_source, solution_str, ground_truth, extra_info, scale): return {}[data_source]",
            r"made-up answer to the first row of .*data\.parquet, raised KeyError: 'mine'",
        ),
        (
            "def score(data_source, solution_str, ground_truth, extra_info, scale): return {'acc': 1.0}",
            "returned a dict without the key 'score': it has acc",
        ),
        (
            "def score(data_source, solution_str, ground_truth, extra_info, scale): return None",
            "returned 'None', which is not a number",
        ),
        (
            "import os\ndef score(data_source, solution_str, ground_truth, extra_info, scale): os._exit(3)",
            "ended its process: exit status 3",
        ),
    ],
)  # fmt: skip
def test_a_reward_function_of_the_users_own(line: Line, tmp_path: Path, source: str, match: str | None) -> None:
    (tmp_path / "mine.py").write_text(source)
    own = (f"{REWARD}.path={tmp_path}/mine.py", f"{REWARD}.name=score", f"+{REWARD}.reward_kwargs.scale=2")
    found = said(line(*own, reward=False))
    assert bool(found) == (match is not None), found
    if match is not None:
        (message,) = found
        assert re.search(match, message), message


@pytest.mark.process
def test_a_reward_function_without_an_end_is_a_note(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropy_fork.verl.early.reward.SECONDS", 2.0)
    (tmp_path / "mine.py").write_text("import time\ndef score(**_): time.sleep(600)")
    config = compose_most(line(f"{REWARD}.path={tmp_path}/mine.py", f"{REWARD}.name=score", reward=False)).config
    (problem,) = what_the_launcher_says(config)
    assert not problem.fatal
    assert "had not scored one answer after 2 s" in problem.message


def test_an_option_that_plan_does_not_have(line: Line) -> None:
    run = CliRunner().invoke(app, ["plan", *line(), "--foo"])
    assert run.exit_code == 1
    assert "'plan' has no option --foo. Its options: --config-name, --config-dir" in " ".join(run.output.split())
    assert "Traceback" not in run.output


def test_a_folder_of_the_users_own(line: Line, tmp_path: Path) -> None:
    (tmp_path / "conf" / "mine").mkdir(parents=True)
    (tmp_path / "conf" / "mine" / "masked.yaml").write_text("# @package _global_\nentropy_fork: {top_ratio: 0.3}\n")
    words = ["plan", "--config-dir", str(tmp_path / "conf"), *line("+mine=masked")[1:], "--json"]
    run = CliRunner().invoke(app, words)
    assert "30% of the response tokens" in json.loads(run.stdout)["mask"], run.output
    run = CliRunner().invoke(app, ["plan", "--config-dir", "gone", "+mine=masked"])
    assert "--config-dir=gone: there is no such folder" in " ".join(run.output.split())


@pytest.mark.process
def test_the_real_launcher(python: Python, line: Line) -> None:
    """One process each: words that Hydra would refuse, and what validate_config finds; all of it at once."""
    main = ("-m", "verl.trainer.main_ppo", "hydra.run.dir=hydra")
    wrong = ("algorithm.adv_estimator=grpoo", "entropy_fork.top_ration=0.1", "trainer.nodes=2")
    child = python(*main, *line(*wrong, logger=False), VERL_PLATFORM="")
    assert child.returncode == 1
    for part in ("4 problems", "no key 'top_ration'. Did you mean top_ratio?", "grpoo", "trainer.nodes", "wandb"):
        assert part in child.stderr, child.stderr[-3000:]
    assert "Traceback" not in child.stderr
    child = python(*main, *line("algorithm.adv_estimator=grpoo", logger=False), VERL_PLATFORM="")
    assert child.returncode == 1
    for part in ("2 problems", "Did you mean grpo?", "nobody is logged in"):
        assert part in child.stderr, child.stderr[-3000:]
    assert "ray init kwargs" not in child.stdout


@pytest.mark.process
def test_the_real_launcher_takes_a_good_line(python: Python, line: Line) -> None:
    """main_ppo up to the start of Ray, with the checks on: it is the program, and the line asks for a mask."""
    lines = [line(), line("algorithm.adv_estimator=grpoo"), line("algorithm.adv_estimator=grpoo")[1:]]
    child = python(str(TESTS / "helpers" / "stock_lines.py"), json.dumps(lines), VERL_PLATFORM="")
    (reply,) = [said for said in child.stderr.splitlines() if said.startswith("VERDICTS ")] or [child.stderr[-3000:]]
    good, wrong, not_asked = json.loads(reply.removeprefix("VERDICTS "))["verdicts"]
    assert "top_ratio: 0.2" in good["config"]
    assert "Did you mean grpo?" in wrong["message"]
    assert "config" in not_asked


@pytest.mark.parametrize("installed", [True, False])
def test_generated_rows_are_scored_as_in_the_run(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """Their scorer is another package, which a run would miss when the first answers are scored."""
    from entropy_fork.reward import reasoning_gym

    data = parquet(tmp_path / "sums.parquet", *[row(source="reasoning_gym/chain_sum")] * 4)
    found = importlib.util.find_spec("json") if installed else None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "reasoning_gym" else find(name, *rest)
    )
    monkeypatch.setattr(reasoning_gym, "judges", lambda *_: SimpleNamespace(compare=lambda *_: Verdict(True, True)))
    reasoning_gym._check.cache_clear()
    messages = said(line(f"data.train_files={data}", f"data.val_files={data}"))
    reasoning_gym._check.cache_clear()
    if installed:
        assert messages == []
    else:
        (message,) = messages
        assert re.search(
            r"sums\.parquet.*reasoning_gym is not installed\. Install the extra: .*\[reasoning-gym", message
        )
