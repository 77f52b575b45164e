"""Decide, before the first token, everything that steers a draft: prompt, opening, template, limits, bans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cbedge.bundles.bundle import PHRASEBOOK, TEMPLATES, WORDS, Bundle, Manifest
from cbedge.decoding import Decoding, LogitsProcessor
from cbedge.decoding.phrasebook import Phrasebook
from cbedge.decoding.processors import processors_of
from cbedge.drafting.codec import TextCodec
from cbedge.drafting.constraints import MAX_OWN, DraftConstraint, SectionPlan, TokenTexts
from cbedge.drafting.lexicon import Lexicon
from cbedge.drafting.sentence_filter import SentenceFilter
from cbedge.drafting.templates import Template, Templates, parse_template
from cbedge.errors import ContextError
from cbedge.findings.reading import ImageReading
from cbedge.prompt import ClinicalContext, build_opening, build_prompt
from cbedge.report import DraftToken
from cbedge.sentences import normalize

MAX_NEW_TOKENS = 1024
ROOM_FOR_OWN = 96  # tokens beside a template's: for the opening and for sentences of the model's own
MAX_OWN_IN_TEMPLATE = 2  # sentences of the model's own behind a template's findings


class DraftingResources:
    """What a bundle brings to steer drafts; the same for all of them.

    Args:
        bundle: an opened bundle, its files verified.
        vocabulary: tokens that the language model knows, V.

    Attributes:
        codec: its tokenizers.
        phrasebook, templates, lexicon: ``None`` where the bundle has none.

    Raises:
        BundleError: a file cannot be read.
    """

    def __init__(self, bundle: Bundle, vocabulary: int):
        files = bundle.manifest.files
        self._never, self._vocabulary = bundle.manifest.never_ids, vocabulary
        self.codec = TextCodec(bundle)
        self.phrasebook = Phrasebook.load(bundle.folder / PHRASEBOOK) if PHRASEBOOK in files else None
        self.templates = Templates.load(bundle.folder / TEMPLATES) if TEMPLATES in files else None
        self.lexicon = Lexicon.load(bundle.folder / WORDS) if WORDS in files else None
        self._last_parsed: tuple[str, Template] | None = None

    @cached_property
    def token_texts(self) -> TokenTexts:
        """The texts of all tokens, with the words of the training reports."""
        never = frozenset((*self._never, *self.codec.special_ids))
        return TokenTexts(self.codec.token_text, self._vocabulary, never, self.lexicon)

    def parse(self, template: str) -> Template:
        """A template's sentences; the one parsed last is kept."""
        if self._last_parsed is None or self._last_parsed[0] != template:
            self._last_parsed = (template, parse_template(template))
        return self._last_parsed[1]


@dataclass(frozen=True)
class DraftPlan:
    """Everything that steers a draft, known before its first token.

    Attributes:
        prompt_ids: tokens that follow the image embeddings.
        opening: tokens that the draft begins with, for the findings of the image.
        constraint: holds the draft to whole words and sentences, both headings and the template.
        processors: bans and penalties.
        denied: found in sentences that contradict a finding, which are left out; ``None`` for none.
        given: sentences that are written as they are.
        affirming: sentences of the language model's own are wanted only where they affirm something.
        max_new_tokens: of the draft, the opening among them.
        template, template_source: the template that the draft keeps to, and whether it is ``given`` or the ``model``'s.
        warnings: which sentences of the user's template are left out, and why.
    """

    prompt_ids: tuple[int, ...]
    opening: tuple[DraftToken, ...]
    constraint: DraftConstraint
    processors: tuple[LogitsProcessor, ...]
    denied: re.Pattern[str] | None
    given: tuple[str, ...]
    affirming: bool
    max_new_tokens: int
    template: str | None
    template_source: str | None
    warnings: tuple[str, ...]

    @property
    def opening_ids(self) -> list[int]:
        """The opening's tokens."""
        return [token.token_id for token in self.opening]

    def new_filter(self) -> SentenceFilter:
        """The last check of the draft's sentences."""
        return SentenceFilter(self.denied, self.constraint.tokens.lexicon, self.given, self.affirming)


def plan_draft(
    reading: ImageReading, context: ClinicalContext, settings: Decoding, manifest: Manifest,
    resources: DraftingResources, template: str | None = None, max_new_tokens: int | None = None,
) -> DraftPlan:  # fmt: skip
    """Decide all that steers one draft.

    A draft is opened with a fixed sentence for each finding of the image that has one. It keeps to the user's template,
    without the sentences that contradict a finding; or, where the image shows no finding, to the bundle's template that
    is usual for the context. Where it shows one, of the usual template only the impression is kept.

    Args:
        reading: of the study's images.
        context: of the study.
        settings: how tokens are chosen.
        manifest: of the bundle.
        resources: of the bundle.
        template: the user's, of :func:`check_template`.
        max_new_tokens: the user's limit; the opening is cut at it.
    """
    codec, findings = resources.codec, manifest.image_findings
    present = reading.findings or ()
    openings = findings.open(present) if findings and present else {}
    opening = _opening(openings, reading.scores, codec)
    kept = template if settings.keep_to_template else None
    usual = resources.templates.choose(context) if resources.templates and settings.keep_to_template else None
    chosen = kept or (usual if not present else None)
    wording = kept or usual
    house = resources.parse(wording) if wording else Template((), (), True)
    content, warnings = _sections(house, bool(wording), not chosen, [*openings.values()], present, manifest)
    affirming = bool(content.findings and present and not openings)
    first = SectionPlan(
        codec.headings[0], codec.encode_sentences(content.findings),
        MAX_OWN if not content.findings else MAX_OWN_IN_TEMPLATE if affirming else 0, tuple(openings.values()),
    )  # fmt: skip
    second = SectionPlan(
        codec.headings[1], codec.encode_sentences(content.impression), 0 if content.impression else MAX_OWN
    )
    texts = [text for text in (context.indication, context.comparison) if text]
    words = resources.token_texts.extended([*texts, *openings.values(), *house.findings, *house.impression])
    needed = sum(map(len, (*codec.headings, *first.sentences, *second.sentences))) + len(opening) + ROOM_FOR_OWN
    usual_limit = max(manifest.decoding["max_new_tokens"], needed if kept else 0)
    limit = min(MAX_NEW_TOKENS, usual_limit) if max_new_tokens is None else max_new_tokens
    opening = opening[:limit]
    begun = [token.token_id for token in opening]
    constraint = DraftConstraint((first, second), begun, manifest.stop_ids, words, codec.full_stop)
    return DraftPlan(
        prompt_ids=tuple(codec.encode_prompt(build_prompt(context, reading.findings, reading.has_lateral))),
        opening=opening, constraint=constraint,
        processors=processors_of(settings, manifest.stop_ids, manifest.never_ids, constraint.begins_word),
        denied=findings.contradicting(present) if findings and present else None,
        given=(*openings.values(), *content.findings, *content.impression), affirming=affirming, max_new_tokens=limit,
        template=chosen, template_source="given" if kept else "model" if chosen else None,
        warnings=tuple(warnings if kept else ()),
    )  # fmt: skip


def _opening(openings: dict[str, str], scores: dict[str, float], codec: TextCodec) -> tuple[DraftToken, ...]:
    """The tokens of the sentences that open a draft, by finding."""
    stream, tokens = codec.new_stream(), []
    for name, text in zip(openings, build_opening([*openings.values()]), strict=True):
        for token_id in codec.encode(text):
            tokens.append(DraftToken(stream.step(token_id), scores[name], name, token_id))
    return tuple(tokens)


def _sections(
    house: Template, exists: bool, impression_only: bool, opening: Sequence[str], present: Sequence[str],
    manifest: Manifest,
) -> tuple[Template, list[str]]:  # fmt: skip
    """The sentences of a template that a draft takes, and why others are left out.

    The impression says what opened the findings. A template that is not in English cannot be checked: it concludes
    nothing where the image shows a finding, and its findings stay with a warning.
    """
    warnings: list[str] = []
    told = manifest.image_findings
    checked = present if house.english else ()  # what contradicts a finding is known in English

    def uncontradicted(sentences: Sequence[str]) -> list[str]:
        kept = []
        for text in sentences:
            patterns = {name: told.contradicting([name]) for name in checked} if told else {}
            against = [name for name, pattern in patterns.items() if pattern is not None and pattern.search(text)]
            if against:
                reason = f"because the image scores point to {', '.join(against)}"
                warnings.append(f"The template's sentence {text!r} was left out {reason}.")
            elif normalize(text) not in map(normalize, opening):
                kept.append(text)
        return kept

    concludes = house.english or not present
    findings = [] if impression_only else uncontradicted(house.findings)
    impression = uncontradicted(house.impression) if concludes else []
    if house.impression and not concludes:
        warnings.append(
            f"The template's impression was left out because the image scores point to {', '.join(present)} and it "
            "could not be checked, for it is not in English."
        )
    if present and not house.english:
        warnings.append(
            "The template is not in English: its sentences could not be checked against what the image scores "
            f"point to ({', '.join(present)}). Check each of them."
        )
    impression = [*opening, *impression] if exists else []
    return Template(tuple(findings), tuple(impression), house.english), warnings


def check_template(manifest: Manifest, text: str, codec: TextCodec) -> str:
    """A user's template, read for a bundle; see :func:`cbedge.drafting.templates.parse_template`.

    Raises:
        ContextError: it is no normal report, the model cannot write its words as they are, or has no image scores that
            say what a template must not hide.
    """
    template = parse_template(text)
    if manifest.image_findings is None:
        raise ContextError(
            f"{manifest.name} has no image scores that say what a template must not hide: leave the template out"
        )
    count = ROOM_FOR_OWN
    for sentence in (*template.findings, *template.impression):
        ids = codec.encode(f" {sentence}")
        count += len(ids)
        if codec.decode(ids).strip() != sentence:
            raise ContextError(f"{manifest.name} cannot write the template's {sentence[:60]!r} as it is: reword it")
    if count > MAX_NEW_TOKENS:
        raise ContextError(
            f"the template has {count - ROOM_FOR_OWN} tokens, more than {MAX_NEW_TOKENS - ROOM_FOR_OWN}: shorten it"
        )
    return template.text
