"""Run inputs of ``benchmarks.robustness`` in this process, one after another; a campaign starts several workers.

It reads one JSON line ``[seed, index, only]`` at a time from standard input and answers with one line. If a decoder
crashes, this process ends, and the campaign counts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.mutations import Input, film, make_input
from benchmarks.mutations.base import plain_png

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
_TOKENS = 4  # of a draft; the scores of the image need none


def peak_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Resident memory of a process in bytes, now and at most since :func:`reset_peak`; 0 without Linux."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = [re.search(rf"{name}:\s+(\d+)", text) for name in ("VmRSS", "VmHWM")]
    now, most = (int(match[1]) * 1024 if match else 0 for match in found)
    return now, most


def reset_peak(pid: int | str = "self") -> None:
    """Start the peak of a process anew."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def _captured(scratch: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """Capture standard output and error, also of C libraries."""
    paths = [scratch / "stdout", scratch / "stderr"]
    saved = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    files = [open(path, "wb") for path in paths]  # noqa: SIM115 (closed below)
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    try:
        yield lambda: (_flushed(paths[0]), _flushed(paths[1]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, handle in enumerate(saved, 1):
            os.dup2(handle, number)
            os.close(handle)
        for file in files:
            file.close()


def _flushed(path: Path) -> str:
    sys.stdout.flush()
    sys.stderr.flush()
    return path.read_bytes().decode("utf-8", "replace")


def copies(number: int) -> list[np.ndarray]:
    """Several copies of a film, uint16 [rows, columns], with noise in the last bit."""
    rng = np.random.default_rng(number)
    sixteen = np.round(film(number) * 65535)
    return [np.clip(sixteen + rng.integers(-1, 2, sixteen.shape), 0, 65535).astype(np.uint16) for _ in range(7)]


def middle(seen: Sequence[tuple[Sequence[str], Mapping[str, float]]]) -> tuple[list[str], dict[str, float]]:
    """The most frequent findings, and the median of each score."""
    findings = Counter(tuple(sorted(names)) for names, _ in seen).most_common(1)[0][0]
    return list(findings), {name: float(np.median([scores[name] for _, scores in seen])) for name in seen[0][1]}


class Worker:
    """A loaded generator that answers inputs."""

    def __init__(self, scratch: Path, threads: int | None):
        import functools

        from cbedge.api import ReportGenerator

        self.scratch = scratch
        load = ReportGenerator.from_pretrained
        loaded = functools.cache(lambda: load(None, None, "cpu", threads=threads, recent_studies=0))
        # The command line loads a generator for every call: let it use this one.
        ReportGenerator.from_pretrained = classmethod(lambda cls, *a, **k: loaded())  # type: ignore[method-assign, assignment]
        self.generator = loaded()
        self._truth: dict[int, tuple[list[str], dict[str, float]]] = {}

    def truth(self, number: int) -> tuple[list[str], dict[str, float]]:
        """Findings and scores of a film: the median of several copies that differ by at most 1/65,535.

        The 8-bit arithmetic of the embedded model changes a score by up to .02 when a pixel changes by its last bit.
        The median removes this noise, so that what a container changes can be seen.
        """
        if number not in self._truth:
            reports = [
                self.generator.generate(copy.astype(np.float32) / 65535, max_new_tokens=1) for copy in copies(number)
            ]
            self._truth[number] = middle([(r.image_findings or (), r.finding_scores) for r in reports])
        return self._truth[number]

    def answer(self, made: Input) -> dict[str, Any]:
        """The result of an input: ``code``, ``error`` (one line or empty), ``faults``, ``scores``, ``findings`` and
        memory."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        truth = self.truth(made.film) if made.film is not None else None
        reset_peak()
        before = peak_bytes()[0]
        try:
            with _captured(self.scratch) as output:
                result = getattr(self, f"_{made.route}")(made, folder)
                result["stdout"], result["stderr"] = output()
        finally:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
        now, most = peak_bytes()
        return {"truth": truth, "held": most - before, "peak": most, "rss": now, **result}

    def _api(self, made: Input, folder: Path) -> dict[str, Any]:
        from cbedge.drafting.template_parser import read_template
        from cbedge.errors import CbedgeError

        options = {k: v for k, v in made.options.items() if k in ("indication", "comparison", "view")}
        source: Any = made.array if made.array is not None else made.data
        if made.array is None and made.index % 2:
            source = folder / made.name
            source.write_bytes(made.data)
        try:
            if "template" in made.options:
                options["template"] = read_template(made.options["template"].decode("utf-8", "replace"))
            report = self.generator.generate(source, max_new_tokens=_TOKENS, **options)
        except CbedgeError as error:
            return {"code": error.exit_code, "error": str(error)}
        except Exception:
            return {"code": 1, "error": "", "trace": traceback.format_exc()}
        return _read(json.loads(report.to_json()))

    def _generate(self, made: Input, folder: Path) -> dict[str, Any]:
        image = folder / made.name
        image.write_bytes(made.data)
        out = folder / "draft"
        form = made.options.get("format", "json")
        words = ["generate", str(image), "--format", form, "--output", str(out), "--max-new-tokens", str(_TOKENS)]
        for name in ("indication", "comparison", "view"):
            if name in made.options:
                words += [f"--{name}={made.options[name]}".replace("\0", "")]  # no command line can hold a NUL
        if "template" in made.options:
            (folder / "template.txt").write_bytes(made.options["template"])
            words += ["--template", str(folder / "template.txt")]
        result = self._command(words)
        if result["code"] == 0 and form == "json":
            result |= _read(json.loads(out.read_bytes()))
        return result

    def _batch(self, made: Input, folder: Path) -> dict[str, Any]:
        films = folder / "films"
        films.mkdir()
        (films / made.name).write_bytes(made.data)
        given = films
        if made.kind == "table":
            given = films / made.name
            (films / "film.png").write_bytes(plain_png())
        out = folder / "drafts.jsonl"
        result = self._command(["batch", str(given), "--out", str(out), "--max-new-tokens", str(_TOKENS)])
        lines = [json.loads(line) for line in out.read_bytes().splitlines()] if out.is_file() else []
        if len(lines) == 1 and lines[0]["status"] == "ok":
            result |= _read(lines[0])
        return result

    def _command(self, words: list[str]) -> dict[str, Any]:
        from cbedge.cli import main as cli

        sys.argv = ["cbedge", *words]
        try:
            cli.main()
        except SystemExit as end:
            return {"code": end.code if isinstance(end.code, int) else 0 if end.code is None else 1}
        except Exception:
            return {"code": 1, "trace": traceback.format_exc()}
        return {"code": 0}


def _read(values: dict[str, Any]) -> dict[str, Any]:
    return {"code": 0, "findings": values["image_findings"] or [], "scores": values["finding_scores"] or {}}


@app.command(help=__doc__)
def main(
    threads: Annotated[int | None, typer.Argument(help="CPU threads.", show_default="one per core")] = None,
) -> None:
    """Answer inputs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # only answers are written there
    with tempfile.TemporaryDirectory() as scratch:
        worker = Worker(Path(scratch), threads)
        answers.write("ready\n")
        answers.flush()
        for line in sys.stdin:
            seed, index, only = json.loads(line)
            answers.write(json.dumps(worker.answer(make_input(seed, index, only))) + "\n")
            answers.flush()


if __name__ == "__main__":
    app()
