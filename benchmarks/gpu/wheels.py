"""Make the wheels that a GPU machine without a network needs, in bundles of a given size, and check them.

    python -m benchmarks.gpu.wheels build --output build/wheels                 the bundles, each with an install.sh
    python -m benchmarks.gpu.wheels build --output build/wheels --dry-run       the list with sizes only
    python -m benchmarks.gpu.wheels check build/wheels                         do the versions fit each other?
    python -m benchmarks.gpu.wheels rehearse build/wheels     import verl from a clean folder that has nothing else

The machine keeps its own Python, torch and CUDA: torch, triton and everything of NVIDIA are never downloaded. What the
machine has is left out (``--freeze FILE``, the output of ``pip freeze`` there, says what that is and is checked). Ray
comes without its jars, its dashboard's pages, its library rllib and its C++ headers: half of its size, none of it
imported by verl. This package comes as a wheel too, because verl finds a plugin by its metadata.

On the machine:

    sh bundle-1/install.sh /somewhere/site-packages && sh bundle-2/install.sh /somewhere/site-packages
    PYTHONPATH=/somewhere/site-packages python -m benchmarks.gpu.run

The folder must be called site-packages, because dill takes the modules of any other folder for the user's own, and
pickles what is in them.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email.parser import Parser
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from benchmarks.gpu.cases import CONSOLE, REPOSITORY
from benchmarks.gpu.rehearsal import IMPORT, MODULES, RAY, link_what_is_there, run_clean
from entropy_fork.common.progress import track

MIB = 2**20

#: the platforms of the wheels, the newest first
PLATFORMS = tuple(f"{tag}_x86_64" for tag in (
    "manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux_2_12",
    "manylinux2010", "manylinux_2_5", "manylinux1",
))  # fmt: skip

#: never downloaded, whatever is asked for
NEVER = ("torch", "triton", "torchvision", "torchaudio", "nvidia-*", "cuda-*", "pytorch-*")

#: what a machine with torch, transformers, accelerate, peft, pandas, pyarrow and tensorboard has: these, and what they
#: require. --freeze replaces the list by what is really there.
THERE = (
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy", "typing-extensions"),
    *("accelerate", "numpy", "packaging", "peft", "psutil", "pyyaml", "regex", "safetensors", "tqdm"),
    *("pandas", "pyarrow", "python-dateutil", "pytz", "six", "tzdata"),
    *("absl-py", "grpcio", "markdown", "pillow", "protobuf", "tensorboard", "tensorboard-data-server", "werkzeug"),
    *("aiohappyeyeballs", "aiohttp", "aiosignal", "attrs", "frozenlist", "idna", "multidict", "propcache", "yarl"),
    *("certifi", "charset-normalizer", "requests", "urllib3"),
)

#: required by verl and not used by a run with trainer.logger=[console]; wandb alone is as large as the rest
UNUSED = ("wandb", "pybind11")

#: folders of a wheel that no run of verl's reads
STRIPPED = {
    "ray": ("ray/jars/", "ray/dashboard/client/", "ray/rllib/", "ray/include/", "ray/cpp/", "ray/core/generated/cpp/"),
}

INSTALL = """#!/bin/sh
# sh install.sh SOMEWHERE/site-packages: installs the wheels beside this file into a folder, without a network.
set -e
here=$(cd "$(dirname "$0")" && pwd)
target=${1:?usage: sh install.sh SOMEWHERE/site-packages}
case $target in
*/site-packages) ;;
*) echo "the folder must be called site-packages, or dill would pickle the modules in it: $target" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$target" "$here"/*.whl
"""

app = typer.Typer(add_completion=False, help="Wheels for a GPU machine without a network.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a package is named by one of the patterns."""
    return any(fnmatch.fnmatch(canonicalize_name(name), pattern) for pattern in patterns)


def resolve(python: str, torch: str, verl: str) -> dict[str, str]:
    """Everything that this package and verl need for a Python on Linux, with versions; torch's own is given.

    Only uv's resolver can do this for another Python. It reads the metadata of torch, and downloads no wheel of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text(f"torch=={torch}\nverl=={verl}\n")
        line = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        line += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "--extra", "cpu"]
        line += ["--constraint", str(pins), str(REPOSITORY / "pyproject.toml")]
        found = subprocess.run(line, check=False, capture_output=True, text=True)
    if found.returncode:
        raise typer.BadParameter(f"no versions fit together: {found.stderr[-2000:]}")
    return read_pins(found.stdout)


def read_pins(text: str) -> dict[str, str]:
    """Names and versions of lines like ``name==version``, as uv and ``pip freeze`` print them."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def download(pins: Mapping[str, str], python: str, folder: Path) -> list[Path]:
    """A wheel of each package, for that Python. What has no wheel is built here, if it has no compiled part."""
    folder.mkdir(parents=True, exist_ok=True)
    short = python.replace(".", "")
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    target += [part for abi in (f"cp{short}", "abi3", "none") for part in ("--abi", abi)]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    wheels = []
    for name, version in track("wheels", list(pins.items()), console=CONSOLE):
        if matches(name, NEVER):
            raise ValueError(f"{name} is never downloaded")
        if not (found := wheels_of(folder, name, version, python)):
            pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
            asked = ["--no-deps", f"{name}=={version}"]
            got = subprocess.run([*pip, "download", "--dest", str(folder), *target, *asked], check=False,
                                 capture_output=True, text=True)  # fmt: skip
            if got.returncode:
                subprocess.run([*pip, "wheel", "--wheel-dir", str(folder), *asked], check=True)
            found = wheels_of(folder, name, version, python)
            if not found or (got.returncode and not found[0].name.endswith("-none-any.whl")):
                raise RuntimeError(f"{name} {version} has no wheel for Python {python}: {got.stderr[-500:]}")
        wheels.append(found[0])
    return wheels


def wheels_of(folder: Path, name: str, version: str, python: str) -> list[Path]:
    """The wheels of one version in a folder that a Python on Linux can install."""
    return [
        wheel for wheel in sorted(folder.glob("*.whl"))
        if canonicalize_name(wheel.name.split("-")[0]) == name and wheel.name.split("-")[1] == version
        and fits(wheel, python)
    ]  # fmt: skip


def fits(wheel: Path, python: str) -> bool:
    """Whether a Python on Linux can install a wheel, by the tags in its name."""
    major, minor = map(int, python.split("."))
    known = {*cpython_tags((major, minor), platforms=PLATFORMS)}
    known |= {*compatible_tags((major, minor), f"cp{major}{minor}", PLATFORMS)}
    return not known.isdisjoint(parse_wheel_filename(wheel.name)[3])


def own_wheel(folder: Path) -> Path:
    """The wheel of this package, from this clone."""
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run(line, check=True)
    return max(folder.glob("entropy_fork-*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def own_file(wheel: zipfile.ZipFile, name: str) -> str:
    """The path of a file about the wheel itself. Ray's wheel has the same files of other packages deeper inside."""
    return next(path for path in wheel.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{name}", path))


def strip(wheel: Path, target: Path, folders: Sequence[str]) -> Path:
    """Copy a wheel without some folders, and with a list of files that says so."""
    stripped = target / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(stripped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        record = own_file(source, "RECORD")
        for entry in source.infolist():
            if entry.filename != record and not entry.filename.startswith(tuple(folders)):
                out.writestr(entry, source.read(entry), compress_type=zipfile.ZIP_DEFLATED)
        rows = [row for row in csv.reader(io.StringIO(source.read(record).decode()))
                if row and not row[0].startswith(tuple(folders))]  # fmt: skip
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        out.writestr(record, text.getvalue())
    return stripped


def check_record(wheel: Path) -> list[str]:
    """What is wrong with a wheel's list of files: a file that is not in it, or has another checksum, or is missing."""
    with zipfile.ZipFile(wheel) as source:
        names = {name for name in source.namelist() if not name.endswith("/")}
        record = own_file(source, "RECORD")
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(source.read(record).decode())) if row}
        wrong = [f"{name} is not listed" for name in names - rows.keys() if not name.endswith((".jws", ".p7s"))]
        wrong += [f"{name} is missing" for name in rows.keys() - names]
        for name in names & rows.keys():
            if rows[name]:
                digest = base64.urlsafe_b64encode(hashlib.sha256(source.read(name)).digest()).rstrip(b"=").decode()
                wrong += [f"{name} has another checksum"] * (rows[name] != f"sha256={digest}")
    return wrong


def requirements(wheel: Path, python: str) -> tuple[str, str, list[Requirement]]:
    """Name, version and what it requires on Linux with that Python, without extras."""
    with zipfile.ZipFile(wheel) as source:
        metadata = Parser().parsestr(source.read(own_file(source, "METADATA")).decode())
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": "",
        "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate(environment)]
    return canonicalize_name(metadata["Name"]), metadata["Version"], needed


def misfits(wheels: Iterable[Path], python: str, there: Mapping[str, str | None]) -> list[str]:
    """Each wheel that is for another Python, and each requirement that nothing carried or on the machine meets.

    Args:
        wheels: what is carried.
        python: the machine's.
        there: what the machine has; None where its version is not known.
    """
    wheels = list(wheels)
    known = [requirements(wheel, python) for wheel in wheels]
    carried = {name: version for name, version, _ in known}
    wrong = [f"{wheel.name} is not for Python {python}" for wheel in wheels if not fits(wheel, python)]
    for name, _, needed in known:
        for one in needed:
            wanted = canonicalize_name(one.name)
            if wanted in carried:
                has: str | None = carried[wanted]
            elif wanted in there:
                has = there[wanted]
            elif matches(wanted, (*NEVER, *UNUSED)):
                continue
            else:
                wrong.append(f"{name} requires {one}, which is neither carried nor there")
                continue
            if has is not None and not one.specifier.contains(has, prereleases=True):
                wrong.append(f"{name} requires {one}, and it is {has}")
    return wrong


def bundles(wheels: Iterable[Path], size: int) -> list[list[Path]]:
    """Wheels in as few bundles as a simple packing finds: the largest first, each into the first bundle with room.

    Raises:
        ValueError: a wheel is larger than a bundle.
    """
    packed: list[list[Path]] = []
    for wheel in sorted(wheels, key=lambda wheel: (-wheel.stat().st_size, wheel.name)):
        if wheel.stat().st_size > size:
            raise ValueError(f"{wheel.name} has {wheel.stat().st_size / MIB:.1f} MiB, more than a bundle")
        room = (bundle for bundle in packed if sum(w.stat().st_size for w in [*bundle, wheel]) <= size)
        bundle = next(room, None)
        if bundle is None:
            packed.append([wheel])
        else:
            bundle.append(wheel)
    return packed


def left_to_machine(pins: Mapping[str, str], freeze: Mapping[str, str] | None) -> dict[str, str | None]:
    """What of the resolved packages the machine has, with versions where they are known."""
    if freeze is not None:
        return dict(freeze)
    return {name: None for name in pins if matches(name, (*NEVER, *THERE))}


@app.command()
def build(
    output: Annotated[Path, typer.Option(help="Folder of the bundles.")] = Path("build/wheels"),
    python: Annotated[str, typer.Option(help="The machine's Python.")] = "3.12",
    torch: Annotated[str, typer.Option(help="The machine's torch, which stays.")] = "2.11.0",
    verl: Annotated[str, typer.Option(help="The verl to carry.")] = "0.9.1",
    size_mib: Annotated[float, typer.Option(help="The most that a bundle may have.")] = 56.0,
    freeze: Annotated[Path | None, typer.Option(help="The output of 'pip freeze' on the machine.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List wheels and bundles, and write none.")] = False,
) -> None:
    """Resolve, download, strip, check, and cut into bundles."""
    pins = resolve(python, torch, verl)
    has = read_pins(freeze.read_text()) if freeze else None
    there = left_to_machine(pins, has)
    cache = output / "downloaded"
    # With a list of what is there, a package is left out only if the set would not change it.
    carried = {
        name: version for name, version in pins.items()
        if not matches(name, (*NEVER, *UNUSED)) and (name not in there or there[name] not in (None, version))
    }  # fmt: skip
    wheels = [*download(carried, python, cache), own_wheel(cache)]
    stripped = cache / "stripped"
    shutil.rmtree(stripped, ignore_errors=True)
    stripped.mkdir()
    names = {wheel: canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels}
    wheels = [strip(w, stripped, STRIPPED[names[w]]) if names[w] in STRIPPED else w for w in wheels]
    wrong = misfits(wheels, python, there) + [f"{w.name}: {what}" for w in wheels for what in check_record(w)]
    packed = bundles(wheels, round(size_mib * MIB))
    for number, bundle in enumerate(packed, 1):
        total = sum(wheel.stat().st_size for wheel in bundle)
        CONSOLE.print(f"bundle {number}: {len(bundle)} wheels, {total / MIB:.1f} MiB", highlight=False)
        for wheel in bundle:
            CONSOLE.print(f"  {wheel.stat().st_size / MIB:7.2f} MiB  {wheel.name}", highlight=False, soft_wrap=True)
    left = [f"{name} {version or ''}".strip() for name, version in sorted(there.items()) if name in pins]
    CONSOLE.print(f"left to the machine: {', '.join(left)}", highlight=False, soft_wrap=True)
    say_misfits(wrong)
    if not dry_run:
        write_bundles(packed, output)
        CONSOLE.print(f"written: {len(packed)} bundles in {output}", highlight=False)
    raise typer.Exit(int(bool(wrong)))


def say_misfits(wrong: Sequence[str]) -> None:
    """Print what is wrong, and not thousands of lines of it."""
    for line in wrong[:30]:
        typer.echo(f"does not fit: {line}")
    if len(wrong) > 30:
        typer.echo(f"… and {len(wrong) - 30} more")


def write_bundles(packed: Sequence[Sequence[Path]], output: Path) -> None:
    """Write a folder for each bundle, with an install.sh."""
    for old in output.glob("bundle-*"):
        shutil.rmtree(old)
    for number, bundle in enumerate(packed, 1):
        folder = output / f"bundle-{number}"
        folder.mkdir(parents=True)
        for wheel in bundle:
            shutil.copy2(wheel, folder)
        (folder / "install.sh").write_text(INSTALL)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The folder of the bundles.")],
    python: Annotated[str, typer.Option(help="The machine's Python.")] = "3.12",
    freeze: Annotated[Path | None, typer.Option(help="The output of 'pip freeze' on the machine.")] = None,
) -> None:
    """Check that the versions in the bundles meet the requirements of verl and of each other."""
    wheels = sorted(folder.glob("bundle-*/*.whl"))
    if not wheels:
        raise typer.BadParameter(f"{folder} has no bundle-*/*.whl")
    has = read_pins(freeze.read_text()) if freeze else None
    there: dict[str, str | None] = dict(has) if has is not None else dict.fromkeys(THERE)
    wrong = misfits(wheels, python, there) + [f"{w.name}: {what}" for w in wheels for what in check_record(w)]
    say_misfits(wrong)
    typer.echo(f"{len(wheels)} wheels: {'everything fits' if not wrong else f'{len(wrong)} misfits'}")
    raise typer.Exit(int(bool(wrong)))


@app.command()
def rehearse(folder: Annotated[Path, typer.Argument(help="The folder of the bundles, built for this Python.")]) -> None:
    """Do here what the machine will do: install the bundles in a clean folder, and import verl from it, offline.

    Of all other packages only those are there that the machine has of its own. Then Ray starts a worker.
    """
    bundles_of = sorted(folder.glob("bundle-*/install.sh"))
    if not bundles_of:
        raise typer.BadParameter(f"{folder} has no bundle-*/install.sh")
    with tempfile.TemporaryDirectory(prefix="entropy-fork-wheels-") as temporary:
        target, there = (Path(temporary) / name / "site-packages" for name in ("carried", "there"))
        for install in track("bundles", bundles_of, console=CONSOLE):
            subprocess.run(["sh", str(install), str(target)], env=os.environ | {"PYTHON": sys.executable}, check=True)
        link_what_is_there(there, lambda name: matches(name, (*NEVER, *THERE)))
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / MIB
        typer.echo(f"{len(bundles_of)} bundles installed: {size:.0f} MiB")
        for code, arguments in ((IMPORT, MODULES), (RAY, ())):
            typer.echo(run_clean((target, there), code, *arguments).replace(f"{temporary}/", "").rstrip())


if __name__ == "__main__":
    app()
