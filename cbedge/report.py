"""A draft report with its provenance and timings, as text and as JSON."""

import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from cbedge.sentences import normalize, sentence_spans

DRAFT_STATEMENT = (
    "Unreviewed draft written by a research model; not a medical device. A radiologist must check and correct it "
    "against the radiograph before any use."
)


LOW_CONFIDENCE = 0.5  # see Sentence.confidence
MARK = "*"  # behind a sentence that is not assessed
MARKED, OMITTED = "mark", "omit"  # how unassessed sentences are shown; any other way: as the others
_SOURCES = {"language": "language model"}  # basis → the deprecated source of a sentence


@dataclass(frozen=True)
class Timings:
    """Wall time of each stage of one draft, in milliseconds.

    Attributes:
        read: loading and preprocessing the radiographs.
        vision: the vision encoder.
        qformer: the Q-Former and its projection.
        prefill: the language model's pass over image embeddings, prompt and opening.
        decode: generation of the remaining tokens.
        total: everything from the call to the last token.
    """

    read: float
    vision: float
    qformer: float
    prefill: float
    decode: float
    total: float


class DraftToken(NamedTuple):
    """One token of a draft.

    Attributes:
        piece: the text that it adds; empty if it completes no character.
        probability: of the token; for a finding's opening sentence, the finding's score; ``None`` for text that the
            model did not choose.
        finding: the image finding whose opening sentence it belongs to; ``None`` for the language model's own words.
        token_id: index in the vocabulary.
    """

    piece: str
    probability: float | None
    finding: str | None = None
    token_id: int = -1


@dataclass(frozen=True)
class Sentence:
    """One sentence of a draft, with the model's confidence in it.

    Attributes:
        text: without a heading.
        section: ``findings`` or ``impression``.
        confidence: geometric mean of its tokens' probabilities, 0 to 1, tokens without a probability excluded. It
            measures how typical the words are for the model at this place; a typical sentence can be wrong. For a
            finding's opening sentence it is the finding's score.
        low: whether it is the language model's own (``basis``) and its confidence is below :data:`LOW_CONFIDENCE`.
            ``False`` for the others: a score is compared with its own threshold, and a template is given.
        finding: the image finding that the sentence states; ``None`` for any other sentence.
        basis: why the sentence is there: ``image`` (a finding's score reached its threshold), ``template`` (it is a
            template's sentence), or ``language`` (the language model's own words).
        assessed: ``False`` if it states or denies a finding that is not assessed, or is not in English.
        unassessed: those findings.
        marked: whether :data:`MARK` follows it in the report's text.
    """

    text: str
    section: str
    confidence: float
    low: bool
    finding: str | None = None
    basis: str = "language"
    assessed: bool = True
    unassessed: tuple[str, ...] = ()
    marked: bool = False

    @property
    def source(self) -> str:
        """Deprecated: :attr:`basis`, with ``language model`` for ``language``."""
        warnings.warn("Sentence.source is deprecated: use .basis", DeprecationWarning, stacklevel=2)
        return _SOURCES.get(self.basis, self.basis)


@dataclass(frozen=True)
class Report:
    """One draft.

    Attributes:
        findings: the findings section; can be empty.
        impression: the impression section; can be empty.
        text: both sections as one text, with :data:`MARK` behind marked sentences.
        complete: ``False`` if the draft was cut off at ``max_new_tokens``.
        model: name of the model that wrote it.
        model_version: its version.
        variant: its variant.
        device: where it ran.
        view: ``frontal`` or ``lateral``, as stated in the prompt.
        indication_source: ``given``, ``DICOM header``, or ``None`` if the prompt has no indication.
        template: the normal report whose wording the draft follows, or ``None``.
        template_source: ``given`` for the user's, ``model`` for the model's template for this indication.
        image_findings: assessed findings whose score reaches its threshold, which the prompt lists; empty if none does;
            ``None`` for a model without finding scores. The text can still contradict them.
        finding_scores: score of every finding that the model knows, 0 to 1.
        finding_scores_calibrated: whether the scores are calibrated probabilities; else they only rank films.
        operating_point: the operating point of the thresholds, such as ``balanced``; ``None`` for a model without.
        unassessed: findings that the model does not assess on these radiographs; empty if nothing was measured.
        unassessed_above_threshold: those of them whose scores reach their thresholds; the model's own sentences
            contradict none of them.
        uncertain: assessed findings whose scores neither state nor rule them out: they are not in ``image_findings``,
            but their scores reach the ``sensitive`` operating point.
        unassessed_shown_as: ``mark``, ``omit`` or ``plain``: how sentences on unassessed and uncertain ones are shown.
        omitted_sentences: number of sentences left out because they are not assessed.
        finding_thresholds: the score at which each finding counts as present.
        sentences: the sentences of the draft, with confidence and source.
        image_sha256: hash of the input file.
        lateral_sha256: hash of the lateral radiograph's file, if one was given.
        prompt_tokens: length of image embeddings and prompt.
        new_tokens: length of the draft without the stop token.
        opening_tokens: those of ``new_tokens`` that state image findings and were not decoded.
        guessed_tokens: tokens proposed by speculative decoding.
        accepted_tokens: those of ``guessed_tokens`` that the model accepted.
        passes: decoding passes of the language model; 0 if it was not used.
        image_reused: whether the outputs of vision encoder and Q-Former came from the cache of recent studies.
        reused_tokens: image embeddings and prompt tokens that the language model did not read again
            (:mod:`cbedge.drafting.recent`). Reuse changes the timings, not the draft.
        unfamiliarity: how unlike the radiographs of training the image is: 0 is typical, 1 the distance that 1% of
            validation radiographs exceed; above 1, there is a warning. ``None`` for a model without this measure.
        warnings: what the reader must know about the radiograph or its header, for example that it looks mirrored;
            one sentence each, without patient data.
        timings: see :class:`Timings`.
        statement: the statement that this is an unreviewed draft.
    """

    findings: str
    impression: str
    text: str
    complete: bool
    model: str
    model_version: str
    variant: str
    device: str
    view: str
    indication_source: str | None
    image_findings: tuple[str, ...] | None
    finding_scores: dict[str, float]
    sentences: tuple[Sentence, ...]
    image_sha256: str
    prompt_tokens: int
    new_tokens: int
    opening_tokens: int
    guessed_tokens: int
    accepted_tokens: int
    passes: int
    timings: Timings
    finding_thresholds: dict[str, float] = field(default_factory=dict)
    finding_scores_calibrated: bool = False
    operating_point: str | None = None
    unassessed: tuple[str, ...] = ()
    unassessed_above_threshold: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    unassessed_shown_as: str = MARKED
    omitted_sentences: int = 0
    lateral_sha256: str | None = None
    template: str | None = None
    template_source: str | None = None
    image_reused: bool = False
    reused_tokens: int = 0
    unfamiliarity: float | None = None
    warnings: tuple[str, ...] = ()
    statement: str = DRAFT_STATEMENT

    def to_json(self) -> str:
        """The report as one JSON object, with :meth:`notes`; ``timings_ms`` holds the timings in milliseconds."""
        values = asdict(self)
        for sentence in values["sentences"]:
            sentence["confidence"] = round(sentence["confidence"], 3)
            sentence["source"] = _SOURCES.get(sentence["basis"], sentence["basis"])  # deprecated
        values["finding_scores"] = {name: round(score, 3) for name, score in self.finding_scores.items()}
        values["finding_thresholds"] = {name: round(value, 3) for name, value in self.finding_thresholds.items()}
        if self.unfamiliarity is not None:
            values["unfamiliarity"] = round(self.unfamiliarity, 3)
        values["timings_ms"] = {name: round(ms, 1) for name, ms in values.pop("timings").items()}
        values["notes"] = self.notes()
        return json.dumps(values, indent=2, ensure_ascii=False)

    def notes(self) -> list[str]:
        """Notes for the reader: warnings, sentences of low confidence, sentences written because of image scores,
        findings with a high score that the draft may not mention, and what is not assessed."""
        unsure = [sentence.text for sentence in self.sentences if sentence.low]
        notes = [f"Warning: {warning}" for warning in self.warnings]
        if unsure:
            notes.append(f"Low confidence: {' '.join(unsure)}")
        opened = dict.fromkeys(s.finding for s in self.sentences if s.finding)
        if opened:
            scored = ", ".join(map(self._scored, opened))
            kind = "calibrated probabilities" if self.finding_scores_calibrated else "not probabilities"
            notes.append(f"Written because of image scores ({kind}), check first: {scored}.")
        others = [name for name in self.image_findings or () if name not in opened]
        if self.finding_scores and others and others[0] not in self.finding_scores:  # "other abnormality"
            general = next(iter(self.finding_scores))
            kind = "assessed finding" if self.unassessed else "finding"
            if general in opened:
                notes.append(f"No single {kind} reached its threshold: look for what is abnormal.")
            else:
                notes.append(
                    f"The image scores call this study {self._scored(general)}, but no single {kind} "
                    "reached its threshold. The draft may read as normal: check the image."
                )
        elif others:
            scored = ", ".join(map(self._scored, others))
            notes.append(f"Image scores also point to: {scored}. The draft may not mention this: check the image.")
        return notes + self._unassessed_notes()

    def _unassessed_notes(self) -> list[str]:
        notes = []
        if self.unassessed_above_threshold:
            scored = ", ".join(map(self._scored, self.unassessed_above_threshold))
            notes.append(
                f"Image scores also point to: {scored}, which this model does not assess reliably: check the image."
            )
        if count := self.omitted_sentences:
            some = "1 sentence was" if count == 1 else f"{count} sentences were"
            notes.append(f"Incomplete: {some} left out because this model does not assess what they say.")
        spoken = {name for sentence in self.sentences if sentence.marked for name in sentence.unassessed}
        if uncertain := [name for name in self.uncertain if name in spoken]:
            scored = ", ".join(map(self._scored, uncertain))
            notes.append(f"Uncertain, so marked: {scored}. The score neither states it nor rules it out.")
        if any(sentence.marked for sentence in self.sentences):
            notes.append(f"{MARK} This model does not assess what the sentence says: check the image.")
        if self.unassessed and self.unassessed_shown_as in (MARKED, OMITTED):
            notes.append(f"Not assessed: {', '.join(self.unassessed)}.")
        return notes

    def _scored(self, finding: str) -> str:
        """A finding with its score and threshold, where they are known."""
        if finding not in self.finding_scores:
            return finding
        threshold = self.finding_thresholds.get(finding)
        behind = "" if threshold is None else f", threshold {threshold:.2f}"
        kind = "probability" if self.finding_scores_calibrated else "score"
        return f"{finding} ({kind} {self.finding_scores[finding]:.2f}{behind})"

    def to_text(self) -> str:
        """The report as readable text: one paragraph per section, the notes, and the draft statement."""
        notes = "".join(f"[{note}]\n\n" for note in self.notes())
        return f"{format_sections(self.text)}\n\n{notes}[{self.statement}]"


def split_sentences(tokens: Sequence[DraftToken], template: Sequence[str] = ()) -> tuple[Sentence, ...]:
    """Split a draft into sentences, some of them from a template; a sentence in both sections has the same confidence
    and finding in both."""
    from_template = set(map(normalize, template))
    ends = [*accumulate(len(token.piece) for token in tokens)]
    text = "".join(token.piece for token in tokens)
    section, sentences, first = "findings", list[Sentence](), dict[str, Sentence]()
    parts = [*re.finditer(r"FINDINGS:|IMPRESSION:", text)]
    bounds = [(0, None), *((part.end(), part.group()) for part in parts)]
    stops = [*(part.start() for part in parts), len(text)]
    for (begin, heading), stop in zip(bounds, stops, strict=True):
        section = heading[:-1].lower() if heading else section
        for start, end in sentence_spans(text[begin:stop]):
            start, end = start + begin, end + begin
            words = [w for w, last in zip(tokens, ends, strict=True) if start < last and last - len(w.piece) < end]
            logs = [math.log(max(w.probability, 1e-9)) for w in words if w.probability is not None]
            confidence = math.exp(sum(logs) / max(1, len(logs)))
            finding = next((w.finding for w in words if w.finding), None)
            own = "template" if normalize(text[start:end]) in from_template else "language"
            basis = "image" if finding else own
            low = basis == "language" and confidence < LOW_CONFIDENCE
            sentence = Sentence(text[start:end], section, confidence, low, finding, basis)
            same = first.setdefault(normalize(sentence.text), sentence)
            sentences.append(replace(same, text=sentence.text, section=section))
    return tuple(sentences)


def format_sections(text: str) -> str:
    """Put each section in its own paragraph."""
    return text.replace(" IMPRESSION:", "\n\nIMPRESSION:").strip()
