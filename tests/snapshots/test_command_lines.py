"""Help texts and options of every command line, as of the versions in ``constraints.txt``."""

import json
import re
import sys
from typing import Any

import pytest
from conftest import ROOT, run_cli
from syrupy.assertion import SnapshotAssertion
from typer.cli import app as typer_command
from typer.testing import CliRunner

# Fixed width, no colours; what the terminal, a CI service or the user's own settings would change is taken away.
LAYOUT = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1", "HOME": "/home/user"}
UNWANTED = ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "TERMINAL_WIDTH", "CBEDGE_TOKEN", "XDG_CACHE_HOME")
PACKAGES = ("cbedge", "training", "export", "benchmarks")
# optimum_peer runs in an environment of its own, without typer; __main__ lists the benchmarks.
NO_PROGRAMS = ("benchmarks.optimum_peer", "benchmarks.__main__")
EXECUTABLES = [
    module.removesuffix(".__main__")
    for package in ("export", "benchmarks")
    for path in sorted((ROOT / package).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    if (module := f"{package}.{path.stem}") not in NO_PROGRAMS
]
DOCUMENTED = re.findall(
    r"<!-- commands: (\S+) as", (ROOT / "docs" / "reference" / "building-commands.md").read_text(encoding="utf-8")
)

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


@pytest.mark.parametrize("module", EXECUTABLES)
def test_every_executable_module_has_help(module: str, programs: dict[str, dict[str, Any]]):
    name = f"python -m {module}"
    assert programs[name][name]["help"].lstrip().startswith(f"Usage: {name} ")


def test_the_documentation_has_every_building_command(programs: dict[str, dict[str, Any]]):
    built = {name for name in programs if re.match(r"python -m (training|export)\b", name)}
    assert {f"python -m {module.removesuffix('.__main__')}" for module in DOCUMENTED} == built


@pytest.mark.parametrize("module", [module for module in DOCUMENTED if module.startswith("export")])
def test_the_documentation_shows_a_command(module: str):
    done = CliRunner().invoke(typer_command, [module, "utils", "docs", "--name", "it"])
    assert done.exit_code == 0 and done.stdout.startswith("# `it`"), done.output
