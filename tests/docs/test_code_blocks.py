"""Every command and sample of the README and the docs runs as printed.

The blocks of a page run from top to bottom in one new folder that has ``examples/``. A comment above a block changes
that: ``<!-- not run: REASON -->``, or ``<!-- background: REASON -->`` for a server, which runs to the end of the page;
the next block starts when it listens. ``<!-- output -->`` stands above what the block before prints: numbers may differ
from machine to machine, and ``…`` stands for any text.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DEFAULT_PORT = 8642  # of cbedge serve
_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_RUNNABLE = ("sh", "python")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comment above it."""

    language: str
    text: str
    mark: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language in _RUNNABLE and not self.mark.startswith("not run: ")


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], found["mark"] or "", text.count("\n", 0, found.start("language")) + 1)
        for found in _BLOCK.finditer(text)
    ]


RUNNING = [page for page in PAGES if any(block.runs for block in blocks_of(page))]


class Shell:
    """Runs the blocks of one page in a folder; ends its servers when it is closed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.servers: list[subprocess.Popen[bytes]] = []
        programs = folder / ".programs"
        programs.mkdir()
        command = programs / "cbedge"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cbedge "$@"\n')
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        shutil.copytree(ROOT / "examples", folder / "examples")
        paths = [str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}

    def run(self, block: Block) -> str:
        """What a block prints."""
        if block.language == "python":
            out = StringIO()
            with redirect_stdout(out):
                exec(compile(block.text, "block", "exec"), {"__name__": "__main__"})
            return out.getvalue()
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.mark.startswith("background: "):
            self._serve(command, block.text)
            return ""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _serve(self, command: list[str], text: str) -> None:
        given = re.search(r"--port (\d+)", text)
        port = int(given[1]) if given else DEFAULT_PORT
        if _listens(port):
            pytest.skip(f"port {port} is in use")
        log = self.folder / f"{port}.log"
        with log.open("wb") as file:
            server = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.servers.append(server)
        end = time.monotonic() + 60
        while not _listens(port):
            assert time.monotonic() < end and server.poll() is None, f"it does not listen: {log.read_text()}"
            time.sleep(0.1)

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.wait(30)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    if shutil.which("bash") is None or shutil.which("curl") is None:
        pytest.skip("bash or curl is not installed")
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.mark.parametrize("page", RUNNING, ids=[str(page.relative_to(ROOT)) for page in RUNNING])
def test_the_samples_of_a_page_run_as_printed(page: Path, shell: Shell):
    printed = ""
    for block in blocks_of(page):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.runs:
            try:
                printed = shell.run(block)
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error
        elif block.mark == "output":
            assert same_text(printed, block.text), f"{where}: it prints\n{printed}"


def test_every_block_says_what_it_is():
    vague = [
        f"{page.relative_to(ROOT)}, line {block.line}"
        for page in PAGES
        for block in blocks_of(page)
        if not block.language or (block.mark.startswith("not run") and len(block.mark) < len("not run: why"))
    ]
    assert not vague, "no language, or no reason why it does not run"


def test_the_readme_shows_what_its_example_prints(shell: Shell):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<table>.*?</td><td>(.*?)</td></tr></table>", readme, re.S)
    assert shown
    text = re.sub(r"\*\*\d\*\* ", "", shown[1]).replace("\\*", "*")
    typed = re.search(r"<code>(cbedge generate [^<]+)</code>", shown[0])
    assert typed
    command = Block("sh", typed[1], "", 0)
    printed = shell.run(command)
    fixed = [sentence for sentence in re.split(r"\n+|(?<=\.) ", text) if sentence.startswith(("[", "FINDINGS", "IMP"))]
    assert fixed and all(_numberless(sentence) in _numberless(printed) for sentence in fixed), printed


def test_ci_types_the_commands_of_the_readme():
    typed = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("--quiet ", "")
    commands = [block.text for block in blocks_of(ROOT / "README.md") if ".ci/run types it" in block.mark]
    assert len(commands) == 2
    assert commands[0].strip() in typed
    assert all(part.strip() in typed for part in commands[1].split("&&"))


def same_text(printed: str, shown: str) -> bool:
    """Whether a text is what is shown, but for numbers and what ``…`` stands for."""
    parts = [re.escape(_numberless(part).strip()) for part in shown.split("…")]
    return re.fullmatch(r".*".join(parts), _numberless(printed).strip(), re.S) is not None


def _numberless(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "0", text)


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
