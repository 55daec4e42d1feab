"""The stages of 'make gpu' on a CPU: their code on tiny shapes, how they are run, and what is said of them."""

from __future__ import annotations

import base64
import csv
import gc
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from helpers import gpu_stage
from helpers.places import PYTHONPATH, REPOSITORY
from torch.distributed.fsdp import _init_utils
from transformers import Qwen3ForCausalLM
from verl.workers.engine import EngineRegistry

from benchmarks.gpu import engines, kernels, predict, rehearsal, run, tables, training, vllm_rollout, wheels
from benchmarks.gpu.cases import ENDED, FAILED, MEASURED, NOT_MEASURED, Measured, Row, read_rows, run_stage, write_rows
from entropy_fork.common.processes import processes_with
from entropy_fork.verl import plugin, sparse_head

# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_objects() -> Iterator[None]:
    """A measurement collects garbage before it begins. Let it not look at what this process already has."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
def test_stage_a_measures_every_row_on_a_cpu(tmp_path: Path) -> None:
    found: dict[str, list[Measured]] = {}
    for case in kernels.cases("cpu", tmp_path):
        assert case.lacks == ""
        found[case.name] = list(case.run())
        assert found[case.name]
        assert all(math.isfinite(number.value) and number.value >= 0 for number in found[case.name]), found[case.name]
    for dense in (kernels.DENSE, kernels.DENSE_TORCH):
        assert {number.measure for number in found[dense]} == {"head, ms", "step, ms", "logits, GiB"}
    bytes_of = {name: numbers[-1].value for name, numbers in found.items() if numbers[-1].measure == "logits, GiB"}
    assert bytes_of["kept rows, ρ = 0.5"] < bytes_of["kept rows, ρ = 1.0"]
    errors = [n.value for numbers in found.values() for n in numbers if n.measure.startswith("largest error")]
    assert len(errors) == 2
    assert max(errors) < 1e-5


@pytest.fixture
def engine_numbers(tmp_path: Path) -> Iterator[Any]:
    """Run one way of stage b in this process: its rows by measure."""

    def run(name: str) -> dict[str, list[float]]:
        shape, (options, lacks) = engines.shape_of("cpu"), engines.ways("cpu")[name]
        assert lacks == ""
        found: dict[str, list[float]] = {}
        for number in engines.one_rank("cpu", shape, name, options, tmp_path):
            found.setdefault(number.measure, []).append(number.value)
        return found

    yield run
    assert not torch.distributed.is_initialized()


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what FSDP1 on a CPU and verl's fused heads change in this process."""
    engines_of = EngineRegistry._engines["language_model"]
    monkeypatch.setitem(engines_of, "fsdp", dict(engines_of["fsdp"]))
    check = "_check_module_states_for_sync_module_states"
    monkeypatch.setattr(_init_utils, check, getattr(_init_utils, check))
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("name", [name for name, (_, lacks) in engines.ways("cpu").items() if not lacks])
def test_stage_b_finds_the_sparse_head_equal_to_the_dense_one(engine_numbers: Any, name: str) -> None:
    """On one rank. 'make gpu DEVICE=cpu' runs it on two, too."""
    found = engine_numbers(name)
    assert all(len(values) == len(engines.TEMPERATURES) for values in found.values())
    for measure in ("gradient, relative difference", "the dense gradient again", "ratio off by at most, dense update",
                    "ratio off by at most, sparse update", "largest difference of log-probs, nats",
                    "largest difference of entropies, nats"):  # fmt: skip
        assert max(found[measure]) < 1e-5, measure
    assert found["kept by current, mini_batch"] == pytest.approx([0.2, 0.2], abs=0.04)


def test_stage_b_sees_a_head_that_is_wrong(engine_numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse head that forgets the temperature is right at T = 1.0 only."""
    monkeypatch.setattr(sparse_head, "_scaled", lambda logits, temperature: logits)
    found = engine_numbers("FSDP2, padded, sdpa")
    for measure in ("gradient, relative difference", "ratio off by at most, dense update"):
        right, wrong = found[measure]  # in the order of the temperatures
        assert right < 1e-5
        assert wrong > 1e-3


@pytest.fixture
def named_files(tmp_path: Path) -> Path:
    """What the command lines of stage c name: data, and the model's config without its weights."""
    row = {"prompt": [{"role": "user", "content": "1+1"}], "data_source": "x", "reward_model": {"ground_truth": "2"}}
    (tmp_path / "world").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist([row] * 64), tmp_path / "world" / f"{split}.parquet")
    training.build_model(tmp_path, weights=False)
    (tmp_path / "world" / "model").symlink_to(tmp_path / "model")
    return tmp_path


@pytest.mark.process  # the launcher tries a user's reward in a process of its own
@pytest.mark.parametrize("preset", [None, "official", "vllm"])
def test_the_command_lines_of_a_gpu_pass_the_checks_before_a_run(
    named_files: Path, monkeypatch: pytest.MonkeyPatch, preset: str | None
) -> None:
    from entropy_fork.preflight.plan import make_plan

    monkeypatch.setattr(plugin, "ON_CPU", False)
    words = training.overrides("cuda", None if preset == "vllm" else preset, named_files)
    if preset == "vllm":
        words += vllm_rollout.VLLM["cuda"]
    plan = make_plan(words, flash_attention=False)
    assert [problem.message for problem in plan.errors] == []
    assert not plan.on_cpu
    assert (plan.rollout is None) == (preset != "vllm"), "the light rollout reserves no share of the GPU"
    if preset in training.PRESETS:
        assert plan.step is not None
        assert plan.step.micro_batches_per_gradient_step_at_most > 1
        assert plan.model is not None
        assert 0.5e9 < plan.model.parameters < 0.7e9


def test_the_metrics_of_a_run_become_columns() -> None:
    steps = [{"timing_s/step": float(n), "perf/max_memory_allocated_gb": 3.0 - n} for n in (2, 0, 1)]
    found = {}
    for number in training.measure("x", steps):
        found.setdefault(number.measure, []).append(number.value)
    assert found == {"steps": [3], "step, s": [0.0, 1.0], training.PEAK: [3.0]}
    with pytest.raises(RuntimeError, match="no step"):
        list(training.measure("x", []))


@pytest.mark.process
def test_the_prediction_stands_beside_the_measurement(
    named_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugin, "ON_CPU", False)
    said = predict.predicted_gib(training.overrides("cuda", "off", named_files), flash_attention=False)
    for measured, status in ((said * 0.95, 0), (said * 0.8, 1)):
        row = a_row(case="off", measure=training.PEAK, value=repr(measured), stage="c", versions="torch 2.11.0")
        monkeypatch.setattr(predict, "predicted_gib", lambda words, flash: math.nan if flash else said)
        write_rows([row, a_row(case="demo", measure=training.PEAK, value="1.0", stage="c")],
                   tmp_path / training.STAGE.file_name)  # fmt: skip
        with pytest.raises(typer.Exit) as ended:
            predict.main(tmp_path)
        assert ended.value.exit_code == status
        assert f"| off | {measured:.2f} | {said:.2f} |" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        predict.main(tmp_path / "nothing")
    assert capsys.readouterr().out.startswith("not measured")


# --- how they are run ------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_case_that_ends_badly_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    marks: list[str] = []
    monkeypatch.setattr("benchmarks.gpu.cases.uuid.uuid4", lambda: marked(marks))
    rows = run_stage(gpu_stage.STAGE, "cpu", tmp_path)
    statuses = {row.case: row.status for row in rows}
    assert statuses == {
        "lacks": NOT_MEASURED, "measures": MEASURED, "raises": FAILED, "dies": FAILED, "hangs": ENDED,
        "alone": MEASURED, "after": MEASURED,
    }  # fmt: skip
    notes = {row.case: row.note for row in rows}
    assert notes["raises"] == "ValueError: no | such kernel"
    assert notes["dies"].endswith("ended with 7: the last words")
    assert re.search(r"took longer than \d+ s", notes["hangs"])
    assert {row.value for row in rows if row.status != MEASURED} == {""}, "a case that failed has no number"
    assert [row.value for row in rows if row.case == "measures"] == ["1.5", "2.5", "0.25"]
    assert len(marks) == 4, "a child for the first three cases, and one after each of dies, hangs and alone"
    assert [pid for mark in marks for pid in processes_with("ENTROPY_FORK_GPU_CASES", mark)] == []
    assert read_rows(tmp_path / "gpu-a-gpu_stage.csv") == rows
    after = next(row for row in rows if row.case == "after")
    assert after.command == "python -m helpers.gpu_stage --device cpu --case after"
    assert "torch" in after.versions
    assert after.chip


def marked(marks: list[str]) -> Any:
    marks.append(f"{len(marks):032x}")
    return type("Mark", (), {"hex": marks[-1]})


@pytest.mark.process
def test_a_stage_ends_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    rows = run_stage(gpu_stage.STAGE, "cpu", tmp_path, only=["hangs", "after"], seconds=0.5)
    assert [(row.case, row.status) for row in rows] == [("hangs", ENDED), ("after", NOT_MEASURED)]
    assert rows[-1].note == "the stage's time was over before its turn"


def test_a_dry_run_lists_every_case_with_its_limit_or_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    run.main("cuda", stage=["b", "d"], minutes=2, dry_run=True)  # there is no GPU here, and it starts nothing
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("#")] == [
        f"## Stage {stage.letter}: {stage.title}, ended after 120 s" for stage in (engines.STAGE, vllm_rollout.STAGE)
    ]
    assert "- FSDP1: ended after 120 s" in said, "a case may not take longer than its stage"
    assert "- bf16: all other ways are in bf16" in said
    assert sum(line.startswith("- ") for line in said) == 14 + 2


# --- what is said of them --------------------------------------------------------------------------------------------


def a_row(**changed: str) -> Row:
    values = {
        "date": "2026-11-26", "device": "cuda", "chip": "A GPU", "versions": "torch 2.11.0", "command": "python",
        "stage": "a", "table": "Head", "case": "dense", "row": "dense", "measure": "head, ms", "value": "2.0",
        "status": MEASURED, "note": "",
    }  # fmt: skip
    return Row(**{**values, **changed})


def test_a_table_has_what_was_measured_and_says_what_was_not() -> None:
    rows = [
        a_row(),
        a_row(value="4.0"),
        a_row(measure="GiB", value="0.5"),
        a_row(row="fused", case="fused", measure="", value="", status=NOT_MEASURED, note="verl | is not installed"),
        a_row(row="kept", case="kept", value="1.0"),
    ]
    assert tables.markdown(rows).splitlines() == [
        "| Head | head, ms | GiB |",
        "| --- | --- | --- |",
        "| dense | 3 (2 to 4) | 0.5 |",
        "| fused | not measured: verl / is not installed |  |",
        "| kept | 1 | not measured |",
        "",
        "Measured on 2026-11-26, A GPU; torch 2.11.0.",
    ]


def test_without_a_csv_the_section_has_no_number() -> None:
    empty = tables.section([])
    assert empty.count("Not measured.") == len(tables.stages())
    assert "|" not in empty
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    filled = tables.filled(page, [])
    assert filled == f"before\n{tables.BEGIN}\n\n{empty}\n\n{tables.END}\nafter\n"
    assert tables.filled(filled, []) == filled


def test_rows_of_a_cpu_never_come_into_the_page(tmp_path: Path) -> None:
    write_rows([a_row(device="cpu"), a_row()], tmp_path / kernels.STAGE.file_name)
    assert tables.rows_of_a_gpu(tmp_path) == [a_row()]


def test_the_page_and_the_readme_say_what_the_csv_files_say() -> None:
    """After a run on a GPU: python -m benchmarks.gpu.tables --write, and then the README's status and limits."""
    rows = tables.rows_of_a_gpu(REPOSITORY / "docs/lab/performance")
    page = (REPOSITORY / tables.PAGE).read_text(encoding="utf-8")
    assert tables.filled(page, rows) == page, "run: python -m benchmarks.gpu.tables --write"
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    has_run = any(row.stage == "c" and row.status == MEASURED for row in rows)
    assert ("We have made no GPU run." in readme) == (not has_run)
    assert ("**No GPU run.**" in readme) == (not has_run)


# --- wheels ----------------------------------------------------------------------------------------------------------


def a_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), **files: int) -> Path:
    """A wheel with files of these sizes. As in Ray's, other packages' files about themselves lie deeper inside."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    contents = {f"{name}/{file}": b"x" * size for file, size in files.items()}
    contents |= {f"{name}/inside/other-1.0.dist-info/{file}": b"" for file in ("METADATA", "RECORD")}
    contents[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{about}/METADATA"] = "\n".join(lines).encode()
    record = io.StringIO()
    writer = csv.writer(record, lineterminator="\n")
    for path, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((path, f"sha256={digest}", len(content)))
    writer.writerow((f"{about}/RECORD", "", ""))
    with zipfile.ZipFile(wheel, "w") as out:
        for path, content in [*contents.items(), (f"{about}/RECORD", record.getvalue().encode())]:
            out.writestr(path, content)
    return wheel


def test_a_stripped_wheel_lacks_the_folders_and_is_whole(tmp_path: Path) -> None:
    (tmp_path / "stripped").mkdir()
    wheel = a_wheel(tmp_path, "ray", "2.0", **{"core.py": 10, "jars/big.jar": 100, "rllib/all.py": 5})
    assert wheels.check_record(wheel) == []
    stripped = wheels.strip(wheel, tmp_path / "stripped", wheels.STRIPPED["ray"])
    names = zipfile.ZipFile(stripped).namelist()
    assert "ray/core.py" in names
    assert not [name for name in names if name.startswith(("ray/jars/", "ray/rllib/"))]
    assert wheels.check_record(stripped) == []
    with zipfile.ZipFile(stripped, "a") as out:
        out.writestr("ray/new.py", "x")
    assert wheels.check_record(stripped) == ["ray/new.py is not listed"]


def test_versions_that_do_not_fit_are_named(tmp_path: Path) -> None:
    carried = [
        a_wheel(tmp_path, "verl", "0.9.1", ("tensordict<=0.10.0", "torch>=2", "wandb", "pandas>=2", "peft",
                                            "extra-thing; python_version < '3.12'", "Dill")),
        a_wheel(tmp_path, "tensordict", "0.12.0"),
    ]  # fmt: skip
    there: dict[str, str | None] = {"pandas": "1.5", "peft": None}
    assert wheels.misfits(carried, "3.12", there) == [
        "verl requires tensordict<=0.10.0, and it is 0.12.0",
        "verl requires pandas>=2, and it is 1.5",
        "verl requires Dill, which is neither carried nor there",
    ]
    assert any("extra-thing" in line for line in wheels.misfits(carried, "3.11", there))


def test_bundles_hold_no_more_than_their_size(tmp_path: Path) -> None:
    made = [a_wheel(tmp_path, f"p{size}", "1", data=size * 1000) for size in (9, 6, 5, 4, 1)]
    packed = wheels.bundles(made, 16_000)
    assert sorted(wheel for bundle in packed for wheel in bundle) == sorted(made)
    assert len(packed) == 2
    assert all(sum(wheel.stat().st_size for wheel in bundle) <= 16_000 for bundle in packed)
    with pytest.raises(ValueError, match=r"p9-1-py3-none-any.whl has .* more than a bundle"):
        wheels.bundles(made, 8000)


def test_a_wheel_that_was_downloaded_for_another_python_is_not_taken(tmp_path: Path) -> None:
    for tags in ("py312-none-any", "cp312-abi3-manylinux_2_28_x86_64", "cp311-cp311-manylinux2014_x86_64",
                 "cp311-cp311-macosx_11_0_x86_64", "cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"):  # fmt: skip
        (tmp_path / f"a_b-1.0-{tags}.whl").touch()
    (tmp_path / "a_b-1.1-py3-none-any.whl").touch()
    found = {
        python: [w.name[8:] for w in wheels.wheels_of(tmp_path, "a-b", "1.0", python)] for python in ("3.11", "3.12")
    }
    old = "cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    assert found == {
        "3.11": ["cp311-cp311-manylinux2014_x86_64.whl", old],
        "3.12": ["cp312-abi3-manylinux_2_28_x86_64.whl", old, "py312-none-any.whl"],
    }
    other = a_wheel(tmp_path, "first", "1").rename(tmp_path / "first-1-cp311-cp311-manylinux2014_x86_64.whl")
    assert wheels.misfits([other], "3.12", {}) == [f"{other.name} is not for Python 3.12"]


@pytest.mark.parametrize("name", ["torch", "triton", "nvidia-cublas", "cuda-bindings", "nvidia-nccl-cu13"])
def test_torch_and_cuda_are_never_downloaded(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is never downloaded"):
        wheels.download({name: "1.0"}, "3.12", tmp_path)


def test_what_a_machine_has_is_read_from_its_pip_freeze() -> None:
    text = "torch==2.11.0+cu130\nPyYAML==6.0\n-e git+x#egg=y\nnumpy @ file:///a.whl\nray[default]==2.60.0\n"
    assert wheels.read_pins(text) == {"torch": "2.11.0+cu130", "pyyaml": "6.0", "ray": "2.60.0"}
    pins = {"torch": "2.11.0", "numpy": "2.4", "ray": "2.60.0"}
    assert wheels.left_to_machine(pins, None) == {"torch": None, "numpy": None}
    assert wheels.left_to_machine(pins, {"ray": "2.60.0"}) == {"ray": "2.60.0"}


@pytest.mark.process
def test_a_bundle_installs_without_a_network_into_a_folder_called_site_packages(tmp_path: Path) -> None:
    """dill pickles by value what lies in a folder of another name, and then ``datasets`` fails."""
    made = [a_wheel(tmp_path, "first", "1", **{"a.py": 3}), a_wheel(tmp_path, "second", "2", ("missing",))]
    wheels.write_bundles([made], tmp_path / "bundles")
    install = ["sh", str(tmp_path / "bundles" / "bundle-1" / "install.sh")]
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    wrong = subprocess.run([*install, str(tmp_path / "target")], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "must be called site-packages" in wrong.stderr
    target = tmp_path / "target" / "site-packages"
    subprocess.run([*install, str(target)], env=environment, check=True, timeout=120)
    assert (target / "first" / "a.py").read_text() == "xxx"
    assert (target / "second-2.dist-info").is_dir()


@pytest.mark.process
def test_a_rehearsal_has_the_carried_modules_and_what_the_machine_has_and_no_others(tmp_path: Path) -> None:
    carried, there = tmp_path / "carried", tmp_path / "there"
    (carried / "first").mkdir(parents=True)
    (carried / "first" / "__init__.py").write_text("import packaging, yaml")
    (carried / "lonely.py").write_text("import hypothesis")
    (carried / "caller.py").write_text("import socket; socket.create_connection(('127.0.0.1', 9))")
    rehearsal.link_what_is_there(there, lambda name: wheels.matches(name, (*wheels.NEVER, *wheels.THERE)))
    assert (there / "torch").exists()
    printed = rehearsal.run_clean((carried, there), rehearsal.IMPORT, "first", "packaging")
    assert printed.split() == ["first", f"{carried}/first/__init__.py", "packaging", f"{there}/packaging/__init__.py"]
    for module, error in (("lonely", "No module named 'hypothesis'"), ("caller", "there is no network here")):
        with pytest.raises(RuntimeError, match=error):
            rehearsal.run_clean((carried, there), rehearsal.IMPORT, module)
