"""One draft, from a study's radiographs to its report, step by step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

import numpy as np

from cbedge.backends import Backend
from cbedge.bundles.bundle import Manifest
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
from cbedge.drafting.codec import TextCodec
from cbedge.drafting.plan import DraftingResources, DraftPlan, plan_draft
from cbedge.drafting.query import query_films
from cbedge.drafting.recent import CachedStudy, Recent
from cbedge.drafting.sentence_filter import SentenceFilter
from cbedge.errors import DraftError
from cbedge.findings.reading import ImageReading, interpret
from cbedge.images.film_check import FilmCheck
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import Radiograph
from cbedge.prompt import ClinicalContext, split_sections
from cbedge.report import DraftToken, Report, Timings, split_sentences


@dataclass(frozen=True)
class Engine:
    """What all drafts of one model share.

    Attributes:
        manifest: of the bundle.
        variant: its name.
        backend: runs the model.
        resources: steer drafts.
        film_check: knows chest films.
        recent: studies that are kept.
        guess_length: learns how many guesses pay.
    """

    manifest: Manifest
    variant: str
    backend: Backend
    resources: DraftingResources
    film_check: FilmCheck
    recent: Recent
    guess_length: GuessLength


@dataclass(frozen=True)
class Study:
    """What one draft is written of, checked.

    Attributes:
        films: the frontal radiograph, and the lateral one if there is one.
        context: its view is never ``None``.
        indication_source: ``given``, ``DICOM header`` or ``None``.
        notes: warnings about what was given.
        template: the user's.
        max_new_tokens: the user's limit.
        decoding: how tokens are chosen.
        accept_any_image: refuse no image.
    """

    films: tuple[Radiograph, ...]
    context: ClinicalContext
    indication_source: str | None
    notes: tuple[str, ...]
    template: str | None
    max_new_tokens: int | None
    decoding: Decoding
    accept_any_image: bool


def draft_report(
    engine: Engine, study: Study, on_reading: Callable[[ImageReading], None] = lambda reading: None
) -> Generator[str, None, Report]:
    """Draft one report; yields its text in pieces, and returns the report.

    Args:
        engine: of the model.
        study: to draft.
        on_reading: is told what the model reads in the images, before the first piece.

    Raises:
        RadiographError: a film looks like no chest radiograph of its view.
        DraftError: the model wrote no whole report.
    """
    manifest, backend, codec = engine.manifest, engine.backend, engine.resources.codec
    marks = [perf_counter() - sum(film.read_ms for film in study.films) / 1000]
    pixels = [preprocess_radiograph(film, manifest.preprocessing) for film in study.films]
    study = replace(study, films=tuple(map(_without_pixels, study.films)))
    cached = engine.recent.study(pixels, study.context.view)
    image_reused = bool(cached.answers)
    marks.append(perf_counter())

    features = cached.features or [backend.encode_image(planes) for planes in pixels]
    warnings = engine.film_check.assess(study.films, features, study.context.view, study.accept_any_image)
    marks.append(perf_counter())

    answers = cached.answers or query_films(backend, codec, features, study.context)
    cached.features, cached.answers = features, answers
    reading = interpret(answers, manifest.image_findings)
    on_reading(reading)
    marks.append(perf_counter())

    plan = plan_draft(
        reading, study.context, study.decoding, manifest, engine.resources, study.template, study.max_new_tokens
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

    return compose_report(engine, study, reading, plan, draft, warnings, stats, marks, image_reused, decoder.reused)


def prefill(
    backend: Backend, reading: ImageReading, plan: DraftPlan, cached: CachedStudy | None = None
) -> tuple[Decoder, np.ndarray]:
    """A decoder that has read image embeddings, prompt and opening, and the logits after them, float32 [V].

    Args:
        backend: runs the language model.
        reading: of the images.
        plan: of the draft.
        cached: may keep a decoder that has read a prompt of the same image embeddings.
    """
    capacity = reading.image_embeds.shape[1] + plan.max_new_tokens + len(plan.prompt_ids)
    decoder = (cached.take_decoder(capacity) if cached else None) or backend.new_decoder(capacity)
    prompt, opening = [*plan.prompt_ids], plan.opening_ids
    if backend.decoder_only:  # otherwise an encoder reads the prompt
        prompt, opening = prompt + opening, []
    embeds = backend.embed_tokens(np.array([prompt], np.int64))
    logits = decoder.prefill(np.concatenate([reading.image_embeds, embeds], axis=1))
    return decoder, decoder.append(opening)[-1].copy() if opening else logits


def write_tokens(
    engine: Engine, settings: Decoding, plan: DraftPlan, decoder: Decoder, logits: np.ndarray, stats: SpeculationStats
) -> Iterator[Token]:
    """The tokens that follow the opening, as the settings choose them; the stop token is the last one."""
    opening, stop_ids = plan.opening_ids, engine.manifest.stop_ids
    limit = plan.max_new_tokens - len(opening)
    if settings.beams > 1:
        found = beam_search(decoder, logits, stop_ids, limit, settings.beams, plan.processors, plan.constraint, opening)
        return iter(found)
    guesses = engine.resources.phrasebook if settings.is_greedy and settings.speculative else None
    return decode(
        decoder, logits, stop_ids, limit, sampler=sampler_of(settings), processors=plan.processors,
        constraint=plan.constraint, guesser=guesses, guess_length=engine.guess_length, stats=stats, begun=opening,
    )  # fmt: skip


class _Draft:
    """The tokens of a draft that passed its last check.

    Args:
        check: of the plan.

    Attributes:
        tokens: the draft's.
        is_complete: the model ended it.
        has_unknown_word: a sentence was left out because of a word that no training report has.
    """

    def __init__(self, check: SentenceFilter):
        self._check = check
        self.tokens: list[DraftToken] = []
        self.is_complete = False

    @property
    def has_unknown_word(self) -> bool:
        return self._check.unknown

    def checked(
        self, plan: DraftPlan, written: Iterator[Token], manifest: Manifest, codec: TextCodec
    ) -> Iterator[DraftToken]:
        """The opening and what is written up to the stop token, whole sentences at a time, those that pass."""
        for token in self._sentences(plan, written, manifest, codec):
            self.tokens.append(token)
            yield token

    def _sentences(
        self, plan: DraftPlan, written: Iterator[Token], manifest: Manifest, codec: TextCodec
    ) -> Iterator[DraftToken]:
        stream = codec.new_stream()
        for token in plan.opening:
            stream.step(token.token_id)  # some tokenizers drop the space of the first token that they decode
            yield from self._check.add(token)
        for token_id, probability in written:
            if token_id in manifest.stop_ids:
                self.is_complete = True
                break
            yield from self._check.add(DraftToken(stream.step(token_id), probability, None, token_id))
        yield from self._check.end()
        if self.is_complete and not self._check.said[1]:  # its conclusions contradict the findings, which conclude it
            for place, sentence in enumerate(_opening_sentences(plan.opening)):
                heading = [DraftToken(" IMPRESSION:", None)] if place == 0 else []
                yield from [*heading, sentence]


def compose_report(
    engine: Engine, study: Study, reading: ImageReading, plan: DraftPlan, draft: _Draft, warnings: tuple[str, ...],
    stats: SpeculationStats, marks: list[float], image_reused: bool, reused_tokens: int,
) -> Report:  # fmt: skip
    """The finished report.

    Raises:
        DraftError: a complete draft lacks a section.
    """
    text = "".join(token.piece for token in draft.tokens).strip()
    findings, impression = split_sections(text)
    missing = " and no ".join(n for n, part in (("findings", findings), ("impression", impression)) if not part)
    if draft.is_complete and missing:
        raise DraftError(f"the model wrote no whole report of this radiograph (no {missing}): write it without draft")
    unknown = "A sentence was left out because it had a word that is in no training report."
    of_films = [warning for film in study.films for warning in film.warnings]
    all_warnings = [*study.notes, *warnings, *of_films, *plan.warnings, *([unknown] if draft.has_unknown_word else [])]
    read, vision, qformer, prefilled, decoded = (1000 * (end - start) for start, end in pairwise(marks))
    found = engine.manifest.image_findings
    timings = Timings(read, vision, qformer, prefilled, decoded, total=1000 * (marks[-1] - marks[0]))
    return Report(
        findings=findings, impression=impression, text=text, complete=draft.is_complete,
        model=engine.manifest.name, model_version=engine.manifest.version, variant=engine.variant,
        device=engine.backend.device, view=study.context.view or "frontal", indication_source=study.indication_source,
        image_findings=reading.findings, finding_scores=reading.scores,
        image_sha256=study.films[0].sha256, lateral_sha256=study.films[1].sha256 if study.films[1:] else None,
        template=plan.template, template_source=plan.template_source, warnings=tuple(dict.fromkeys(all_warnings)),
        finding_thresholds=dict(zip(found.names, found.thresholds, strict=True)) if found else {},
        sentences=split_sentences(draft.tokens, plan.given),
        prompt_tokens=reading.image_embeds.shape[1] + len(plan.prompt_ids), new_tokens=len(draft.tokens),
        opening_tokens=len(plan.opening), guessed_tokens=stats.guessed, accepted_tokens=stats.accepted,
        passes=stats.passes, image_reused=image_reused, reused_tokens=reused_tokens, timings=timings,
    )  # fmt: skip


def _without_pixels(film: Radiograph) -> Radiograph:
    """The pixels of a large film are not held while its draft is written."""
    return replace(film, pixels=np.empty((0, 0), np.float32), stored=None)


def _opening_sentences(opening: tuple[DraftToken, ...]) -> list[DraftToken]:
    """Each finding's sentence of an opening as one piece, without the heading."""
    sentences: dict[str, DraftToken] = {}
    for token in opening:
        if token.finding is not None:
            known = sentences.get(token.finding)
            sentences[token.finding] = token if known is None else known._replace(piece=known.piece + token.piece)
    return [s._replace(piece=f" {s.piece.replace('FINDINGS:', '').strip()}") for s in sentences.values()]
