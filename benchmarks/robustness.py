"""``python -m benchmarks.robustness``: thousands of damaged and unusual inputs through every input path.

Files take the Python API, ``cbedge generate`` and ``cbedge batch`` in worker processes, ``cbedge serve`` and ``cbedge
listen`` as processes of their own. Counted are crashes, hangs, tracebacks, exits without an explanation, answers 5xx,
equivalents whose findings or scores differ, bytes held, objects lost, and patient data in logs. Input ``i`` of a seed
is always the same: ``--inputs-from i --inputs 1`` tries it again alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from PIL import Image

from benchmarks.listen_node import send
from benchmarks.mutations import KINDS, MARKER, Input, describe, make_input, plan
from benchmarks.robustness_worker import copies, middle, peak_bytes, reset_peak
from cbedge.bench import machine
from cbedge.errors import CbedgeError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
COUNTS = ("crash", "hang", "traceback", "unexplained exit", "5xx", "unequal", "memory", "patient data", "lost")
NEAR = 0.03  # of a finding's score, between equivalents
# Of a JPEG or 16-bit floats, whose pixels are not quite the film's: 6e-8 more in every pixel moves a score of the
# 8-bit variant by up to .019 already.
NEAR_LOSSY = 0.05
MOST_BYTES = 2**30
RESULTS = Path(__file__).parent / "results" / "robustness"
_ROOT = Path(__file__).parent.parent
_BATCH_LINES = re.compile(r"failed: |wrote \d+ drafts? to |\d+ (files|folders) |note: |warning: |cbedge: ")


@dataclass
class Failure:
    """One input that came to something it may not come to."""

    index: int
    kind: str
    route: str
    fault: str
    what: str
    note: str


@dataclass
class Outcome:
    """What a campaign met; routes add to it from several threads."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    drafted: int = 0
    refused: int = 0
    equivalents: int = 0
    largest_difference: float = 0.0
    most_held: int = 0
    most_held_by: str = ""
    growth: dict[str, list[int]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, made: Input, answer: dict[str, Any]) -> list[Failure]:
        """Judge one answer."""
        faults = judge(made, answer)
        found = [Failure(made.index, made.kind, made.route, f, w[-1500:], describe(made)) for f, w in faults]
        with self.lock:
            self.tried[made.kind, made.route] += 1
            self.drafted += answer.get("code") == 0
            self.refused += answer.get("code", 0) != 0
            if answer.get("truth") and "scores" in answer:
                self.equivalents += 1
                self.largest_difference = max(self.largest_difference, _difference(answer))
            if answer.get("held", 0) > self.most_held:
                self.most_held, self.most_held_by = answer["held"], f"input {made.index}, {describe(made)}"
            self.failures += found
        return found


def judge(made: Input, answer: dict[str, Any]) -> list[tuple[str, str]]:
    """The faults of an answer, each of :data:`COUNTS` and what shows it."""
    faults: list[tuple[str, str]] = [*answer.get("faults", ())]
    stderr, code, error = answer.get("stderr", ""), answer.get("code", 0), answer.get("error", "")
    trace = answer.get("trace") or next((t for t in (stderr, error) if "Traceback (most recent" in t), "")
    if trace:
        faults.append(("traceback", trace))
    elif code and "status" not in answer:
        lines = [line for line in (error or stderr).splitlines() if line.strip()]
        explained = code in _exit_codes() and bool(lines)
        libtiff = made.note.startswith("TIFF")  # it prints lines of its own on standard error
        if made.route == "api":
            explained &= len(lines) == 1
        elif made.route == "generate":
            explained &= bool(lines) and lines[-1].startswith("cbedge: ") and (len(lines) == 1 or libtiff)
        elif made.route == "batch":
            explained &= bool(lines) and lines[-1].startswith("cbedge: ")
            explained &= libtiff or all(map(_BATCH_LINES.match, lines))
        if not explained:
            faults.append(("unexplained exit", f"exit {code}: {error or stderr}"))
    if MARKER in error or (MARKER in stderr and made.kind not in ("text", "table")):
        faults.append(("patient data", error or stderr))
    if answer.get("held", 0) > MOST_BYTES:
        faults.append(("memory", f"{answer['held'] / 1e6:.0f} MB"))
    truth = answer.get("truth")
    if truth and not trace:
        if "scores" not in answer:
            if not made.may_refuse:
                faults.append(("unequal", f"refused: {error or stderr}"))
        elif sorted(answer["findings"]) != sorted(truth[0]) or _difference(answer) > (
            NEAR_LOSSY if "JPEG" in made.note or made.note.startswith("array f2") else NEAR
        ):
            told = f"findings {answer['findings']}, expected {truth[0]}; scores differ by {_difference(answer):.3f}"
            faults.append(("unequal", told))
    return faults


def _difference(answer: dict[str, Any]) -> float:
    scores = answer["truth"][1]
    return max((abs(answer["scores"].get(name, 0) - score) for name, score in scores.items()), default=0.0)


def _exit_codes() -> set[int]:
    kinds = [CbedgeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.exit_code for kind in kinds} - {CbedgeError.exit_code}


class _WorkerRoute:
    """Inputs that one worker process tries."""

    def __init__(self, threads: int | None, limit_s: float):
        self.limit_s, self.command = limit_s, [sys.executable, "-m", "benchmarks.robustness_worker"]
        self.command += [str(threads)] if threads else []
        self.process: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
        )
        if self._line(240) != "ready\n":
            raise RuntimeError("a worker does not start: try python -m benchmarks.robustness_worker")
        return self.process

    def _line(self, seconds: float) -> str | None:
        """The next line; ``None`` where none comes in time, empty where the process ended."""
        assert self.process is not None and self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def answer(self, seed: int, made: Input, only: str | None) -> dict[str, Any]:
        """What the worker says of an input, or how it ended."""
        process = self.process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([seed, made.index, only]) + "\n")
        process.stdin.flush()
        line = self._line(self.limit_s)
        if line:
            return json.loads(line)
        fault = "hang" if line is None else "crash"
        process.kill()
        code = process.wait()
        self.process = None
        return {"faults": [(fault, f"after {self.limit_s:.0f} s" if fault == "hang" else f"exit {code}")]}

    def close(self) -> None:
        """End the worker."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _ServiceRoute:
    """A real process of ``cbedge serve`` or ``cbedge listen``, with what it logs."""

    command: tuple[str, ...]

    def __init__(self, folder: Path, limit_s: float):
        self.folder, self.limit_s, self.port = folder, limit_s, _free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self._seen = 0
        self._start()

    def _start(self) -> None:
        words = [sys.executable, "-m", "cbedge.cli", *self.words(), "--port", str(self.port), "--device", "cpu"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
        end = time.monotonic() + 240
        while not self.is_up():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"{' '.join(self.words()[:1])} does not start: {self.log.read_text()[-500:]}")
            time.sleep(0.1)

    def words(self) -> list[str]:
        """The command's words."""
        raise NotImplementedError

    def is_up(self) -> bool:
        """Whether the service answers."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2):
            return True
        return False

    def answer(self, seed: int, made: Input, only: str | None) -> dict[str, Any]:
        """Try an input, look at the process and at what it logged since."""
        reset_peak(self.process.pid)
        before = peak_bytes(self.process.pid)[0]
        try:
            result = self.attempt(made)
        except (TimeoutError, httpx.TimeoutException):
            result = {"faults": [("hang", f"no answer in {self.limit_s:.0f} s")]}
        except (OSError, httpx.HTTPError, ValueError) as error:
            result = {"code": 1, "status": 0, "error": f"connection ended: {type(error).__name__}"}
        if self.process.poll() is not None:
            result.setdefault("faults", []).append(("crash", f"exit {self.process.returncode}"))
            self._start()
        now, most = peak_bytes(self.process.pid)
        with open(self.log, "rb") as log:
            log.seek(self._seen)
            text = log.read()
            self._seen += len(text)
        logged = text.decode("utf-8", "replace")
        if MARKER in logged:
            result.setdefault("faults", []).append(("patient data", "in the log"))
        return {"stderr": logged.replace(MARKER, "NAME"), "held": most - before, "rss": now, **result}

    def attempt(self, made: Input) -> dict[str, Any]:
        """Try an input."""
        raise NotImplementedError

    def close(self) -> None:
        """End the service."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Serve(_ServiceRoute):
    def __init__(self, folder: Path, limit_s: float):
        super().__init__(folder, limit_s)
        self._truth: dict[int, Any] = {}

    def words(self) -> list[str]:
        return ["serve", "--recent-studies", "0"]

    def is_up(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5).is_success
        return False

    def attempt(self, made: Input) -> dict[str, Any]:
        if made.kind == "http":
            return self._raw(made.data)
        if made.film is not None and made.film not in self._truth:
            seen = []
            for copy in copies(made.film):
                buffer = io.BytesIO()
                Image.fromarray(copy).save(buffer, "PNG")
                values = self._post(buffer.getvalue(), "film.png", {}).json()
                seen.append((values["image_findings"] or [], values["finding_scores"] or {}))
            self._truth[made.film] = middle(seen)
        form = {k: v for k, v in made.options.items() if isinstance(v, str)}
        if "template" in made.options:
            form["template"] = made.options["template"].decode("utf-8", "replace")
        response = self._post(made.data, made.name, form)
        result = self._judged(response.status_code, response.text)
        if made.film is not None:
            result["truth"] = self._truth[made.film]
        if response.status_code == 200 and form.get("format", "json") == "json":
            values = response.json()
            result |= {"findings": values["image_findings"] or [], "scores": values["finding_scores"] or {}}
        return result

    def _post(self, image: bytes, name: str, form: dict[str, str]) -> httpx.Response:
        address = f"http://127.0.0.1:{self.port}/v1/reports"
        return httpx.post(address, files={"image": (name, image)}, data=form, timeout=self.limit_s)

    @staticmethod
    def _judged(status: int, body: str) -> dict[str, Any]:
        faults = [("5xx", f"{status}: {body[:300]}")] if status >= 500 else []
        if status >= 400 and MARKER in body:
            faults.append(("patient data", body[:300].replace(MARKER, "NAME")))
        error = "" if status < 400 else body.replace(MARKER, "NAME")
        return {"code": int(status >= 400), "status": status, "error": error, "faults": faults}

    def _raw(self, data: bytes) -> dict[str, Any]:
        with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
            connection.settimeout(self.limit_s)
            with contextlib.suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while len(answer) < 2**20 and (part := connection.recv(65536)):
                answer += part
        match = re.match(rb"HTTP/1\.\d (\d{3})", answer)
        return self._judged(int(match[1]) if match else 0, answer.decode("utf-8", "replace"))


class _Listen(_ServiceRoute):
    accepted = 0

    def words(self) -> list[str]:
        return ["listen", "--known", "CAMPAIGN", "--spool", str(self.folder / "spool"), "--pair-wait", "0"]

    def attempt(self, made: Input) -> dict[str, Any]:
        if made.kind == "pdu":
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.settimeout(1)
                with contextlib.suppress(OSError):
                    connection.sendall(made.data)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)
            return {"code": 1, "status": 0}
        status = self._store(made)
        result: dict[str, Any] = {"code": int(status != 0), "status": status or 0}
        if status != 0:
            return result
        self.accepted += 1
        end = time.monotonic() + self.limit_s
        while self._held() < self.accepted:
            if time.monotonic() > end:
                waiting = [p for p in (self.folder / "spool").rglob("*") if p.is_file()]
                told = f"{self.accepted} accepted, {self._held()} drafted or failed, {len(waiting)} files in the spool"
                self.accepted = self._held()
                return result | {"faults": [("hang" if waiting else "lost", told)]}
            time.sleep(0.02)
        return result

    def _held(self) -> int:
        spool = self.folder / "spool"
        return sum(p.suffix != ".txt" for name in ("outgoing", "failed") for p in (spool / name).glob("*"))

    def _store(self, made: Input) -> int | None:
        """Send an object's bytes as they are; the status, or ``None`` where the association did not carry it."""
        import pydicom

        syntax, start = str(pydicom.uid.ExplicitVRLittleEndian), 132
        with contextlib.suppress(Exception):
            meta = pydicom.dcmread(io.BytesIO(made.data), stop_before_pixels=True, force=True).file_meta
            start = 144 + int(meta.FileMetaInformationGroupLength)
            syntax = str(meta.TransferSyntaxUID)
        uid = pydicom.uid.generate_uid(entropy_srcs=[made.kind, str(made.index)])
        try:
            return send(self.port, [(uid, made.data[start:])], self.limit_s, "CAMPAIGN", syntax)[0]
        except ValueError:
            return None


def run_campaign(
    inputs: int,
    seed: int,
    only: str | None = None,
    first: int = 0,
    workers: int = 2,
    limit_s: float = 60,
    keep: Path | None = None,
    progress: bool = False,
) -> Outcome:
    """Try inputs ``first`` to ``first + inputs`` of a seed.

    Args:
        inputs: how many.
        seed: of all of them.
        only: one of :data:`benchmarks.mutations.KINDS`.
        first: number of the first input.
        workers: processes for the Python API and the commands.
        limit_s: seconds after which an input hangs.
        keep: folder for the inputs that failed, with how to repeat them.
        progress: say on standard error how far it is.
    """
    outcome = Outcome()
    routes: dict[str, queue.SimpleQueue[int]] = {}
    for index in range(first, first + inputs):
        route = plan(seed, index, only)[1]
        routes.setdefault(route if route in ("serve", "listen") else "worker", queue.SimpleQueue()).put(index)
    errors: list[BaseException] = []

    def work(name: str, folder: Path) -> None:
        runner: _WorkerRoute | _ServiceRoute | None = None
        sizes: list[int] = []
        try:
            if name == "worker":
                runner = _WorkerRoute(max(1, (os.cpu_count() or 2) // workers), limit_s)
            else:
                runner = {"serve": _Serve, "listen": _Listen}[name](folder / name, limit_s)
            while not routes[name].empty():
                try:
                    index = routes[name].get_nowait()
                except queue.Empty:
                    break
                made = make_input(seed, index, only)
                answer = runner.answer(seed, made, only)
                sizes.append(answer.get("rss", 0))
                for failure in outcome.add(made, answer):
                    _keep(keep, failure, made, seed, only)
                done = outcome.tried.total()
                if progress and done % 100 == 0:
                    typer.echo(f"{done} of {inputs}, {len(outcome.failures)} failures", err=True)
        except BaseException as error:  # told by the main thread
            errors.append(error)
        finally:
            if runner is not None:
                runner.close()
            seen = [size for size in sizes if size]
            if len(seen) >= 20:  # the first tenth loads libraries
                with outcome.lock:
                    outcome.growth[f"{name} {folder.name}"] = [seen[len(seen) // 10], seen[-1]]

    with tempfile.TemporaryDirectory() as scratch:
        threads = []
        for name in routes:
            for number in range(workers if name == "worker" else 1):
                folder = Path(scratch) / str(number)
                folder.mkdir(exist_ok=True)
                threads.append(threading.Thread(target=work, args=(name, folder)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return outcome


def _keep(keep: Path | None, failure: Failure, made: Input, seed: int, only: str | None) -> None:
    if keep is None:
        return
    keep.mkdir(parents=True, exist_ok=True)
    name = f"{made.index}-{made.kind}-{made.route}"
    (keep / f"{name}{Path(made.name).suffix or '.bin'}").write_bytes(made.data)
    command = f"python -m benchmarks.robustness --seed {seed} --inputs-from {made.index} --inputs 1"
    command += f" --only {only}" if only else ""
    (keep / f"{name}.txt").write_text(f"{command}\n{failure.note}\n{failure.fault}: {failure.what}\n", encoding="utf-8")


def to_record(outcome: Outcome, command: str, seconds: float) -> dict[str, Any]:
    """A campaign as JSON."""
    counts = Counter(failure.fault for failure in outcome.failures)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    packages = ("numpy", "pillow", "pydicom", "onnxruntime", "pynetdicom", "fastapi", "uvicorn")
    kinds = Counter({kind: sum(n for (k, _), n in outcome.tried.items() if k == kind) for kind, _ in outcome.tried})
    by_route = Counter({r: sum(n for (_, q), n in outcome.tried.items() if q == r) for _, r in outcome.tried})
    return {
        "command": command,
        "commit": commit,
        "machine": machine(),
        "seconds": round(seconds, 1),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages},
        "inputs": outcome.tried.total(),
        "drafted": outcome.drafted,
        "refused": outcome.refused,
        "kinds": dict(kinds.most_common()),
        "routes": dict(by_route.most_common()),
        "counts": {name: counts[name] for name in COUNTS},
        "equivalents": outcome.equivalents,
        "largest_difference": round(outcome.largest_difference, 4),
        "most_held_mb": round(outcome.most_held / 1e6, 1),
        "most_held_by": outcome.most_held_by,
        "growth_mb": {name: [round(size / 1e6, 1) for size in pair] for name, pair in outcome.growth.items()},
        "failures": [vars(failure) for failure in sorted(outcome.failures, key=lambda f: f.index)],
    }


def to_markdown(record: dict[str, Any]) -> str:
    """A campaign's record as a page."""

    def table(title: str, values: dict[str, int]) -> list[str]:
        return [f"| {title} | count |", "| --- | --- |", *[f"| {k} | {n:,} |" for k, n in values.items()], ""]

    growth = ", ".join(f"{name} {a:.0f} → {b:.0f}" for name, (a, b) in record["growth_mb"].items()) or "not measured"
    lines = [
        "# Inputs of every kind, mutated",
        "",
        f"`{record['command']}`, commit {record['commit'][:12]}",
        "",
        f"{record['inputs']:,} inputs in {record['seconds'] / 60:.1f} minutes: {record['drafted']:,} answered, "
        f"{record['refused']:,} refused. {record['equivalents']:,} equivalents; their scores differ by "
        f"{record['largest_difference']:.3f} at most. The most memory that one input took: "
        f"{record['most_held_mb']:.0f} MB ({record['most_held_by']}).",
        "",
        *table("fault", record["counts"]),
        *table("kind", record["kinds"]),
        *table("route", record["routes"]),
        f"Memory of each process after a tenth of its inputs and at the end, in MB: {growth}.",
        "",
        f"Machine: {json.dumps(record['machine'])}; Python {record['python']}; "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + ".",
        "",
    ]
    for failure in record["failures"][:50]:
        last = (failure["what"].strip().splitlines() or [""])[-1][:160]
        lines.append(f"- input {failure['index']}, {failure['kind']}, {failure['fault']}: {failure['note']}: {last}")
    return "\n".join(lines).rstrip() + "\n"


@app.command(help=__doc__)
def main(
    inputs: Annotated[int, typer.Option(min=1, help="How many inputs.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for all inputs.")] = 0,
    inputs_from: Annotated[int, typer.Option(min=0, help="Number of the first input.")] = 0,
    only: Annotated[str | None, typer.Option(help=f"One kind: {', '.join(KINDS)}.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes for the Python API and the commands.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which an input counts as hanging.")] = 60,
    keep: Annotated[Path | None, typer.Option(help="Folder for the inputs that failed.")] = None,
    output: Annotated[Path | None, typer.Option(help="Record to write: OUTPUT.json and OUTPUT.md.")] = None,
) -> None:
    """Run a campaign, print its counts, and end with 1 where anything failed."""
    if only is not None and only not in KINDS:
        raise typer.BadParameter(f"unknown kind {only!r}; give one of: {', '.join(KINDS)}")
    start = time.monotonic()
    outcome = run_campaign(inputs, seed, only, inputs_from, workers, limit, keep, progress=True)
    command = f"python -m benchmarks.robustness --inputs {inputs} --seed {seed}"
    command += (f" --inputs-from {inputs_from}" if inputs_from else "") + (f" --only {only}" if only else "")
    record = to_record(outcome, command, time.monotonic() - start)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(to_markdown(record), encoding="utf-8")
    typer.echo(to_markdown(record))
    raise typer.Exit(1 if outcome.failures else 0)


if __name__ == "__main__":
    app()
