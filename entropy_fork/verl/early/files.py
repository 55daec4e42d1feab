"""The files that a run names: data, the checkpoint to go on from, and files with code."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from entropy_fork.common.asked_for import chosen
from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.problem import IN_RAY, Problem
from entropy_fork.verl.config import read_guards
from entropy_fork.verl.early.rows import FILE_KEYS, files_of, read_rows
from entropy_fork.verl.guards.data_files import reads_with_verl

#: what verl's data set class reads (verl/utils/dataset/rl_dataset.py)
ENDINGS = (".parquet", ".json", ".jsonl")

PREPARE = "'entropy-fork data prepare' writes such files"


def check_files(config: DictConfig) -> Iterator[Problem]:
    """Data files are named, are there, are files, and their first row has a prompt.

    Nothing is looked at where a data set class of the user's own reads them.
    """
    if not reads_with_verl(config):
        return
    bad = set()
    for key in FILE_KEYS:
        files = files_of(config, key)
        if not files and not (chosen("recipe") and OmegaConf.select(config, f"data.{key}", default=None) is None):
            yield Problem(f"data.{key} names no file. Write data.{key}=FILE.parquet ({PREPARE}).", IN_RAY)
        for path in files:
            if wrong := _wrong_with(path):
                bad.add(path)
                yield Problem(f"data.{key}: {wrong}", IN_RAY)
    prompt = str(OmegaConf.select(config, "data.prompt_key", default="prompt"))
    for rows in read_rows(config):
        if rows.path in bad or (rows.path.endswith(".parquet") and _are_guarded(config)):
            continue  # the guard looks at every row
        where = f"data.{rows.key}: {rows.path}"
        if rows.first is None:
            yield Problem(f"{where} has no row.", IN_RAY)
        elif prompt not in rows.first:
            yield Problem(
                f"{where} has no column '{prompt}'; it has {', '.join(sorted(rows.first))}. verl expects prompt (a "
                f"list of chat messages), data_source, and reward_model with its ground_truth; {PREPARE}. Another "
                f"name for the prompt column: data.prompt_key=NAME.",
                IN_RAY,
            )
        elif not isinstance(rows.first[prompt], list) or not rows.first[prompt]:
            yield Problem(f"{where}: the first row's {prompt} is not a list of chat messages; {PREPARE}.", IN_RAY)


def _are_guarded(config: DictConfig) -> bool:
    try:
        return read_guards(config).data_files
    except EntropyForkError:
        return False


def _wrong_with(path: str) -> str | None:
    """What is wrong with a data file, before it is opened."""
    if "://" in path:
        return None
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith(ENDINGS))
        way = f"Write one of its files, such as {os.path.join(path, inside[0])}" if inside else "Write a file"
        return f"{path} is a folder. {way}, or a list: [FILE,FILE]."
    if not os.path.exists(path):
        longer = next((f"{path}{ending}" for ending in ENDINGS if os.path.exists(f"{path}{ending}")), None)
        return f"there is no file {path}" + (f". There is {longer}" if longer else "")
    if not path.endswith(ENDINGS):
        return f"{path} is not a file that verl reads: its name must end in {', '.join(ENDINGS)}. {PREPARE[:-6]} them."
    return None


def check_resume(config: DictConfig) -> Iterator[Problem]:
    """verl/trainer/ppo/v1/trainer_base.py: _load_checkpoint."""
    key = "trainer.resume_from_path"
    path = OmegaConf.select(config, key, default=None)
    mode = OmegaConf.select(config, "trainer.resume_mode", default="auto")
    if mode != "resume_path":
        if path:
            yield Problem(
                f"{key}={path} does nothing with trainer.resume_mode={mode}. Write trainer.resume_mode=resume_path.",
                fatal=False,
            )
        return
    if not isinstance(path, str) or not path:
        yield Problem(f"trainer.resume_mode=resume_path needs {key}=…/global_step_NUMBER.", IN_RAY)
    elif not (name := path.rstrip("/").split("global_step_")[-1]).isdigit() or name == path:
        yield Problem(f"{key}={path} must end in global_step_NUMBER, a folder that verl wrote.", IN_RAY)
    elif path.endswith("/"):
        yield Problem(f"{key}={path} must not end in '/'. Write {key}={path.rstrip('/')}.", IN_RAY)
    elif "://" not in path and not os.path.isdir(path):
        folder = Path(path).parent
        there = sorted((each.name for each in folder.glob("global_step_*")), key=len) if folder.is_dir() else []
        have = f"{folder} has {', '.join(there)}" if there else f"{folder} has no checkpoint"
        yield Problem(f"{key}: there is no folder {path}. {have}.", IN_RAY)


#: keys with the path of a file or module with code, the key with the object's name, and what the object is
CODE = (
    ("reward.custom_reward_function.path", "reward.custom_reward_function.name", "function"),
    ("data.custom_cls.path", "data.custom_cls.name", "class"),
    ("trainer.v1.sampler.custom_sampler.path", "trainer.v1.sampler.custom_sampler.name", "class"),
    ("reward.reward_manager.module.path", "reward.reward_manager.name", "class"),
)


def check_code(config: DictConfig) -> Iterator[Problem]:
    """Files and modules with code are there, can be parsed, and have the object that is named. Nothing is run."""
    for path_key, name_key, kind in CODE:
        path = OmegaConf.select(config, path_key, default=None)
        if not path or ("reward_manager" in path_key and not _is_imported(config)):
            continue
        name = OmegaConf.select(config, name_key, default=None)
        if name is None:
            yield Problem(f"{path_key}={path} needs {name_key}=NAME, the {kind}'s name.", IN_RAY)
        elif wrong := _wrong_code(str(path), str(name), kind):
            yield Problem(f"{path_key}={path}: {wrong[0]}" if wrong[1] else f"{name_key}={name}: {wrong[0]}", IN_RAY)


def has_code(config: DictConfig, path_key: str, name_key: str) -> bool:
    """Whether the object of two keys of :data:`CODE` is there."""
    path, name = (str(OmegaConf.select(config, key, default=None)) for key in (path_key, name_key))
    return _wrong_code(path, name, "function") is None


def _is_imported(config: DictConfig) -> bool:
    return OmegaConf.select(config, "reward.reward_manager.source", default=None) == "importlib"


def _wrong_code(path: str, name: str, kind: str) -> tuple[str, bool] | None:
    """What is wrong, and whether with the path (or with the name); None where nothing is found."""
    if path.startswith("pkg://"):
        module = path.removeprefix("pkg://").replace("/", ".")
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError, AttributeError):
            spec = None
        if spec is None:
            return f"there is no module {module} in this environment. A file: write its path, without pkg://.", True
        file = spec.origin
        if file is None or not file.endswith(".py"):
            return None
    else:
        file = path.removeprefix("file://")
        if not os.path.exists(file):
            return f"there is no file {os.path.abspath(file)}.", True
        if not file.endswith(".py"):
            return "must be a file that ends in .py, or pkg://MODULE.", True
    try:
        tree = ast.parse(Path(file).read_bytes(), filename=file)
    except (SyntaxError, ValueError) as error:
        return f"is not Python: {error}.", True
    names = set(_names(tree))
    if name in names or {"*", "__getattr__"} & names:
        return None
    public = sorted(each for each in names if not each.startswith("_"))
    return f"{path} has no {kind} of that name.{did_you_mean(name, public)}", False


def _names(tree: Any) -> Iterator[str]:
    """All names that a module may have: every one that is bound anywhere in it, so that none is missed."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("globals", "setattr"):
            yield "*"
