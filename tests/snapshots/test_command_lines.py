"""Help texts and options of every command line, as of the versions in ``constraints.txt``."""

import json
import sys
from typing import Any

import pytest
from conftest import run_cli
from syrupy.assertion import SnapshotAssertion

# Fixed width, no colours; what the terminal, a CI service or the user's own settings would change is taken away.
LAYOUT = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1", "HOME": "/home/user"}
UNWANTED = ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "TERMINAL_WIDTH", "CBEDGE_TOKEN", "XDG_CACHE_HOME")
PACKAGES = ("cbedge", "training", "export", "benchmarks")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="paths look different in Windows")


@pytest.fixture(scope="module")
def programs() -> dict[str, dict[str, Any]]:
    """Of every program its commands, each with help and options."""
    with pytest.MonkeyPatch.context() as patch:
        for name in UNWANTED:
            patch.delenv(name, raising=False)
        done = run_cli("tests.snapshots.command_lines", **LAYOUT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of_package(package: str, programs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The package's commands, those of all its programs."""
    words = {name: name.removeprefix("python -m ").split(".")[0] for name in programs}
    return {name: of for program, found in programs.items() if words[program] == package for name, of in found.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_help(package: str, programs: dict[str, dict[str, Any]], snapshot: SnapshotAssertion):
    told = of_package(package, programs)
    assert "".join(f"$ {name} --help\n{command['help']}\n\n\n" for name, command in told.items()) == snapshot


@pytest.mark.parametrize("package", PACKAGES)
def test_options(package: str, programs: dict[str, dict[str, Any]], snapshot: SnapshotAssertion):
    lines = []
    for name, command in of_package(package, programs).items():
        lines += [name, *(f"    {option}" for option in command["options"])]
    assert "\n".join(lines) + "\n" == snapshot
