"""Attacks on every input, really executed, to test what docs/reference/security.md promises.

``test_report.py`` tests the page's escaping and its Content-Security-Policy, ``test_reward.py`` endless and very large
answers.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.browser import browser, open_page
from helpers.fork_model import LETTERS, random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from entropy_fork.analysis import results
from entropy_fork.analysis.summary import summarise
from entropy_fork.cli import app
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.foreign_text import figure_label, markdown_cell, spreadsheet_cell, visible
from entropy_fork.evaluation import evaluate as evaluation
from entropy_fork.evaluation.answer_store import AnswerStore
from entropy_fork.evaluation.checkpoint import Checkpoint
from entropy_fork.evaluation.engines import SamplingSettings
from entropy_fork.evaluation.results import TextTable
from entropy_fork.report.figures import file_name
from entropy_fork.reward import compute_score, judge
from entropy_fork.reward.judge import judges
from entropy_fork.sweep import jobs as sweep
from entropy_fork.tokens.store import AnswerTokens, write_manifest, write_part
from entropy_fork.verl.config import EntropyForkConfig
from entropy_fork.verl.token_dump import TokenDump

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


# ---- the source: nothing in it could make code of data ---------------------------------------------------------------

#: calls that are allowed as exceptions: file, call, reason
ALLOWED = {
    ("entropy_fork/preflight/model_shape.py", "trust_remote_code"): "plan: the value of the run's own config",
    ("entropy_fork/evaluation/evaluate.py", "trust_remote_code"): "the value that the user gives vLLM, or False",
    ("entropy_fork/evaluation/tokenizer.py", "trust_remote_code"): "the value that the user gives vLLM, or False",
    (
        "entropy_fork/analysis/draw_answers.py",
        "pickle.load",
    ): "vLLM's process reads what its parent wrote, from their pipe",
    ("entropy_fork/verl/cpu/cpu_platform.py", "from_pretrained"): "hands on verl's own arguments",
    (
        "entropy_fork/verl/cpu/worker_shim.py",
        "os.execv",
    ): "becomes this Python with Ray's arguments, without a shell",
}

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = re.compile(
    r"(c?pickle|cloudpickle|dill|marshal|joblib)\.(loads?|Unpickler)|shelve\.open|yaml\.(load|unsafe_load|full_load)(_all)?"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawnp?)|subprocess\.(getoutput|getstatusoutput)|tempfile\.mktemp"
    r"|(sympy\.)?(sympify|parse_expr|lambdify)|ctypes\.pythonapi\.\w+|asyncio\.create_subprocess_shell"
)


def findings(source: str) -> Iterator[str]:
    """The calls in a Python file that could run the text that they read."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given_values = {keyword.arg: keyword.value for keyword in call.keywords}
        constants = {key: value.value for key, value in given_values.items() if isinstance(value, ast.Constant)}
        if name in FORBIDDEN_NAMES or FORBIDDEN_CALLS.fullmatch(name):
            yield name
        if name == "torch.load" and constants.get("weights_only") is not True:
            yield "torch.load"
        if name.endswith(("np.load", "numpy.load")) and constants.get("allow_pickle", False) is not False:
            yield "np.load"
        if "shell" in given_values and constants.get("shell") is not False:
            yield "shell"
        if "trust_remote_code" in given_values and constants.get("trust_remote_code") is not False:
            yield "trust_remote_code"
        if re.fullmatch(r"Auto\w+\.from_pretrained", name) and "trust_remote_code" not in given_values:
            yield "from_pretrained"  # asks on the terminal whether to run a model's own code
        if name.endswith("Environment") and constants.get("autoescape") is not True:
            yield "autoescape"


def test_no_source_file_runs_what_it_reads() -> None:
    found, files = [], 0
    for folder in ("entropy_fork", "hydra_plugins", "examples", "benchmarks"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            files += 1
            place = file.relative_to(REPOSITORY).as_posix()
            found += [(place, what) for what in findings(file.read_text(encoding="utf-8"))]
    assert files > 80
    assert set(found) == set(ALLOWED), "each exception has its reason in ALLOWED"
    template = (REPOSITORY / "entropy_fork/report/template.html").read_text(encoding="utf-8")
    assert set(re.findall(r"\{\{ (\w+) \| safe \}\}", template)) == {"sheet", "script", "data"}
    script = (REPOSITORY / "entropy_fork/report/page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|setAttribute\(\"on",
                         script)  # fmt: skip


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("eval(x)", "eval"),
        ("exec(x)", "exec"),
        ("import pickle\npickle.loads(x)", "pickle.loads"),
        ("yaml.load(x)", "yaml.load"),
        ("torch.load(x)", "torch.load"),
        ("torch.load(x, weights_only=False)", "torch.load"),
        ("np.load(x, allow_pickle=True)", "np.load"),
        ("subprocess.run(x, shell=True)", "shell"),
        ("os.system(x)", "os.system"),
        ("load_dataset(x, trust_remote_code=True)", "trust_remote_code"),
        ("AutoConfig.from_pretrained(x)", "from_pretrained"),
        ("jinja2.Environment()", "autoescape"),
        ("sympy.sympify(x)", "sympy.sympify"),
        ("model.eval()\nre.compile(x)\ntorch.load(x, weights_only=True)\nyaml.safe_load(x)", None),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, what: str | None) -> None:
    assert list(findings(source)) == ([] if what is None else [what])


# ---- the reward: an answer is never code -----------------------------------------------------------------------------


def spelt(text: str) -> str:
    """A Python expression for a text, without quotes, spaces and capitals, which math-verify would not let through."""
    return "+".join(f"chr({ord(character)})" for character in text)


def hostile_answers(canary: Path) -> dict[str, str]:
    """Contents of boxes that try to make a file. With math-verify 0.9 and sympy 1.14 the sums did, until refused."""
    call = f"open({spelt(str(canary))},chr(119))"
    quoted = f"__import__('os').system('touch {canary}')"
    total = r"\sum_{n=0}^{\infty} \frac{%s^n}{n!}"
    return {
        "sum": total % f"\\bar{{)\r{call}\r(1}}",
        "sum in a set": r"\{" + total % f"\\hat{{)\r{call}\r(1}}" + r",\pi\}",
        "sum of a function": total % f"\\mathcal{{ieus({call})}}",
        "sum of a call without brackets": total % f"\\text{{[{call}]}}",
        "product": r"\prod_{n=0}^{5} \bar{)" + f"\r{call}\r(1}}",
        "integral": r"\int_0^1 \tilde{" + call + r"} dx",
        "limit": r"\lim_{x \to 0} \frac{\sin \vec{" + call + "}}{x}",
        "equation": r"\dot{" + call + r"} = x^5 - x - 1",
        "derivative": r"\frac{d}{dx} \mathrm{" + call + "}",
        "python": quoted,
        "text": rf"\text{{{quoted}}}",
        "operator": rf"\operatorname{{{quoted}}}(1)",
        "function": rf"f_{{{quoted}}}(x)",
        "gcd": rf"\gcd({quoted}, 2)",
        "matrix": rf"\begin{{pmatrix}} {quoted} & 1 \\ 2 & 3 \end{{pmatrix}}",
        "sympify": "1e3j.__class__",
        "lambda": f"(lambda: {quoted})()",
        "format": "{0.__class__.__mro__}",
        "percent": "%(x)s%n",
        "template": "{{ self.__init__.__globals__ }}",
        "input": r"\input{/etc/passwd}\write18{touch " + str(canary) + "}",
    }


def children_of(pids: list[int]) -> list[str]:
    return [
        (folder / "stat").read_text()
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "stat").exists() and int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) in pids
    ]


@pytest.mark.process
def test_a_hostile_answer_does_nothing_and_is_wrong(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pool = judges(1, 512)
    assert pool.compare(r"\sqrt{8}", r"2\sqrt{2}", 5).equal
    for name, answer in hostile_answers(canary).items():
        for truth in (r"3\sqrt{2}+1", r"\{1,2\}", r"x+\pi"):
            begin = time.monotonic()
            score = compute_score("any", rf"\boxed{{{answer}}}", truth, timeout=3, processes=1, memory_mib=512)
            assert score["acc"] == 0, (name, truth)
            # Use the text as the ground truth of a hostile data set too.
            score = compute_score("any", r"\boxed{\sqrt{2}}", answer, timeout=3, processes=1, memory_mib=512)
            assert score["acc"] == 0, (name, truth)
            assert time.monotonic() - begin < 2 * (3 * judge.WALL_FACTOR + 5), name
            assert not canary.exists(), name
            assert not children_of([child._process.pid for child in pool._children]), name
    assert pool.compare(r"\sqrt{98}", r"7\sqrt{2}", 5).equal


#: Python code for a process in which text may not become code; FILE is the path of the canary
ATTEMPTS = {
    "eval": "eval(f'open({FILE!r}, chr(119))')",
    "exec": "exec(f'open({FILE!r}, chr(119))')",
    "compiled before it was forbidden": "exec(COMPILED)",
    "sympify": "import sympy; sympy.sympify(f'open({FILE!r}, chr(119))')",
    "number": "import sympy; sympy.Number(f'[open({FILE!r}, chr(119))]')",
    "name in lambdify": "import sympy; from sympy.utilities.lambdify import lambdify; x = sympy.Symbol('x');"
    "lambdify(x, x + sympy.Symbol(f'open({FILE!r}, chr(119))'))(1)",
    "a class that writes its own source": "import collections; collections.namedtuple('A', 'b')",
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_text_cannot_become_code_in_a_process_of_the_reward(
    attempt: str, python: Callable[..., Any], tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    prepared = f"FILE = {str(canary)!r}\nCOMPILED = compile(f'open({{FILE!r}}, chr(119))', 'text', 'exec')\n"
    guarded = prepared + "from entropy_fork.reward.judge import _refuse_code_from_text\n_refuse_code_from_text()\n"
    result = python("-c", guarded + attempt)
    assert "PermissionError: text would become code" in result.stderr, result.stderr
    assert not canary.exists()
    # the attack works without our defence, else the test would show nothing
    unguarded = python("-c", prepared + attempt + "\nprint('ran')")
    assert canary.exists() or ("namedtuple" in attempt and unguarded.stdout == "ran\n")


def test_what_sympy_needs_to_compile_still_works(python: Callable[..., Any]) -> None:
    result = python(
        "-c",
        r"""
from entropy_fork.reward.judge import _refuse_code_from_text, compare
compare("x", "1")
_refuse_code_from_text()
import sympy
import sympy.stats, colorsys  # imports compile
for number in ("12", "12 ", "0.5", ".5", "12.", "1.5e3", "1e-7"):
    assert float(sympy.Number(number)) == float(number), number
x = sympy.Symbol("x")
sympy.ring("a,b,c,d,e", sympy.QQ)[1] ** 3
sympy.hyperexpand(sympy.hyper([1], [2], x))
assert compare(r"\sum_{n=0}^{\infty} \frac{1}{n!} + \sqrt{2}", r"e+\sqrt{2}").equal
assert compare(r"\sum_{n=0}^{\infty} \frac{2^n}{n!}", "e^2").equal
assert compare(r"\sum_{n=1}^{\infty} \frac{n}{3^n}", r"\frac{3}{4}").equal
assert compare("x^5-x+1=0", "x^5=x-1").equal
print("done")
""",
    )
    assert result.stdout == "done\n", result.stderr


def test_an_answer_that_would_have_been_run_counts_as_stopped(python: Callable[..., Any], tmp_path: Path) -> None:
    """In the loop that serves requests, the comparison is replaced by one that evaluates its input."""
    request = json.dumps([f"[open({str(tmp_path / 'canary')!r}, 'w')]", "1", 5])
    result = python(
        "-c",
        f"""
import io, sys
from entropy_fork.reward import judge
judge.compare = lambda answer, truth: judge.Verdict(answer.startswith("[") and bool(eval(answer)), True)
sys.stdin = io.StringIO({request!r} + chr(10))
judge.serve(2048)
""",
    )
    verdict = '[[false, false, true, "text would have become code", 0.0], false]'
    assert result.stdout.splitlines() == ["ready", verdict], result.stderr
    assert not (tmp_path / "canary").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ("9**9**9**9", 1),
        ("{" * 100_000 + "}" * 100_000, 5),
        ("\x00" * 900, 1),
        ("\ud800" * 900 + "\udfff", 1),
        (r"\frac{1}" * 120, 1),
        (r"10^{10^{10^{10}}}!", 1),
        (r"\begin{matrix}" * 60, 1),
        (r"\text{" + "\r\n\v\f\x85\u2028\u2029" * 100 + "}", 1),
    ],
)
def test_the_time_of_a_hostile_answer_is_bounded(answer: str, seconds: float) -> None:
    compute_score("any", r"\boxed{x}", r"y", processes=1, memory_mib=512)  # a child is running
    begin = time.monotonic()
    score = compute_score("any", rf"\boxed{{{answer}}}", r"3\sqrt{2}+1", timeout=1, processes=1, memory_mib=512)
    assert score["acc"] == 0
    assert time.monotonic() - begin < 2 * (seconds * judge.WALL_FACTOR + 5)


pieces_of_latex = st.sampled_from(
    [
        r"\frac",
        r"\sum_{n=0}^{\infty}",
        r"\hat{",
        r"\text{",
        "{",
        "}",
        "^",
        "_",
        "(",
        ")",
        ",",
        "=",
        "1",
        "x",
        r"\pi",
        "\r",
    ]
)


@pytest.mark.process
@settings(max_examples=60)
@given(st.one_of(st.text(max_size=40), st.lists(pieces_of_latex, max_size=12).map("".join)))
@example("\ud800\x00\u2028")
def test_any_answer_gets_a_score(text: str) -> None:
    score = compute_score("any", f"\\boxed{{{text}}}", r"\sqrt{2}", timeout=1, processes=1, memory_mib=512)
    assert set(score) == {"score", "acc", "format", "stopped"}
    assert set(score.values()) <= {0.0, 1.0}


def test_long_answers_are_not_kept() -> None:
    """A cache by answer must not grow when all answers are new and have 100,000 characters."""
    from entropy_fork.reward import score as reward

    before = [cache.cache_info().currsize for cache in (reward._judged, reward.plain_number)]
    for number in range(20):
        compute_score("any", rf"\boxed{{{'7' * 100_000}{number}}}", "3")
    assert [cache.cache_info().currsize for cache in (reward._judged, reward.plain_number)] == before


# ---- checkpoints and models: weights are weights ---------------------------------------------------------------------


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.parquet", "aime24")


def write_data(file: Path, source: str) -> Path:
    row = {
        "data_source": source,
        "prompt": [{"role": "user", "content": "1+1"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
    }
    pq.write_table(pa.Table.from_pylist([row] * 2), file)
    return file


def evaluating(model: Path, data: Path, output: Path, **changes: Any) -> evaluation.EvaluationSettings:
    sampling = SamplingSettings(max_tokens=8)
    return evaluation.EvaluationSettings(
        model, [data], output, answers=2, engine="transformers", sampling=sampling, **changes
    )


@pytest.mark.process
def test_a_hostile_shard_is_not_unpickled(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's merger, called as in all our commands, does not unpickle it, whatever the environment variables are."""
    canary, actor = tmp_path / "canary", tmp_path / "global_step_1" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    for file in model.iterdir():
        if not file.name.endswith(".safetensors"):
            (actor / "huggingface" / file.name).write_bytes(file.read_bytes())
    (actor / "fsdp_config.json").write_text('{"world_size": 1}')
    shard = actor / "model_world_size_1_rank_0.pt"
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2), "a": Touch(canary)}, shard)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(EntropyForkError, match=r"has posix\.mkdir in it, which could run code and was not loaded"):
        evaluation.evaluate(evaluating(actor, data, tmp_path / "out"), QUIET)
    assert not canary.exists()
    torch.load(shard, weights_only=False)  # verl's merger by itself does it
    assert canary.exists()


@pytest.mark.parametrize("size", ["1000000000000", "-1", '"../../x"', "null", "1.5"])
def test_a_hostile_number_of_shards_is_refused(size: str, tmp_path: Path) -> None:
    (tmp_path / "fsdp_config.json").write_text(f'{{"world_size": {size}}}')
    with pytest.raises(EntropyForkError, match="has no valid number of ranks"):
        Checkpoint.find(tmp_path)


def test_a_hostile_pickle_of_weights_is_not_unpickled(model: Path, data: Path, tmp_path: Path) -> None:
    canary, hostile = tmp_path / "canary", tmp_path / "hostile"
    hostile.mkdir()
    for file in model.iterdir():
        if not file.name.endswith(".safetensors"):
            (hostile / file.name).write_bytes(file.read_bytes())
    torch.save({"model.embed_tokens.weight": Touch(canary)}, hostile / "pytorch_model.bin")
    with pytest.raises(EntropyForkError, match=r"has posix\.mkdir in it, which could run code and was not loaded"):
        evaluation.evaluate(evaluating(hostile, data, tmp_path / "out"), QUIET)
    assert not canary.exists()
    torch.load(hostile / "pytorch_model.bin", weights_only=False)
    assert canary.exists()


def test_a_models_own_code_is_not_run(model: Path, data: Path, tmp_path: Path) -> None:
    canary, hostile = tmp_path / "canary", tmp_path / "hostile"
    hostile.mkdir()
    for file in model.iterdir():
        (hostile / file.name).write_bytes(file.read_bytes())
    config = json.loads((hostile / "config.json").read_text())
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (hostile / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": classes}))
    (hostile / "mine.py").write_text(
        f"import os\nos.mkdir({str(canary)!r})\nfrom transformers import Qwen3Config\n"
        "class Config(Qwen3Config): model_type = 'mine'\n"  # a new class: transformers marks the class that it loads
    )
    with pytest.raises(EntropyForkError, match="brings Python code of its own"):
        evaluation.evaluate(evaluating(hostile, data, tmp_path / "out"), QUIET)
    rollouts = tmp_path / "rollouts"
    rollouts.mkdir()
    (rollouts / "1.jsonl").write_text('{"input": "1+1", "output": "2", "score": 1}\n')
    result = CliRunner().invoke(
        app, ["analyze", str(hostile), "--rollouts", str(rollouts), "--output", str(tmp_path / "an")]
    )
    assert result.exit_code == 1
    assert "brings Python code of its own" in result.output
    assert not canary.exists()
    from transformers import AutoConfig

    AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert canary.exists(), "the code runs for those who say that they trust it"


def test_a_chat_template_stays_in_its_sandbox(model: Path, data: Path, tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(EntropyForkError, match="chat template cannot be applied: SecurityError"):
        evaluation.evaluate(evaluating(model, data, tmp_path / "out", chat_template=template), QUIET)
    # and the text of a question is no template
    row = {"data_source": "x", "prompt": [{"role": "user", "content": "{{ 7 * 7 }}"}],
           "reward_model": {"ground_truth": "1"}}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    from transformers import AutoTokenizer

    from entropy_fork.evaluation.questions import read_questions

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    (ids,) = evaluation.prompts(tokenizer, read_questions([tmp_path / "t.parquet"]), None)
    assert list(ids) == [LETTERS.index(letter) if letter in LETTERS else 0 for letter in "{{ 7 * 7 }}="]


# ---- paths: what comes from data names no file -----------------------------------------------------------------------

HOSTILE_NAMES = [
    "../../escape", "/tmp/escape", "..", ".", "a/b", "a\\b", "~/x", "$HOME", "`id`", "a\x00b", "x" * 300, "\ud800", "",
    "-rf", "con\n\r", "\u202egpj.exe", "%2e%2e%2f",
]  # fmt: skip


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_data_source_names_no_file(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    data = write_data(home / "data.parquet", "../../escape")
    arguments = ["--data", str(data), "--output", str(home / "out"), "--answers", "2", "--max-tokens", "8"]
    result = CliRunner().invoke(app, ["evaluate", str(model), *arguments, "--engine", "transformers"])
    assert result.exit_code == 0, result.output
    assert "../../escape" in (home / "out" / "results.md").read_text().replace("\\", "")
    made = {"a", "a/b", "a/b/data.parquet", "a/b/out"}
    made |= {f"a/b/out/{name}" for name in ("answers.jsonl", "manifest.json", "results.json", "results.md")}
    assert tree(tmp_path) == made


@given(st.one_of(st.sampled_from(HOSTILE_NAMES), st.text()))
def test_names_become_harmless_names_of_files(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9-]*", file_name("curve", name))
    form = sweep.short_form([f"trainer.experiment_name={name}", f"+{name}=1"])
    assert "/" not in form
    assert "\x00" not in form
    assert len(form.encode()) <= 100
    assert form not in ("", ".", "..")
    assert Path("/sweep", form).resolve().parent == Path("/sweep")


def test_nothing_is_written_over_what_is_not_ours(tmp_path: Path) -> None:
    """Data, tokens and answers each have a manifest.json. None is accepted as that of another kind."""
    prepared = tmp_path / "data"
    prepared.mkdir()
    (prepared / "manifest.json").write_text('{"source": "aime24", "rows_out": 30}')
    (prepared / "merged").mkdir()
    tokens = tmp_path / "tokens"
    write_manifest(tokens, {"source": "model", "identity": {}})
    for folder in (prepared, tokens):
        before = (folder / "manifest.json").read_text()
        with pytest.raises(EntropyForkError, match="is not of an evaluation: choose another folder"):
            AnswerStore(folder, {"model": "x"})
        config = SimpleNamespace(trainer=None, actor_rollout_ref=None)
        with pytest.raises(EntropyForkError, match=r"manifest of something else|other tokens than those of a training"):
            TokenDump(config, EntropyForkConfig(dump_every=1, dump_dir=str(folder)), None).start()
        assert (folder / "manifest.json").read_text() == before
        assert "answers.jsonl" not in tree(folder)


def test_a_symbolic_link_is_not_followed_out_of_a_folder(tmp_path: Path) -> None:
    """'data prepare --overwrite', and the writing of a file, replace a link and do not change its target."""
    from entropy_fork.common.output_folder import write_whole
    from entropy_fork.data.prepare import put_in_place

    elsewhere, new = tmp_path / "elsewhere", tmp_path / "new"
    for folder in (elsewhere, new):
        folder.mkdir()
        (folder / "manifest.json").write_text(folder.name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "aime24").symlink_to(elsewhere)
    put_in_place(new, tmp_path / "out" / "aime24")
    assert (elsewhere / "manifest.json").read_text() == "elsewhere"
    assert not (tmp_path / "out" / "aime24").is_symlink()

    (tmp_path / "report.html").symlink_to(elsewhere / "manifest.json")
    write_whole(tmp_path / "report.html", "new")
    assert (elsewhere / "manifest.json").read_text() == "elsewhere"


# ---- what is shown: terminal, CSV, Markdown, figures, the page -------------------------------------------------------

HOSTILE_TEXTS = [
    "=HYPERLINK(\"http://example.org\",\"x\")", "+1+cmd|'/c calc'!A0", "-2+3", "@SUM(A1)", "\t=1+1", "\r=1+1", "＝1+1",
    "\x1b]0;title\x07\x1b[31mred\x1b[2J", "\x9b31m", "[red]red[/red]", "[/]", "[link=http://example.org]x[/link]",
    r"$\frac{$", "$x$ and $\\undefined$", "a_b^c", "_hidden", "</script><script>window.hacked = 1</script>",
    "<img src=http://example.org/x onerror='window.hacked = 2'>", "![x](http://example.org/x)", "a|b\nc|d",
    "[x](javascript:window.hacked=3)", "\u2028\u2029\u202e\ufeff", "\ud800", "\x00", "{0.__class__}", "%s%n", "`id`",
    "&lt;b&gt;", "https://example.org", "\U0001f3fb", "\u0301", "e\u0301", "1\ufe0f", "\u200b\u034f", "\u3164",
    "\u0947", "\U000e0101",
]  # fmt: skip


@given(st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text()))
def test_a_terminal_shows_text(text: str) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=500).print(
        TextTable([text, "n"], [[text, "1"]]).rich()
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())  # from rich, for the header
    assert "\x1b[31m" not in out.getvalue()
    assert "\x1b]" not in out.getvalue()
    assert all(character.isprintable() or character == "\n" for character in plain)
    assert plain.replace(" ", "").replace("\n", "").count(visible(text).replace(" ", "")) >= 2 or len(text) > 100


def test_what_takes_no_place_on_a_terminal_is_shown_by_its_number() -> None:
    """Tests all of Unicode, by the standard's categories. A character with its own place on the terminal stays."""
    for character in map(chr, range(0x110000)):
        name, category = unicodedata.name(character, ""), unicodedata.category(character)
        hidden = category in {"Cc", "Cf", "Cn", "Co", "Cs", "Mc", "Me", "Mn", "Zl", "Zp"}
        hidden |= unicodedata.combining(character) != 0
        hidden |= name.startswith(("EMOJI MODIFIER", "COMBINING ", "ZERO WIDTH ", "VARIATION SELECTOR"))
        if hidden:
            shown = visible(character)
            assert re.fullmatch(r"\\[\x20-\x7e]+", shown), hex(ord(character))
            assert shown.encode().decode("unicode_escape") == character
        elif category in {"Lu", "Ll", "Nd", "Sm", "Sc", "Pd"}:
            assert visible(character) == character, name
    for text in ("Ångström", "日本語", "한국어", "русский", "½ × √2 ≤ ∞", "€", "👩", "🇩🇪", "a b"):
        assert visible(text) == text
    assert visible("👩🏻\u200d💻 e\u0301") == r"👩\U0001f3fb\u200d💻 e\u0301"


def test_an_error_carries_no_commands_for_the_terminal(tmp_path: Path) -> None:
    pq.write_table(pa.table({"\x1b]0;title\x07\x1b[31mred\u202e": ["x"]}), tmp_path / "x.parquet")
    arguments = ["data", "prepare", "aime24", "--from", str(tmp_path / "x.parquet"), "--output", str(tmp_path / "o")]
    result = CliRunner().invoke(app, arguments, color=True)
    assert result.exit_code == 1
    assert r"\x1b]0;title\x07\x1b[31mred\u202e" in result.output
    assert re.sub(r"\x1b\[(31|0)m", "", result.output).isprintable() is False  # its line's end
    assert "\x1b]" not in result.output
    assert result.output.count("\x1b[31m") == 1, "the colour of the error itself"


@given(st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text()))
def test_a_spreadsheet_computes_nothing(text: str) -> None:
    """Tests a whole file, because a line break in a cell could begin a new row."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[spreadsheet_cell(text)] * 2] * 2)
    rows = list(csv.reader(io.StringIO(out.getvalue(), newline="")))
    kept = text.replace("\r", r"\r").replace("\0", r"\x00")
    assert rows == [[spreadsheet_cell(text)] * 2] * 2
    for cell in rows[0]:
        is_number = re.fullmatch(r"\s*[-+]?[\d_.]+(e[-+]?\d+)?\s*|\s*[-+]?(inf(inity)?|nan)\s*", cell, re.IGNORECASE)
        is_harmless = not cell.startswith(tuple("=+-@\t\r＝＋－＠")) or len(cell) < 2 or is_number
        assert is_harmless
        assert cell in (kept, "'" + kept)
    assert spreadsheet_cell(-1.5) == -1.5
    assert (spreadsheet_cell("-1.5"), spreadsheet_cell("="), spreadsheet_cell(None)) == ("-1.5", "=", None)


@given(st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text()))
def test_markdown_shows_text(text: str) -> None:
    from markdown_it import MarkdownIt

    table = TextTable(["benchmark", "n"], [[text, "1"], [text, "2"]]).markdown()
    parsed = MarkdownIt("commonmark", {"html": True}).enable("table").parse(table)
    assert [token.type for token in parsed].count("tr_open") == 3
    cells = [token for token in parsed if token.type == "inline"]
    assert len(cells) == 6
    for token in cells:
        inside = token.children or []
        assert not {child.type for child in inside} & {"html_inline", "link_open", "image", "code_inline"}
    assert len({"".join(child.content for child in cells[place].children or []) for place in (2, 4)}) == 1
    assert markdown_cell("aime24") == "aime24"


@given(st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text()))
def test_a_figure_shows_text(text: str) -> None:
    from matplotlib.text import Text

    label = figure_label(text)
    assert not label.startswith("_")
    shown, is_formula = Text(0, 0, label)._preprocess_math(label)  # type: ignore[attr-defined]
    assert not is_formula
    assert shown.removeprefix("\u200b") == visible(text)


@pytest.fixture(scope="module")
def hostile_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens with hostile texts, frequent enough for tables and word clouds, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile") / "$\\frac{<img src=x onerror='window.hacked=4'>[red]\x1b[31m"
    write_manifest(folder, {"source": "model", "model": "</script>\u2028"})
    random = np.random.default_rng(0)
    answers = []
    for number in range(6):
        pieces = HOSTILE_TEXTS * 2
        entropy = random.random(len(pieces)).astype(np.float32)
        answers.append(
            AnswerTokens(
                prompt="<script>window.hacked = 5</script>", text="".join(pieces), pieces=pieces, entropy=entropy,
                token_ids=np.array([HOSTILE_TEXTS.index(piece) for piece in pieces], np.int32), log_prob=-entropy,
                selected=entropy > 0.8, answer=number, data_source="../../<b>\u2028", ground_truth="=1+1",
                score=float("nan") if number == 0 else 1.0,
            )
        )  # fmt: skip
    write_part(folder, 0, answers)
    return folder


def test_the_files_of_an_analysis_hold_text(hostile_tokens: Path, tmp_path: Path) -> None:
    results.write_summary(summarise(hostile_tokens, 5), tmp_path)
    names = {"figures", *(file.name for file in tmp_path.iterdir() if file.suffix in (".csv", ".json"))}
    assert {entry.name for entry in tmp_path.iterdir()} == names
    found = set()
    for file in tmp_path.glob("*.csv"):
        with file.open(newline="", encoding="utf-8") as lines:
            for cell in (cell for row in csv.reader(lines) for cell in row):
                assert not (cell[:1] in tuple("=+-@\t\r＝") and len(cell) > 1) or re.fullmatch(r"-?[\d.e-]+", cell), (
                    cell
                )
                found.add(cell)
    assert {'\'=HYPERLINK("http://example.org","x")', "'@SUM(A1)", "[red]red[/red]"} <= found
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=300)
    for _, table in results.summary_tables(summarise(hostile_tokens, 5)):
        console.print(table.rich())
    assert "[red]red[/red]" in out.getvalue()
    assert "\x1b[31m" not in out.getvalue()
    assert "\x1b]8;" not in out.getvalue(), "a link of the terminal"
    for svg in (tmp_path / "figures").glob("*.svg"):
        assert not re.search(r"<script|onerror=|javascript:|href=\"http", svg.read_text(encoding="utf-8"))


@pytest.mark.process
def test_a_hostile_report_is_a_page_of_text(hostile_tokens: Path, tmp_path: Path) -> None:
    """Hostile names of data sets, runs and folders in headings, tables and figures. For tokens: test_report.py."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(3):
            writer.add_scalar("actor/entropy", step, step)
            for text in (r"$\frac{$", "<script>window.hacked = 6</script>", "../../x\u2028"):
                writer.add_scalar(f"val-core/{text}/acc/mean@8", step, step)
    page = tmp_path / "page" / "report.html"
    names = [f"$\\frac{{$ <img>={tmp_path / 'run'}", f"[red]\u202e={tmp_path / 'run'}"]
    arguments = ["report", str(page), "--tokens", str(hostile_tokens), "--min-count", "5", "--run", names[0]]
    arguments += ["--run", names[1], "--compare", str(hostile_tokens), "--compare", str(hostile_tokens)]
    result = CliRunner().invoke(app, [*arguments, "--figures", str(page.parent / "figures")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert all(re.fullmatch(r"[a-z0-9-]+\.(svg|png)", file.name) for file in (page.parent / "figures").iterdir())
    assert {entry.name for entry in page.parent.iterdir()} == {"report.html", "figures"}
    with browser() as chromium:
        opened, heard = open_page(chromium, page)
        assert "accuracy on <script>window.hacked = 6</script> (mean@8)" in opened.locator("#curves").inner_text()
        assert opened.locator("#checkpoints img").count() == 3
        for place in range(6):
            opened.locator("#list button").nth(place).click()
        opened.evaluate(
            "Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode() }))"
        )
        assert opened.evaluate("window.hacked") is None
        assert heard.console == []
        assert [url for url in heard.requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


def test_no_text_becomes_an_emoji() -> None:
    """rich writes a picture for ``:x:``, which may stand in an import path, an answer or a path."""
    package = REPOSITORY / "entropy_fork"
    made = [call for file in package.rglob("*.py") for call in re.findall(r"\bConsole\([^\n]*", file.read_text())]
    assert len(made) > 10
    assert [call for call in made if not call.startswith("Console(emoji=False")] == []


# ---- an expression of a config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch {file}') or entropy > 0",
        "open('{file}', 'w') and entropy > 0",
        "exec(\"open('{file}', 'w')\") or entropy > 0",
        "[open('{file}', 'w') for _ in '1'] == entropy",
        "(lambda: open('{file}', 'w'))() > entropy",
        'f\'{{open("{file}", "w")}}\' > entropy',
        "entropy.__class__.__base__.__subclasses__() > 0",
        "entropy[open('{file}', 'w')] > 0",
        "(x := open('{file}', 'w')) > entropy",
        "entropy > 9 ** 9 ** 9 ** 9",
        "entropy > {nines}",
        "{brackets}entropy",
    ],
)
def test_a_condition_runs_nothing(text: str, tmp_path: Path) -> None:
    """``entropy_fork.where`` is parsed: a hostile one is refused at once, and no part of it has run."""
    file = tmp_path / "ran"
    text = text.format(file=file, nines="9" * 5000, brackets="(" * 5000)
    start = time.monotonic()
    with pytest.raises(ValueError, match="where=") as error:
        EntropyForkConfig(where=text).check()
    assert time.monotonic() - start < 5
    assert not file.exists()
    assert len(str(error.value).splitlines()) == 1
