"""Plan a draft before its first token: prompt, opening, template, limits and logits processors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cbedge.bundles.bundle import PHRASEBOOK, TEMPLATES, WORDS, Bundle
from cbedge.bundles.manifest import Manifest
from cbedge.decoding import Decoding, LogitsProcessor
from cbedge.decoding.phrasebook import Phrasebook
from cbedge.decoding.processors import processors_of
from cbedge.drafting.assertions import agrees, denied_by, stated_by, unscored
from cbedge.drafting.assessment import Assessment
from cbedge.drafting.codec import TextCodec
from cbedge.drafting.constraints import MAX_FREE, DraftConstraint, SectionPlan, TokenTexts
from cbedge.drafting.language import are_english
from cbedge.drafting.lexicon import Lexicon
from cbedge.drafting.sentence_filter import SentenceFilter
from cbedge.drafting.templates import Template, Templates, split_report
from cbedge.findings.image_findings import AnyPattern, ImageFindings
from cbedge.findings.reading import ImageReading
from cbedge.prompt import ClinicalContext, build_opening, build_prompt
from cbedge.report import MARKED, DraftToken
from cbedge.sentences import normalize

MAX_NEW_TOKENS = 1024
EXTRA_TOKENS = 96  # in addition to a template's: for the opening and for free sentences
ABNORMAL = "Abnormal chest radiograph."  # the impression if all that is known is an abnormal score
_REFERS = re.compile(r"\b(ditto|dito|idem|likewise|same|as (above|described))\b", re.IGNORECASE)
MAX_FREE_IN_TEMPLATE = 2  # free sentences after a template's findings


class DraftingResources:
    """Files of a bundle that all its drafts use: tokenizers, phrasebook, templates and lexicon.

    Args:
        bundle: an opened bundle, its files verified.
        vocabulary: size of the language model's vocabulary, V.

    Attributes:
        codec: the tokenizers.
        phrasebook, templates, lexicon: ``None`` if the bundle has none.

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

    @cached_property
    def token_texts(self) -> TokenTexts:
        """The texts of all tokens, with the lexicon of the training reports."""
        never = frozenset((*self._never, *self.codec.special_ids))
        return TokenTexts(self.codec.token_text, self._vocabulary, never, self.lexicon)


@dataclass(frozen=True)
class DraftPlan:
    """Everything that is decided about a draft before its first token.

    Attributes:
        prompt_ids: tokens that follow the image embeddings.
        opening: tokens of the fixed sentences that state the image findings.
        constraint: allows known words, whole sentences, both headings in order, and the template's sentences.
        processors: logits processors for bans and penalties.
        denied: matches sentences that contradict a finding; they are removed. ``None`` without image findings.
        fixed: sentences that are never removed.
        affirming: remove free sentences of the findings section that only deny something.
        supported: the findings present, the only ones that free sentences may state; ``None`` for any, without a user's
            template and without measured findings.
        conclusion: the impression if the model writes none: the opening's sentences, one token each.
        max_new_tokens: maximum length, opening included.
        template, template_source: the template that the draft follows, and its source, ``given`` or ``model``.
        assessment: which sentences the model does not assess.
        warnings: which sentences of the user's template are left out, and why; and which state an abnormality that the
            image scores do not point to.
    """

    prompt_ids: tuple[int, ...]
    opening: tuple[DraftToken, ...]
    constraint: DraftConstraint
    processors: tuple[LogitsProcessor, ...]
    denied: AnyPattern | None
    fixed: tuple[str, ...]
    affirming: bool
    supported: frozenset[str] | None
    conclusion: tuple[DraftToken, ...]
    max_new_tokens: int
    template: str | None
    template_source: str | None
    assessment: Assessment
    warnings: tuple[str, ...]

    @property
    def opening_ids(self) -> list[int]:
        """Token ids of the opening."""
        return [token.token_id for token in self.opening]

    def new_filter(self) -> SentenceFilter:
        """A filter for the draft's sentences."""
        lexicon = self.constraint.tokens.lexicon
        return SentenceFilter(self.denied, lexicon, self.fixed, self.affirming, self.supported, self.assessment)


def plan_draft(
    reading: ImageReading,
    context: ClinicalContext,
    settings: Decoding,
    manifest: Manifest,
    resources: DraftingResources,
    template: Template | None = None,
    max_new_tokens: int | None = None,
    unassessed: str = MARKED,
) -> DraftPlan:
    """Plan one draft.

    A draft opens with a fixed sentence for each image finding that has one. If none has one, and findings were
    measured, it opens with :data:`ABNORMAL`. Then it follows the user's template, without the sentences that contradict
    a finding. Without a user's template, it follows the bundle's template for the clinical context: the whole template
    if there is no image finding, else only the impression.

    Args:
        reading: the image reading of the study.
        context: the study's clinical context.
        settings: decoding settings.
        manifest: the bundle's manifest.
        resources: the bundle's tokenizers, templates and lexicon.
        template: the user's template, from :func:`cbedge.drafting.template_parser.check_template`.
        max_new_tokens: the user's limit, which also truncates the opening.
        unassessed: how sentences that the model does not assess are shown; one of
            :data:`cbedge.drafting.assessment.SHOWN_AS`. Findings that are not assessed open no draft; if one reaches
            its threshold in an abnormal study, no sentence but a user's contradicts it.
    """
    codec, findings = resources.codec, manifest.image_findings
    present = reading.findings or ()
    given = template if settings.keep_to_template else None
    only_supported = bool(given or (present and findings and findings.standings))
    openings = _openings(findings, present, general=only_supported and not given)
    opening = _opening(openings, reading.scores, codec)
    parsed, chosen = _follow(given, bool(present), context, settings, resources)
    content, warnings = parsed, list[str]()
    foreign = _foreign(given) if given else frozenset[str]()
    if given or present:
        likely = present if given else (*present, *reading.unassessed_above)
        content, warnings = _sections(parsed, foreign, not chosen, [*openings.values()], likely, manifest)
    affirming = bool(content.findings and present and not openings)
    first, second = _section_plans(content, tuple(openings.values()), affirming, codec)
    texts = [text for text in (context.indication, context.comparison) if text]
    words = resources.token_texts.extended([*texts, *openings.values(), *parsed.findings, *parsed.impression])
    written = [*codec.headings, *first.sentences, *second.sentences, opening] if given else []
    limit = _limit(manifest, written) if max_new_tokens is None else max_new_tokens
    opening = opening[:limit]
    prompted = findings.prompted(present) if findings and reading.findings is not None else None
    ids = [token.token_id for token in opening]
    constraint = DraftConstraint((first, second), ids, manifest.stop_ids, words, codec.full_stop)
    return DraftPlan(
        prompt_ids=tuple(codec.encode_prompt(build_prompt(context, prompted, reading.has_lateral))),
        opening=opening,
        constraint=constraint,
        processors=processors_of(settings, manifest.stop_ids, manifest.never_ids, constraint.begins_word),
        denied=findings.contradicting((*present, *reading.unassessed_above)) if findings and present else None,
        fixed=(*openings.values(), *content.findings, *content.impression),
        affirming=affirming,
        supported=frozenset(present) if only_supported else None,
        conclusion=_conclusion(openings, reading.scores, findings if only_supported and present else None),
        max_new_tokens=limit,
        template=chosen,
        template_source="given" if given else "model" if chosen else None,
        assessment=_assessment(reading, findings, openings.values(), foreign, unassessed),
        warnings=(*given.left_out, *warnings) if given else (),
    )


def _assessment(
    reading: ImageReading,
    findings: ImageFindings | None,
    openings: Iterable[str],
    foreign: Iterable[str],
    shown_as: str,
) -> Assessment:
    """Which sentences are not assessed. If nothing was measured of the findings, only those that cannot be read."""
    names = (*reading.unassessed, *unscored(findings.names)) if findings and findings.standings else ()
    return Assessment(
        {name: findings.denials_of(name) for name in names} if findings else {},
        reading.unassessed_above,
        frozenset(map(normalize, openings)),
        frozenset(map(normalize, foreign)),
        shown_as,
        {name: findings.denials_of(name) for name in reading.uncertain} if names and findings else {},
    )


def _foreign(template: Template) -> frozenset[str]:
    """The sentences of a template in another language than English."""
    sentences = (*template.findings, *template.impression)
    rows = zip(sentences, are_english(sentences), strict=True)
    return frozenset(text for text, is_english in rows if not is_english)


def _limit(manifest: Manifest, template: Sequence[Sequence[Any]]) -> int:
    """The bundle's limit, or more if the tokens of the user's template need it."""
    needed = sum(map(len, template)) + EXTRA_TOKENS if template else 0
    return min(MAX_NEW_TOKENS, max(manifest.decoding["max_new_tokens"], needed))


def _follow(
    given: Template | None,
    is_abnormal: bool,
    context: ClinicalContext,
    settings: Decoding,
    resources: DraftingResources,
) -> tuple[Template, str | None]:
    """The sentences of the template in use, and its text; ``None`` if only its impression may be used."""
    if given or not resources.templates or not settings.keep_to_template:
        return given or Template((), ()), given.text if given else None
    default = resources.templates.choose(context)
    return split_report(default) if default else Template((), ()), None if is_abnormal else default


def _openings(findings: ImageFindings | None, present: Sequence[str], general: bool) -> dict[str, str]:
    """The fixed sentences of the findings that are present; if there are none, perhaps a general one."""
    if not findings or not present:
        return {}
    return findings.open(present) or ({findings.names[0]: ABNORMAL} if general else {})


def _opening(openings: dict[str, str], scores: dict[str, float], codec: TextCodec) -> tuple[DraftToken, ...]:
    """The tokens of the opening sentences, each with its finding."""
    stream, tokens = codec.new_stream(), []
    for name, text in zip(openings, build_opening([*openings.values()]), strict=True):
        for token_id in codec.encode(text):
            tokens.append(DraftToken(stream.step(token_id), scores[name], name, token_id))
    return tuple(tokens)


def _conclusion(
    openings: dict[str, str], scores: dict[str, float], findings: ImageFindings | None
) -> tuple[DraftToken, ...]:
    """An impression of the opening's sentences; for :data:`OTHER`, which has none, a general one."""
    if findings is not None and not openings:
        openings = {findings.names[0]: ABNORMAL}
    return tuple(DraftToken(f" {text}", scores[name], name) for name, text in openings.items())


def _section_plans(
    content: Template, openings: tuple[str, ...], affirming: bool, codec: TextCodec
) -> tuple[SectionPlan, SectionPlan]:
    """Findings and impression. A section without a template's sentences is free."""
    findings, impression = map(codec.encode_sentences, (content.findings, content.impression))
    free_after_template = MAX_FREE_IN_TEMPLATE if affirming else 0
    first = SectionPlan(codec.headings[0], findings, free_after_template if findings else MAX_FREE, openings)
    return first, SectionPlan(codec.headings[1], impression, 0 if impression else MAX_FREE)


def _sections(
    template: Template,
    foreign: Collection[str],
    impression_only: bool,
    opening: Sequence[str],
    present: Sequence[str],
    manifest: Manifest,
) -> tuple[Template, list[str]]:
    """The sentences of a template that a draft uses, and warnings about those left out or not checked.

    The impression repeats the opening sentences. Contradictions can be found in English only: beside an image finding,
    a sentence of the impression in another language is left out, and one of the findings stays with a warning.
    """
    warnings: list[str] = []
    unchecked: list[str] = []

    def uncontradicted(sentences: Sequence[str], concluding: bool) -> list[str]:
        kept, follows_gap = [], False
        for text in sentences:
            reason = _reason_against(text, text in foreign, present, manifest.image_findings, concluding)
            if follows_gap and not reason and _REFERS.search(text):
                reason = "it refers to the sentence before, which was left out"
            follows_gap = reason is not None
            if reason:
                warnings.append(f"The template's sentence {text!r} was left out because {reason}.")
            elif normalize(text) not in map(normalize, opening):
                kept.append(text)
                stated = [] if text in foreign else stated_by(text)
                if text in foreign:
                    unchecked.append(repr(text))
                elif stated and not {*stated} & {*present}:
                    warnings.append(
                        f"The template's sentence {text!r} states {', '.join(stated)}, which the image scores do not "
                        "point to: check it, and give a template of normal sentences."
                    )
        return kept

    findings = [] if impression_only else uncontradicted(template.findings, concluding=False)
    impression = uncontradicted(template.impression, concluding=True)
    if unchecked:
        scores = f"the image scores, which point to {', '.join(present)}" if present else "the image scores"
        what = f"sentence {unchecked[0]} is" if len(unchecked) == 1 else f"sentences {', '.join(unchecked)} are"
        if len(foreign) == len({*template.findings, *template.impression}):
            what = "sentences are"
        warnings.append(
            f"The template's {what} not in English and could not be checked against {scores}. Check each sentence."
        )
    impression = [*opening, *impression] if template.findings else []
    return Template(tuple(findings), tuple(impression)), warnings


def _reason_against(
    text: str, is_foreign: bool, present: Sequence[str], findings: ImageFindings | None, concluding: bool
) -> str | None:
    """Why a template's sentence is left out beside findings, if it is. It must be understood to be about something
    else; in the impression, it also has to contradict another finding or agree with those present."""
    if not findings or not present or (is_foreign and not concluding):
        return None

    def denied(names: Iterable[str]) -> list[str]:
        return [name for name in names if findings.contradicting([name]).search(text)]

    scores = f"the image scores point to {', '.join(present)}"
    if is_foreign:
        return f"{scores} and it is not in English, so it cannot be checked"
    about = denied_by(text, present)
    if against := [n for n in present if n in {*denied(present), *(about or ())} - {*stated_by(text)}]:
        return f"the image scores point to {', '.join(against)}"
    if about is None or (concluding and not agrees(text, present) and not denied(findings.names)):
        return f"{scores} and it cannot be read as agreeing with that"
    return None
