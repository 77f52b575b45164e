"""Find the faults in the answers of a robustness campaign, and sum them up."""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.mutations import MARKER, Input, describe
from cbedge.errors import CbedgeError

COUNTS = ("crash", "hang", "traceback", "unexplained exit", "5xx", "unequal", "memory", "patient data", "lost")
NEAR = 0.03  # largest difference of a finding's score between equivalents
# For JPEG and 16-bit floats, whose pixels differ a little from the film's: 6e-8 in every pixel already moves a score of
# the 8-bit variant by up to .019.
NEAR_LOSSY = 0.05
MOST_BYTES = 2**30
_BATCH_LINES = re.compile(r"failed: |wrote \d+ drafts? to |\d+ (files|folders) |note: |warning: |cbedge: ")


@dataclass
class Failure:
    """One input and its fault."""

    index: int
    kind: str
    route: str
    fault: str
    what: str
    note: str


@dataclass
class Outcome:
    """The sums of a campaign; routes add to them from several threads."""

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
        """Count one answer; returns its faults."""
        faults = find_faults(made, answer)
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


def find_faults(made: Input, answer: dict[str, Any]) -> list[tuple[str, str]]:
    """The faults of an answer: names of :data:`COUNTS`, each with the text that shows it."""
    faults: list[tuple[str, str]] = [*answer.get("faults", ())]
    stderr, code, error = answer.get("stderr", ""), answer.get("code", 0), answer.get("error", "")
    trace = answer.get("trace") or next((t for t in (stderr, error) if "Traceback (most recent" in t), "")
    if trace:
        faults.append(("traceback", trace))
    elif code and "status" not in answer:
        lines = [line for line in (error or stderr).splitlines() if line.strip()]
        explained = code in _exit_codes() and bool(lines)
        libtiff = made.note.startswith("TIFF")  # libtiff prints to standard error
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
            what = f"findings {answer['findings']}, expected {truth[0]}; scores differ by {_difference(answer):.3f}"
            faults.append(("unequal", what))
    return faults


def _difference(answer: dict[str, Any]) -> float:
    scores = answer["truth"][1]
    return max((abs(answer["scores"].get(name, 0) - score) for name, score in scores.items()), default=0.0)


def _exit_codes() -> set[int]:
    kinds = [CbedgeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.exit_code for kind in kinds} - {CbedgeError.exit_code}
