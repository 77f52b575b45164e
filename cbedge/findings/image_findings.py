"""Image findings: scores of the Q-Former that are listed in the prompt and open a draft.

ClinicalBLIP (Ji et al. 2024) puts prior knowledge into the prompt. Here the model's own image findings are added: a
linear head on the Q-Former's output scores findings, and the prompt lists those above their thresholds. So statements
of the language model about the image can be traced to a score.

A small language model ignores much of its prompt and falls back on a normal report. So a draft can be opened with a
sentence for each listed finding, from which the language model continues (a prefix constraint, the simplest of the
lexical constraints of Hokamp and Liu, ACL 2017). Later sentences that contradict these are removed
(:mod:`cbedge.drafting.sentence_filter`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from cbedge.errors import BundleError, OptionError

OTHER = "other abnormality"
_QUOTES = re.compile(r'["“”„«»‘]|’(?!\w)')
CONTRARY = (("hyperinflation", "low volume"),)  # of bundles that name no such pairs


MIN_AUC = 0.70  # a finding is assessed if the lower bound of its AUC reaches this
RULED_OUT = 0.05  # a finding with a smaller probability counts as ruled out


@dataclass(frozen=True)
class Measured:
    """How well a finding's score separates the films of one collection.

    Attributes:
        auc: area under the ROC curve, 0 to 1.
        low, high: its 95% interval.
        films: number of films; ``positives`` of them have the finding.
    """

    auc: float
    low: float
    high: float
    films: int
    positives: int


@dataclass(frozen=True)
class Standing:
    """What was measured of one finding.

    Attributes:
        home: on films of the hospitals that the model was trained for; ``None`` if not measured.
        away: on films of another hospital; ``None`` if not measured.
    """

    home: Measured | None = None
    away: Measured | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Standing:
        """Read what :func:`dataclasses.asdict` gives as JSON."""
        return cls(**{place: Measured(**values[place]) for place in ("home", "away") if values.get(place)})

    @property
    def assessed(self) -> str:
        """``yes``, ``no``, or ``familiar films``: whether the finding is assessed."""
        return "yes" if self.is_assessed(False) else "familiar films" if self.is_assessed(True) else "no"

    def is_assessed(self, familiar: bool) -> bool:
        """Whether a draft may state or deny the finding without a mark: the lower bound of its AUC away from home, or,
        if that was not measured, at home on a film that resembles those of training, reaches :data:`MIN_AUC`."""
        measured = self.away or (self.home if familiar else None)
        return measured is not None and measured.low >= MIN_AUC


@dataclass(frozen=True)
class ImageFindings:
    """The findings of a model, with thresholds, opening sentences and contradictions.

    Attributes:
        names: names of the findings; the first means "abnormal", and the others count only if it is present.
        thresholds: for each name, the score at which the finding counts as present, 0 to 1; chosen on validation
            studies.
        openings: for each name, the sentence that opens a draft if the finding is present, or an empty string. An empty
            tuple for no openings.
        denials: for each name, case-insensitive regular expressions of sentences that contradict the finding; one of
            them has to match. An empty tuple for none.
        lateral_shares: for each name, the weight of the lateral radiograph, 0 to 1; chosen on validation studies. An
            empty tuple for equal weights.
        excludes: pairs of findings that are never reported together.
        standings: for each name, what was measured of it. An empty tuple if nothing was: then every finding counts as
            assessed.
        operating_points: name of an operating point, such as ``sensitive``, → a threshold for each name.
        head_thresholds: for the first names, which the Q-Former scores and the prompt lists, the thresholds of the
            Q-Former's own scores, if the bundle has other readers (:mod:`cbedge.findings.finding_reader`). Empty if the
            Q-Former scores all.

    Raises:
        ValueError: lengths differ, there are no names, or a share is invalid.
    """

    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    openings: tuple[str, ...] = ()
    denials: tuple[tuple[str, ...], ...] = ()
    lateral_shares: tuple[float, ...] = ()
    excludes: tuple[tuple[str, str], ...] = CONTRARY
    standings: tuple[Standing, ...] = ()
    operating_points: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    head_thresholds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.thresholds):
            raise ValueError(f"{len(self.names)} findings with {len(self.thresholds)} thresholds")
        if self.openings and len(self.openings) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.openings)} openings")
        if self.denials and len(self.denials) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.denials)} denials")
        if self.lateral_shares and len(self.lateral_shares) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.lateral_shares)} shares of the lateral view")
        if self.standings and len(self.standings) != len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.standings)} standings")
        for point, thresholds in self.operating_points.items():
            if len(thresholds) != len(self.names):
                raise ValueError(f"{len(self.names)} findings with {len(thresholds)} thresholds of {point}")
        if len(self.head_thresholds) > len(self.names):
            raise ValueError(f"{len(self.names)} findings with {len(self.head_thresholds)} thresholds of the Q-Former")
        if not all(0 <= share <= 1 for share in self.lateral_shares):
            raise ValueError(f"the lateral view's shares are {self.lateral_shares}; give 0 to 1")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ImageFindings:
        """Read what :func:`dataclasses.asdict` gives as JSON; until version 0.2 a denial was one regular expression."""
        denials = (of if isinstance(of, list) else [of] if of else [] for of in values.get("denials", ()))
        return cls(
            names=tuple(map(str, values["names"])),
            thresholds=tuple(map(float, values["thresholds"])),
            openings=tuple(map(str, values.get("openings", ()))),
            denials=tuple(tuple(map(str, of)) for of in denials),
            lateral_shares=tuple(map(float, values.get("lateral_shares", ()))),
            excludes=tuple((str(one), str(other)) for one, other in values.get("excludes", CONTRARY)),
            standings=tuple(map(Standing.from_json, values.get("standings", ()))),
            operating_points={
                str(point): tuple(map(float, thresholds))
                for point, thresholds in values.get("operating_points", {}).items()
            },
            head_thresholds=tuple(map(float, values.get("head_thresholds", ()))),
        )

    def at(self, operating_point: str) -> ImageFindings:
        """These findings with the thresholds of an operating point.

        Raises:
            OptionError: there is no such operating point.
        """
        if operating_point not in self.operating_points:
            known = ", ".join(self.operating_points) or "none; this model has one threshold for each finding"
            raise OptionError(f"unknown operating point {operating_point[:40]!r}; known: {known}")
        return replace(self, thresholds=self.operating_points[operating_point])

    @property
    def operating_point(self) -> str | None:
        """The name of the operating point that has these thresholds; ``None`` if none has."""
        return next((name for name, values in self.operating_points.items() if values == self.thresholds), None)

    @property
    def head(self) -> ImageFindings:
        """The findings that the Q-Former's head scores, with the thresholds of its scores."""
        count = len(self.head_thresholds)
        if not count:
            return self
        pairs = tuple(pair for pair in self.excludes if {*pair} <= {*self.names[:count]})
        return ImageFindings(
            self.names[:count],
            self.head_thresholds,
            self.openings[:count],
            self.denials[:count],
            self.lateral_shares[:count],
            pairs,
        )

    def prompted(self, present: Sequence[str]) -> tuple[str, ...]:
        """What the prompt lists of the present findings: those that the language model was trained with, or
        :data:`OTHER` if there are only others."""
        known = {OTHER, *self.head.names}
        return tuple(name for name in present if name in known) or (OTHER,) * bool(present)

    def unassessed(self, familiar: bool = True) -> tuple[str, ...]:
        """The findings that a draft must neither state nor deny without a mark.

        Args:
            familiar: whether the film resembles those of training, so that figures measured at home hold.
        """
        rows = zip(self.names, self.standings, strict=False)
        return tuple(name for name, standing in rows if not standing.is_assessed(familiar))

    def uncertain(
        self, scores: Sequence[float] | np.ndarray, present: Collection[str], unassessed: Collection[str]
    ) -> tuple[str, ...]:
        """The assessed findings that scores neither state nor rule out: they are not present, but their scores reach
        the lowest threshold of all operating points, and :data:`RULED_OUT`. None without several operating points."""
        if len(self.operating_points) < 2:
            return ()
        least = np.maximum(np.min([*self.operating_points.values()], axis=0), RULED_OUT)
        rows = zip(self.names, scores, least, strict=True)
        settled = {*present, *unassessed, *(self.names[:1] if present else ())}
        return tuple(name for name, score, low in rows if score >= low and name not in settled)

    def join(self, frontal: np.ndarray, lateral: np.ndarray) -> np.ndarray:
        """Combine the logits of both radiographs, [..., names]."""
        shares = np.array(self.lateral_shares or (0.5,) * len(self.names), frontal.dtype)
        return (1 - shares) * frontal + shares * lateral

    def read(self, scores: Sequence[float] | np.ndarray, unassessed: Collection[str] = ()) -> tuple[str, ...]:
        """The assessed findings that are present, for scores [names]: none if "abnormal" is below its threshold; else
        those that reach their thresholds (of an excluding pair, the one further above its own), or :data:`OTHER` if
        none does and "abnormal" is assessed. Thresholds are chosen behind that of "abnormal", so it counts even if it
        is not assessed."""
        if scores[0] < self.thresholds[0]:
            return ()
        above = {name: by for name, by in self._above(scores).items() if name not in {self.names[0], *unassessed}}
        for pair in self.excludes:
            if above.keys() >= {*pair}:
                del above[min(pair, key=lambda name: above[name])]
        return tuple(above) or ((OTHER,) if self.names[0] not in unassessed else ())

    def above(self, scores: Sequence[float] | np.ndarray, unassessed: Collection[str]) -> tuple[str, ...]:
        """Those of the unassessed findings that reach their thresholds, whatever the other scores are."""
        return tuple(name for name in self._above(scores) if name in unassessed)

    def _above(self, scores: Sequence[float] | np.ndarray) -> dict[str, float]:
        """By how much each finding exceeds its threshold, of those that reach it."""
        rows = zip(self.names, scores, self.thresholds, strict=True)
        return {name: float(score) - least for name, score, least in rows if score >= least}

    def open(self, present: Sequence[str]) -> dict[str, str]:
        """The sentences that open the draft: finding → sentence, for present findings that have one."""
        return {name: text for name, text in zip(self.names, self.openings, strict=False) if text and name in present}

    def contradicting(self, present: Sequence[str]) -> AnyPattern:
        """A pattern that matches sentences which contradict a present finding. :data:`OTHER` is contradicted like the
        first name, "abnormal"."""
        return AnyPattern((*dict.fromkeys(text for name in present for text in self.denials_of(name)),))

    def denials_of(self, name: str) -> tuple[str, ...]:
        """The regular expressions of sentences that contradict a finding, :data:`OTHER` like "abnormal"."""
        denials = dict(zip(self.names, self.denials, strict=False))
        return denials.get(self.names[0] if name == OTHER else name, ())


@dataclass(frozen=True)
class AnyPattern:
    """Several case-insensitive regular expressions, of which one has to match. Each is compiled when it is needed."""

    patterns: tuple[str, ...]

    def search(self, text: str) -> bool:
        """Whether one of the patterns matches somewhere in the text in Unicode's form NFKC, quotation marks apart.

        Raises:
            BundleError: one is not a regular expression.
        """
        text = _QUOTES.sub("", unicodedata.normalize("NFKC", text))
        return any(_compiled(pattern).search(text) for pattern in self.patterns)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise BundleError(
            f"a denial in the model's manifest is not a regular expression ({error}): correct it"
        ) from None


def scores_of(logits: np.ndarray) -> np.ndarray:
    """Logits → scores from 0 to 1, of the same shape. Calibrated logits give
    probabilities; other scores only rank images."""
    return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -60, 60)))
