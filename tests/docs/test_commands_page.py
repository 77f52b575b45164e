"""What the documentation says of exit codes, extras and commands is what the code does."""

import re
import shlex
import tomllib
from pathlib import Path

from conftest import ROOT, call_cli

from cbedge import errors
from cbedge.cli import main

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def test_the_table_of_exit_codes_is_complete():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .+ \| (?:`(\w+)` )?\|$", page, re.M)
    shown = {int(code): name for code, name in rows}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    literals = re.findall(r"(?:return|exit\()\s*(\d+)", Path(main.__file__).read_text(encoding="utf-8"))
    usage = call_cli(main.__name__, "generate").returncode
    assert usage == 2 and len(rows) == len(shown)
    expected = dict.fromkeys([usage, *map(int, literals)], "") | {kind.exit_code: kind.__name__ for kind in kinds}
    assert shown == expected


def test_hints_name_extras_that_exist():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cbedge").rglob("*.py"))
    named = set(re.findall(r"install_extra\(['\"](\w+)", code))
    assert {"cpu", "gpu", "serve", "hospital", "batch"} == named <= set(EXTRAS)
    assert errors.install_extra("serve") == (
        'pip install -c constraints.txt ".[serve]" in the clone, or from a folder of wheels: '
        'pip install --no-index --find-links FOLDER "cbedge[serve]"'
    )
    # The name is not ours on an index: nothing may tell users to fetch it from there.
    assert not [line for line in re.findall(r".*pip install.*", code) if re.search(r"cbedge(?!\[\{extra)", line)]


def test_options_of_the_service_exist():
    page = (ROOT / "docs" / "offline.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ExecStart=(.+)$", page, re.M)
    program, command, *arguments = shlex.split(line)
    assert program == "/opt/cbedge/bin/cbedge"
    shown = call_cli(main.__name__, command, "--help").stdout
    options = [argument for argument in arguments if argument.startswith("--")]
    assert options and all(f"{option} " in shown for option in options)
