"""Test what needs no torch, on a Python without a small build of torch. That Python runs this file (``versions.py``).

As a program it compiles every installed module of ours, and imports those that need no torch. It prints, as JSON, how
many modules it compiled and imported, and every error except a missing torch. As a plugin of pytest (``-p
without_torch``) it skips each test, or whole file, that fails because torch is missing, and nothing else.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import entropy_fork

MISSING = "No module named 'torch'"


def pytest_configure() -> None:
    """Refuse to test our sources, which may be in the folder of the tests, instead of the wheel."""
    if "site-packages" not in Path(entropy_fork.__file__).parts:
        raise pytest.UsageError(f"entropy_fork is imported from {entropy_fork.__file__}, not from the installed wheel")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    """Skip a file that cannot be imported without torch."""
    return skipped_without_torch((yield), collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Skip a test that needs torch only when it runs."""
    return skipped_without_torch((yield), item.path)


def skipped_without_torch(report: Any, path: Path) -> Any:
    """The report; its outcome is "skipped" if torch was missing."""
    if report.failed and MISSING in report.longreprtext + report.capstdout + report.capstderr:
        report.outcome, report.longrepr = "skipped", (str(path), 0, "Skipped: needs torch")
    return report


def modules() -> dict[str, Path]:
    """Every installed module of ours, by its name."""
    site = Path(entropy_fork.__file__).parents[1]
    folders = (site / "entropy_fork", site / "hydra_plugins" / "entropy_fork")
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return {".".join(file.relative_to(site).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def compile_and_import() -> dict[str, Any]:
    """Compile and import the modules. Returns the counts, and the errors by the module's name."""
    imported, errors, found = 0, {}, modules()
    for name, file in found.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a later Python may refuse what this Python only warns about
                compile(file.read_text(), str(file), "exec")
            importlib.import_module(name)
            imported += 1
        except Exception as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == "torch"):
                errors[name] = f"{type(error).__name__}: {error}"
    return {"compiled": len(found), "imported": imported, "errors": errors}


if __name__ == "__main__":
    json.dump(compile_and_import(), sys.stdout)
