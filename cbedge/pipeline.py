"""One draft, step by step, from the radiographs of a study to its report."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

import numpy as np

from cbedge.backends import Backend
from cbedge.bundles.manifest import Manifest
from cbedge.decoding import (
    Decoder,
    Decoding,
    GuessLength,
    SpeculationStats,
    Token,
    beam_search,
    decode,
)
from cbedge.decoding.samplers import sampler_of
from cbedge.drafting.assessment import LEFT_OUT_TOKEN, MARK_TOKEN
from cbedge.drafting.codec import TextCodec
from cbedge.drafting.plan import DraftingResources, DraftPlan, plan_draft
from cbedge.drafting.query import query_films
from cbedge.drafting.recent import CachedStudy, Recent
from cbedge.drafting.sentence_filter import SentenceFilter
from cbedge.drafting.templates import Template
from cbedge.errors import DraftError
from cbedge.findings.finding_reader import FindingReader
from cbedge.findings.reading import ImageReading, interpret
from cbedge.images.film_check import FilmAssessment, FilmCheck
from cbedge.images.gate import pooled
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import Radiograph
from cbedge.prompt import ClinicalContext, split_sections
from cbedge.report import MARKED, DraftToken, Report, Timings, split_sentences
from cbedge.sentences import normalize


@dataclass(frozen=True)
class Engine:
    """A model and everything that its drafts share.

    Attributes:
        manifest: the bundle's manifest.
        variant: name of the variant.
        backend: runs the model.
        resources: tokenizers, templates, phrasebook and lexicon.
        film_check: checks that images look like chest radiographs.
        finding_reader: calibrated readers of findings; ``None`` if the scores are the Q-Former's.
        recent: cache of recent studies.
        guess_length: chooses the number of speculative tokens.
    """

    manifest: Manifest
    variant: str
    backend: Backend
    resources: DraftingResources
    film_check: FilmCheck
    finding_reader: FindingReader | None
    recent: Recent
    guess_length: GuessLength


@dataclass(frozen=True)
class Study:
    """The checked input of one draft.

    Attributes:
        films: the frontal radiograph, and optionally the lateral one.
        context: clinical context; its view is never ``None``.
        indication_source: ``given``, ``DICOM header`` or ``None``.
        notes: warnings about the input.
        template: the user's template, or ``None``.
        max_new_tokens: the user's limit, or ``None``.
        decoding: decoding settings.
        accept_any_image: do not refuse images that do not look like chest radiographs.
        unassessed: how sentences that the model does not assess are shown.
    """

    films: tuple[Radiograph, ...]
    context: ClinicalContext
    indication_source: str | None
    notes: tuple[str, ...]
    template: Template | None
    max_new_tokens: int | None
    decoding: Decoding
    accept_any_image: bool
    unassessed: str = MARKED


def draft_report(
    engine: Engine, study: Study, on_reading: Callable[[ImageReading], None] = lambda reading: None
) -> Generator[str, None, Report]:
    """Draft one report: yields pieces of its text and returns the report.

    Args:
        engine: the model and its resources.
        study: the study to draft.
        on_reading: called with the image reading, before the first piece.

    Raises:
        RadiographError: an image does not look like a chest radiograph of its view.
        DraftError: the model wrote an incomplete report.
    """
    manifest, backend, codec = engine.manifest, engine.backend, engine.resources.codec
    marks = [perf_counter() - sum(film.read_ms for film in study.films) / 1000]
    pixels = [preprocess_radiograph(film, manifest.preprocessing) for film in study.films]
    study = replace(study, films=tuple(map(_without_pixels, study.films)))
    cached = engine.recent.study(pixels, study.context.view)
    image_reused = bool(cached.qformer_outputs)
    marks.append(perf_counter())

    features = cached.features or [backend.encode_image(planes) for planes in pixels]
    checked = engine.film_check.assess(study.films, features, study.context.view, study.accept_any_image)
    marks.append(perf_counter())

    outputs = cached.qformer_outputs or query_films(backend, codec, features, study.context)
    cached.features, cached.qformer_outputs = features, outputs
    rows = [pooled(found) for found in features] if engine.finding_reader else []
    view, reader = study.context.view, engine.finding_reader
    reading = interpret(outputs, manifest.image_findings, rows, reader, view, checked.familiar)
    on_reading(reading)
    marks.append(perf_counter())

    plan = plan_draft(
        reading,
        study.context,
        study.decoding,
        manifest,
        engine.resources,
        study.template,
        study.max_new_tokens,
        study.unassessed,
    )
    decoder, logits = prefill(backend, reading, plan, cached)
    marks.append(perf_counter())

    stats, draft = SpeculationStats(), _Draft(plan.new_filter())
    try:
        tokens = write_tokens(engine, study.decoding, plan, decoder, logits, stats)
        for token in draft.checked(plan, tokens, manifest, codec):
            if token.piece:
                yield token.piece
    finally:
        cached.give_decoder(decoder)
    marks.append(perf_counter())

    return compose_report(engine, study, reading, plan, draft, checked, stats, marks, image_reused, decoder.reused)


def prefill(
    backend: Backend, reading: ImageReading, plan: DraftPlan, cached: CachedStudy | None = None
) -> tuple[Decoder, np.ndarray]:
    """Run the language model over image embeddings, prompt and opening; the decoder, and the logits float32 [V].

    Args:
        backend: runs the language model.
        reading: the image reading.
        plan: the draft's plan.
        cached: the cached study, whose decoder may have read the same image embeddings.
    """
    capacity = reading.image_embeds.shape[1] + plan.max_new_tokens + len(plan.prompt_ids)
    decoder = (cached.take_decoder(capacity) if cached else None) or backend.new_decoder(capacity)
    prompt, opening = [*plan.prompt_ids], plan.opening_ids
    if backend.decoder_only:  # in an encoder-decoder model, the encoder reads the prompt
        prompt, opening = prompt + opening, []
    embeds = backend.embed_tokens(np.array([prompt], np.int64))
    logits = decoder.prefill(np.concatenate([reading.image_embeds, embeds], axis=1))
    return decoder, decoder.append(opening)[-1].copy() if opening else logits


def write_tokens(
    engine: Engine, settings: Decoding, plan: DraftPlan, decoder: Decoder, logits: np.ndarray, stats: SpeculationStats
) -> Iterator[Token]:
    """Generate the tokens after the opening; the last one is the stop token."""
    opening, stop_ids = plan.opening_ids, engine.manifest.stop_ids
    limit = plan.max_new_tokens - len(opening)
    if settings.beams > 1:
        found = beam_search(decoder, logits, stop_ids, limit, settings.beams, plan.processors, plan.constraint, opening)
        return iter(found)
    guesses = engine.resources.phrasebook if settings.is_greedy and settings.speculative else None
    return decode(
        decoder,
        logits,
        stop_ids,
        limit,
        sampler=sampler_of(settings),
        processors=plan.processors,
        constraint=plan.constraint,
        guesser=guesses,
        guess_length=engine.guess_length,
        stats=stats,
        opening=opening,
    )


class _Draft:
    """The tokens of a draft that passed its sentence filter.

    Args:
        sentence_filter: the plan's filter.

    Attributes:
        tokens: tokens of the accepted sentences.
        text: the draft as it is shown: these tokens, and marks.
        is_complete: whether the model wrote a stop token.
        has_unknown_word: whether a sentence was removed because of a word that is not in the lexicon.
    """

    def __init__(self, sentence_filter: SentenceFilter):
        self._filter = sentence_filter
        self.tokens: list[DraftToken] = []
        self.text = ""
        self.is_complete = False

    @property
    def has_unknown_word(self) -> bool:
        return self._filter.has_unknown_word

    @property
    def omitted(self) -> int:
        return sum(map(len, self._filter.left_out))

    def checked(
        self, plan: DraftPlan, written: Iterator[Token], manifest: Manifest, codec: TextCodec
    ) -> Iterator[DraftToken]:
        """The accepted tokens of the opening and of what is written before the stop token, one sentence at a time."""
        for token in self._sentences(plan, written, manifest, codec):
            self.text += token.piece
            if token not in (MARK_TOKEN, LEFT_OUT_TOKEN):
                self.tokens.append(token)
            yield token

    def _sentences(
        self, plan: DraftPlan, written: Iterator[Token], manifest: Manifest, codec: TextCodec
    ) -> Iterator[DraftToken]:
        stream = codec.new_stream()
        for token in plan.opening:
            stream.step(token.token_id)  # some tokenizers drop the space before the first decoded token
            yield from self._filter.add(token)
        for token_id, probability in written:
            if token_id in manifest.stop_ids:
                self.is_complete = True
                break
            yield from self._filter.add(DraftToken(stream.step(token_id), probability, None, token_id))
        yield from self._filter.end()
        if not self.is_complete:
            return
        if not self._filter.accepted[1]:  # no conclusion passed: repeat the findings instead
            conclusion = plan.conclusion or (LEFT_OUT_TOKEN,) * bool(self._filter.left_out[1])
            yield from [DraftToken(" IMPRESSION:", None)] * bool(conclusion)
            yield from conclusion
        elif not plan.opening:  # an abnormal score alone: nothing else says so
            said = self._filter.accepted[1]
            yield from (token for token in plan.conclusion if normalize(token.piece) not in said)


def compose_report(
    engine: Engine,
    study: Study,
    reading: ImageReading,
    plan: DraftPlan,
    draft: _Draft,
    checked: FilmAssessment,
    stats: SpeculationStats,
    marks: list[float],
    image_reused: bool,
    reused_tokens: int,
) -> Report:
    """Assemble the finished report.

    Raises:
        DraftError: a section of a complete draft, or of a sampled one without a limit by the user, is empty.
    """
    text = draft.text.strip()
    findings, impression = split_sections(text)
    if draft.is_complete or (study.max_new_tokens is None and study.decoding.temperature > 0):
        _check_sections(findings, impression)
    found = engine.manifest.image_findings
    return Report(
        findings=findings,
        impression=impression,
        text=text,
        complete=draft.is_complete,
        model=engine.manifest.name,
        model_version=engine.manifest.version,
        variant=engine.variant,
        device=engine.backend.device,
        view=study.context.view or "frontal",
        indication_source=study.indication_source,
        image_findings=reading.findings,
        finding_scores=reading.scores,
        finding_scores_calibrated=reading.calibrated,
        operating_point=found.operating_point if found else None,
        image_sha256=study.films[0].sha256,
        lateral_sha256=study.films[1].sha256 if study.films[1:] else None,
        template=plan.template,
        template_source=plan.template_source,
        unfamiliarity=checked.unfamiliarity,
        warnings=_warnings(study, plan, draft, checked),
        finding_thresholds=dict(zip(found.names, found.thresholds, strict=True)) if found else {},
        sentences=tuple(map(plan.assessment.label, split_sentences(draft.tokens, plan.fixed))),
        unassessed=tuple(plan.assessment.unassessed),
        uncertain=tuple(plan.assessment.uncertain),
        unassessed_above_threshold=reading.unassessed_above,
        unassessed_shown_as=study.unassessed,
        omitted_sentences=draft.omitted,
        prompt_tokens=reading.image_embeds.shape[1] + len(plan.prompt_ids),
        new_tokens=len(draft.tokens),
        opening_tokens=len(plan.opening),
        guessed_tokens=stats.guessed,
        accepted_tokens=stats.accepted,
        passes=stats.passes,
        image_reused=image_reused,
        reused_tokens=reused_tokens,
        timings=_timings(marks),
    )


def _check_sections(findings: str, impression: str) -> None:
    missing = " and no ".join(n for n, part in (("findings", findings), ("impression", impression)) if not part)
    if missing:
        raise DraftError(f"the model's report is incomplete (no {missing}): write this report without a draft")


def _warnings(study: Study, plan: DraftPlan, draft: _Draft, checked: FilmAssessment) -> tuple[str, ...]:
    """The warnings about input, images and draft, each once."""
    unknown = "A sentence was removed because it contained a word that occurs in no training report."
    of_films = [warning for film in study.films for warning in film.warnings]
    of_draft = [unknown] if draft.has_unknown_word else []
    return tuple(dict.fromkeys([*study.notes, *checked.warnings, *of_films, *plan.warnings, *of_draft]))


def _timings(marks: Sequence[float]) -> Timings:
    """The stages between seven points of time, in seconds."""
    read, vision, qformer, prefilled, decoded = (1000 * (end - start) for start, end in pairwise(marks))
    return Timings(read, vision, qformer, prefilled, decoded, total=1000 * (marks[-1] - marks[0]))


def _without_pixels(film: Radiograph) -> Radiograph:
    """Release the pixels, which can be large, before the report is written."""
    return replace(film, pixels=np.empty((0, 0), np.float32), stored=None)
