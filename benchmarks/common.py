"""What the benchmarks share: processes of cbedge, free ports, and records."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import typer

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "chest_pa.png"
START_S = 240  # a service loads the model within this time, also on a slow machine
TRACEBACK = b"Traceback (most recent call last)"


def free_port() -> int:
    """A TCP port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connects(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except OSError:
        return False
    return True


def ready(port: int) -> bool:
    """Whether a ``cbedge serve`` on this port has loaded its model."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).is_success
    except httpx.HTTPError:
        return False


def start_module(module: str, *words: object, **streams: Any) -> subprocess.Popen:
    """``python -m MODULE WORDS`` of this checkout in a new process; ``streams`` as for :class:`subprocess.Popen`."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, "-m", module, *map(str, words)], env=env, **streams)


def start_cbedge(log: Path, *words: object) -> subprocess.Popen:
    """``cbedge WORDS`` in a new process on the CPU, its output appended to ``log``."""
    with open(log, "ab") as file:
        return start_module("cbedge.cli", *words, "--device", "cpu", stdout=file, stderr=file)


def start_service(log: Path, is_up: Callable[[int], bool], port: int, *words: object) -> subprocess.Popen:
    """``cbedge WORDS --port PORT`` in a new process, when it is up.

    Raises:
        RuntimeError: it ends, or is not up in time.
    """
    process = start_cbedge(log, *words, "--port", port)
    end = time.monotonic() + START_S
    while not is_up(port):
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(errors="replace")[-500:]
            raise RuntimeError(f"cbedge {words[0]} does not start (exit code {process.poll()}): {said}")
        time.sleep(0.05)
    return process


@contextmanager
def serving(folder: Path, *words: object) -> Iterator[tuple[str, int]]:
    """A ``cbedge serve`` with these options that logs into ``folder``: its address and its process ID."""
    port = free_port()
    process = start_service(folder / "serve.log", ready, port, "serve", *words)
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def write_record(record: dict[str, Any], output: Path | None, page: str | None = None) -> None:
    """Print a record, as Markdown where ``page`` is given, and write OUTPUT.json and OUTPUT.md."""
    text = json.dumps(record, indent=1)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        if page is not None:
            output.with_suffix(".md").write_text(page, encoding="utf-8")
    typer.echo(page or text)


def refuse_existing(output: Path, force: bool) -> None:
    """End with an error where a record would be overwritten without ``--force``."""
    if output.exists() and not force:
        typer.echo(f"error: {output} exists already: give --force to replace it", err=True)
        raise typer.Exit(1)
