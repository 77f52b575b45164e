"""A draft report with where it came from and how long it took, as text and as JSON."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

from cbedge.sentences import normalize, sentence_spans

DRAFT_STATEMENT = (
    "Unreviewed draft written by a research model; not a medical device. A radiologist must check and correct it "
    "against the radiograph before any use."
)


LOW_CONFIDENCE = 0.5  # of a sentence's words; see Sentence.confidence


@dataclass(frozen=True)
class Timings:
    """Wall time of each stage of one draft, in milliseconds.

    Attributes:
        read: reading and scaling the radiograph.
        vision: the vision encoder.
        qformer: the Q-Former with its projection.
        prefill: the language model over image embeddings and prompt.
        decode: the language model, token by token.
        total: everything from the call to the last token.
    """

    read: float
    vision: float
    qformer: float
    prefill: float
    decode: float
    total: float


class DraftToken(NamedTuple):
    """What one token added to a draft.

    Attributes:
        piece: text, empty where the token completes no character.
        probability: of the token; or the score of the finding that wrote it; ``None`` where it was given to the model.
        finding: the image finding whose sentence it is a part of, ``None`` for the language model's own words.
        token_id: the token.
    """

    piece: str
    probability: float | None
    finding: str | None = None
    token_id: int = -1


@dataclass(frozen=True)
class Sentence:
    """One sentence of a draft, with how sure the model was of it.

    Attributes:
        text: without a heading.
        section: ``findings`` or ``impression``.
        confidence: geometric mean of the probabilities of its tokens, 0 to 1, without those that were given to the
            model. It says how usual the words are to the model there; a usual sentence can be wrong. Of a sentence that
            an image finding opened the draft with, it is that finding's score.
        low: whether the confidence is below :data:`LOW_CONFIDENCE`.
        finding: the image finding that the sentence was written for, ``None`` for any other sentence.
        source: why the sentence is there: ``image`` (a finding's score reached its threshold), ``template`` (it is
            usual), or ``language model`` (the model's own words).
    """

    text: str
    section: str
    confidence: float
    low: bool
    finding: str | None = None
    source: str = "language model"


@dataclass(frozen=True)
class Report:
    """One draft.

    Attributes:
        findings, impression: the two sections; either can be empty.
        text: the text as the model wrote it.
        complete: ``False`` where the draft was cut off at ``max_new_tokens``.
        model, model_version, variant, device: what wrote it.
        view: ``frontal`` or ``lateral``, as told to the model.
        indication_source: ``given``, ``DICOM header``, or ``None`` where the model was told none.
        template: the normal report whose wording the draft keeps to, ``None`` where it keeps to none;
            ``template_source``: ``given``, or ``model`` where it is the usual one for the indication.
        image_findings: findings that the model saw and told itself in the prompt, empty where it saw none; ``None`` for
            a model that is not told. The text can still say otherwise.
        finding_scores: score of every finding that is looked for, 0 to 1; they rank, and are no probabilities.
        finding_thresholds: score from which on each finding counts as present.
        sentences: the draft sentence by sentence, with confidence and source.
        image_sha256: of the input file; ``lateral_sha256`` of the lateral radiograph's, where there was one.
        prompt_tokens: image embeddings and prompt; ``new_tokens``: what was written, the stop token not counted;
            ``opening_tokens``: those of them that image findings opened the draft with, which cost no decoding.
        guessed_tokens, accepted_tokens: what was guessed ahead, and how much of it the model agreed to; ``passes``: of
            the language model over that, 0 where nothing is guessed.
        image_reused: whether what vision encoder and Q-Former had made of the radiographs was kept from an earlier
            draft; ``reused_tokens``: how much of image embeddings and prompt the language model had kept
            (:mod:`cbedge.drafting.recent`). The draft is the same, its timings are not.
        warnings: what a reader must know about the radiograph or its header, such as that it looks mirrored; one
            sentence each, without patient data.
        timings: see :class:`Timings`.
        statement: that this is an unreviewed draft.
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
    lateral_sha256: str | None = None
    template: str | None = None
    template_source: str | None = None
    image_reused: bool = False
    reused_tokens: int = 0
    warnings: tuple[str, ...] = ()
    statement: str = DRAFT_STATEMENT

    def to_json(self) -> str:
        """The report as one JSON object; ``timings_ms`` holds the timings in milliseconds."""
        values = asdict(self)
        for sentence in values["sentences"]:
            sentence["confidence"] = round(sentence["confidence"], 3)
        values["finding_scores"] = {name: round(score, 3) for name, score in self.finding_scores.items()}
        values["finding_thresholds"] = {name: round(value, 3) for name, value in self.finding_thresholds.items()}
        values["timings_ms"] = {name: round(ms, 1) for name, ms in values.pop("timings").items()}
        return json.dumps(values, indent=2, ensure_ascii=False)

    def notes(self) -> list[str]:
        """What a reader should know beside the text: which words the model was unsure of, which sentences stand there
        because of image scores, and what else those point to, which the draft may pass over in silence."""
        unsure = [sentence.text for sentence in self.sentences if sentence.low and not sentence.finding]
        notes = [f"Warning: {warning}" for warning in self.warnings]
        if unsure:
            notes.append(f"Low confidence: {' '.join(unsure)}")
        opened = dict.fromkeys(s.finding for s in self.sentences if s.finding)
        if opened:
            scored = ", ".join(map(self._scored, opened))
            notes.append(f"Written because of image scores, check first: {scored}. A score is no probability.")
        silent = [name for name in self.image_findings or () if name not in opened]
        if silent:
            scored = ", ".join(map(self._scored, silent))
            notes.append(f"Image scores also point to: {scored}. The draft may not say so: look for it.")
        return notes

    def _scored(self, finding: str) -> str:
        """A finding with its score and threshold, where they are known."""
        if finding not in self.finding_scores:
            return finding
        threshold = self.finding_thresholds.get(finding)
        behind = "" if threshold is None else f", threshold {threshold:.2f}"
        return f"{finding} (score {self.finding_scores[finding]:.2f}{behind})"

    def to_text(self) -> str:
        """The report for people: a section a paragraph, the notes, and that it is a draft."""
        notes = "".join(f"[{note}]\n\n" for note in self.notes())
        return f"{format_sections(self.text)}\n\n{notes}[{self.statement}]"


def split_sentences(tokens: Sequence[DraftToken], given: Sequence[str] = ()) -> tuple[Sentence, ...]:
    """The sentences of a draft; one that stands in both sections has the same confidence and finding in both.

    Args:
        tokens: of the draft.
        given: sentences of a template.
    """
    usual = set(map(normalize, given))
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
            source = "image" if finding else "template" if normalize(text[start:end]) in usual else "language model"
            told = Sentence(text[start:end], section, confidence, confidence < LOW_CONFIDENCE, finding, source)
            same = first.setdefault(normalize(told.text), told)
            sentences.append(replace(same, text=told.text, section=section))
    return tuple(sentences)


def format_sections(text: str) -> str:
    """Put each section on a paragraph of its own."""
    return text.replace(" IMPRESSION:", "\n\nIMPRESSION:").strip()
