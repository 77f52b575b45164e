"""Where results are written: what is there is not lost, and no odd place ends with a traceback."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT

from cbedge import OutputError
from cbedge.files import check_output, write_atomically, write_output


def cbedge(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cbedge.cli", *map(str, arguments)]
    settings: dict = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, **(settings | options))  # type: ignore[call-overload]


def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode(tmp_path: Path):
    path = tmp_path / "draft.json"
    before = os.umask(0o027)
    try:
        write_atomically(path, b"one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_atomically(path, b"two")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604 and path.read_bytes() == b"two"
    with pytest.raises(FileExistsError):
        write_atomically(path, b"three", replace=False)
    assert [p.name for p in tmp_path.iterdir()] == ["draft.json"]


def test_an_input_is_never_replaced_under_whatever_name(tmp_path: Path):
    film = tmp_path / "film.png"
    film.write_bytes(b"film")
    os.link(film, tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to(film)
    for name in ("film.png", "hard.png", "soft.png", "../" + tmp_path.name + "/film.png"):
        with pytest.raises(OutputError, match="is an input file"):
            write_output(tmp_path / name, b"draft", True, [film])
    assert film.read_bytes() == b"film"


def test_links_are_written_through_and_pipes_are_fed(tmp_path: Path):
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_output(link, b"new", True)
    assert link.is_symlink() and target.read_bytes() == b"new"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"through", False)
    reader.join(20)
    assert read == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(OutputError, match="No space left"):
        write_output(Path("/dev/full"), b"x", True)
    with pytest.raises(OutputError, match="too long"):
        check_output(tmp_path / ("x" * 300), True)
    with pytest.raises(OutputError, match="no such folder"):
        check_output(tmp_path / "none" / "x", True)


@pytest.fixture(scope="module")
def film() -> Path:
    return EXAMPLES / "chest_pa.png"


@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        ("{cbedge} generate {film} >&-", 7, "standard output is closed"),
        ("{cbedge} generate {film} > /dev/full", 7, "cannot write to standard output: No space left"),
        ("{cbedge} schema > /dev/full", 7, "cannot write to standard output: No space left"),
        ("{cbedge} batch {film} --out full.jsonl 2> /dev/full", 0, ""),
        ("{cbedge} generate {film} 2>&- | head -c 9", 0, ""),
        ("{cbedge} generate {film} -o {film} --force", 7, "is an input file"),
        ("{cbedge} generate {long}", 3, "cannot read"),
        ("{cbedge} batch {long} --out x.jsonl", 3, "cannot read"),
    ],
)
def test_odd_streams_and_names_end_with_one_line(shell: str, code: int, told: str, film: Path, tmp_path: Path):
    command = shell.format(cbedge=f"{sys.executable} -m cbedge.cli", film=film, long="x" * 5000)
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode in (code, 141) and told in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 1


@pytest.mark.parametrize("letters", ["cp1252", "latin-1", "cp437:strict"])
def test_a_console_that_lacks_letters_gets_escapes(letters: str, tmp_path: Path):
    (tmp_path / "Modell-\u0416\u2713").mkdir()
    done = cbedge(
        "doctor",
        "--model",
        "Modell-\u0416\u2713",
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": letters,
            "PYTHONUTF8": "0",
            "LC_ALL": "C.UTF-8",
        },
    )
    assert (
        "no model bundle at Modell-\\u0416\\u2713 (manifest.json is missing): give the folder of an exported bundle\n"
        in done.stdout
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_ctrl_c_is_one_line_and_130(tmp_path: Path):
    films = tmp_path / "films"
    films.mkdir()
    for number in range(300):
        (films / f"{number}.png").write_bytes((EXAMPLES / "chest_pa.png").read_bytes())
    command = [sys.executable, "-m", "cbedge.cli", "batch", films, "--out", tmp_path / "out.jsonl"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "cbedge: interrupted"


HIDDEN = """
import builtins, json, os, sys
for name in ("sched_getaffinity", "sched_setaffinity", "link", "fork", "mkfifo", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
real = builtins.__import__
def without(name, *rest, **options):
    if name.partition(".")[0] in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ImportError(f"No module named {name!r}")
    return real(name, *rest, **options)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules.pop(name, None)
builtins.__import__ = without
from cbedge.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.mark.slow
def test_commands_need_no_posix_module(tmp_path: Path):
    film = EXAMPLES / "chest_pa.png"
    commands = (
        ["generate", film, "-o", tmp_path / "x.txt"],
        ["batch", film, "--out", tmp_path / "x.jsonl"],
        ["doctor"],
        ["bench", "--repeat", "1", "--warm-up", "0"],
    )
    words = json.dumps([[*map(str, command)] for command in commands])
    done = subprocess.run([sys.executable, "-c", HIDDEN, words], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "FINDINGS" in (tmp_path / "x.txt").read_text()
    assert json.loads((tmp_path / "x.jsonl").read_text())["status"] == "ok"
