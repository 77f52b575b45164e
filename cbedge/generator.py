"""From a radiograph and its clinical context to a draft report."""

from __future__ import annotations

import asyncio
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cbedge.backends import Backend, choose_variant, open_backend
from cbedge.bundle import (
    FILM_VIEW,
    GATE,
    LATERAL_GATE,
    PHRASEBOOK,
    QFORMER_TOKENIZER,
    TEMPLATES,
    TOKENIZER,
    WORDS,
    Bundle,
    open_bundle,
)
from cbedge.consistency import SentenceFilter
from cbedge.constraints import MAX_OWN, DraftConstraint, SectionPlan, TokenTexts
from cbedge.decoding import (
    Constraint,
    Decoder,
    Decoding,
    Drafting,
    GuessLength,
    Token,
    beam_search,
    sample,
    speculate,
)
from cbedge.errors import BundleError, CbedgeError, ContextError, DraftError, RadiographError
from cbedge.film_view import FilmView
from cbedge.gate import Gate, NotAChestRadiograph
from cbedge.image_findings import scores_of
from cbedge.lexicon import Lexicon
from cbedge.phrasebook import GuessSource, Phrasebook
from cbedge.preprocess import preprocess_radiograph
from cbedge.prompt import ClinicalContext, build_opening, build_prompt, build_query_instruction, split_sections
from cbedge.radiograph import Radiograph, load_radiograph
from cbedge.recent import Recent, Study
from cbedge.report import Report, Spoken, Timings, split_sentences
from cbedge.sentences import normalize
from cbedge.templates import Template, Templates, parse_template

if TYPE_CHECKING:
    from cbedge.backends.onnx import Queried

MAX_INSTRUCTION_TOKENS = 256  # what the Q-Former was trained with; a longer instruction is cut for it, and for it alone
MAX_NEW_TOKENS = 1024
ROOM_FOR_OWN = 96  # tokens beside a template's, for what opens the draft and for sentences of the model's own
MAX_OWN_IN_TEMPLATE = 2  # sentences of the model's own behind a template's findings
_NO_GUESSES = Phrasebook({})


@dataclass(frozen=True)
class DraftPlan:
    """What a draft is to say, known before its first word.

    Attributes:
        constraint: holds the draft to it.
        given: sentences that are written as they are.
        affirming: sentences of the language model's own are wanted only where they affirm something.
        warnings: which sentences of the user's template are left out, and why.
        tokens: that the draft needs at least.
    """

    constraint: DraftConstraint
    given: tuple[str, ...]
    affirming: bool
    warnings: tuple[str, ...]
    tokens: int

    @property
    def keeps_findings(self) -> bool:
        """Whether the findings are a template's."""
        return bool(self.constraint.sections[0].sentences)


@dataclass(frozen=True)
class Look:
    """What the Q-Former made of a study's radiograph, or of two.

    Attributes:
        image_embeds: for the language model, float32 [1, Q, D].
        seen: findings that the prompt tells, empty where none was seen; ``None`` for a model that is not told.
        scores: of every finding that is looked for, 0 to 1.
        attention: how much each patch was looked at for the findings seen (for "abnormal" where none was), float32 [P],
            the class token first; of the frontal radiograph.
        lateral: whether a lateral radiograph was seen as well: Q is then twice the number of queries.
    """

    image_embeds: np.ndarray
    seen: tuple[str, ...] | None
    scores: dict[str, float]
    attention: np.ndarray
    lateral: bool = False


class ReportGenerator:
    """Drafts reports with one model. Create it once and keep it: the first draft then costs no loading.

    One generator may be used by many threads at once: every draft has its own state, and the model is only read. Drafts
    at the same time share the machine's cores, so each takes longer. A :class:`ReportStream` belongs to one thread.

    What was computed of the last study is kept (:mod:`cbedge.recent`): drafted again, with another indication or
    template, it takes half the time.

    Attributes:
        bundle, variant, backend: as given.
        phrasebook, templates, lexicon, gate, lateral_gate, film_view: of the bundle; ``None`` where it has none.
        recent: the studies that are kept; ``recent.clear()`` forgets them.

    Example:
        >>> generator = ReportGenerator.from_pretrained()
        >>> report = generator.generate("chest_pa.png", indication="cough")
        >>> print(report.findings)
    """

    def __init__(self, bundle: Bundle, variant: str, backend: Backend, recent_studies: int = 1):
        self.bundle = bundle
        self.variant = variant
        self.backend = backend
        self.recent = Recent(recent_studies)
        self._tokenizer = _load_tokenizer(bundle, TOKENIZER)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._qformer_tokenizer = _load_tokenizer(bundle, QFORMER_TOKENIZER)
        self._qformer_tokenizer.no_padding()
        self._qformer_tokenizer.enable_truncation(MAX_INSTRUCTION_TOKENS)
        known = PHRASEBOOK in bundle.manifest.files
        self.phrasebook = Phrasebook.load(bundle.folder / PHRASEBOOK) if known else None
        known = TEMPLATES in bundle.manifest.files
        self.templates = Templates.load(bundle.folder / TEMPLATES) if known else None
        self.lexicon = Lexicon.load(bundle.folder / WORDS) if WORDS in bundle.manifest.files else None
        self.gate, self.lateral_gate = (
            Gate.load(bundle.folder / name) if name in bundle.manifest.files else None for name in (GATE, LATERAL_GATE)
        )
        known = FILM_VIEW in bundle.manifest.files
        self.film_view = FilmView.load(bundle.folder / FILM_VIEW) if known else None
        self._house_template: str | None = None
        self._last_parsed: tuple[str, Template] | None = None
        self._guess_length = GuessLength()
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str | None = None,
        variant: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        recent_studies: int = 1,
    ) -> ReportGenerator:
        """Open a bundle, check the hash of every file that is needed, and load it.

        Args:
            model: folder of a bundle; default is the embedded model.
            variant: a variant of the bundle, such as ``int4``; default is the one that suits the machine
                (:func:`cbedge.backends.choose_variant`).
            device: ``auto``, ``cpu`` or ``cuda``.
            threads: CPU threads; default is one a core.
            recent_studies: of how many studies to keep in memory what was computed, for the next draft of them.

        Raises:
            BundleError: the bundle is missing, altered, of another format, or lacks the variant.
            ContextError: ``recent_studies`` is below 0 or above 64.
            DeviceError: ONNX Runtime is not installed, or CUDA was asked for and is not to be had.
        """
        bundle = open_bundle(model)
        name, device = choose_variant(bundle, variant, device)  # what is not installed is told before files are read
        chosen = bundle.manifest.variants[name]
        files = bundle.variant_files(chosen)
        bundle.verify(files, sizes_alone=True)
        with ThreadPoolExecutor(1) as pool:  # hashes are computed while graphs load: a user waits for a cold start
            loading = pool.submit(open_backend, bundle, chosen, device, threads)
            bundle.verify(files)
            return cls(bundle, name, loading.result(), recent_studies)

    def generate(
        self,
        image: Any,
        *,
        indication: str | None = None,
        comparison: str | None = None,
        view: str | None = None,
        template: str | None = None,
        lateral: Any = None,
        max_new_tokens: int | None = None,
        decoding: Decoding | Mapping[str, Any] | None = None,
        accept_any_image: bool = False,
    ) -> Report:
        """Draft the report of one frontal chest radiograph, and of the lateral one beside it.

        Args:
            image: a path, the file's bytes, a PIL image, an array, or a :class:`~cbedge.radiograph.Radiograph`; see
                :func:`~cbedge.radiograph.load_radiograph`.
            indication: why the study was requested; default is what a DICOM header says of it.
            comparison: what earlier study it is compared with.
            view: ``frontal`` or ``lateral``; default is what the file says, else ``frontal``.
            template: a normal report in the wording that the draft is to keep to; default is, where nothing abnormal is
                seen, the one of the bundle's that is usual for the indication (:mod:`cbedge.templates`); or, always,
                that of :meth:`keep_to`.
            lateral: the same study's lateral radiograph, as ``image`` may be given; for a model that
                :attr:`reads_lateral`.
            max_new_tokens: stop after so many tokens; the draft is cut at the last whole sentence then, and is not
                ``complete``. Default is the bundle's, or what the template needs.
            decoding: how tokens are chosen; default is :attr:`decoding`. A mapping changes some of its settings.
            accept_any_image: draft even of what does not look like a chest radiograph.

        Raises:
            RadiographError: an image cannot be used, or does not look like a chest radiograph.
            ContextError: the indication, comparison, view, template, lateral radiograph, ``max_new_tokens`` or
                ``decoding`` cannot be used.
            DraftError: the model wrote no whole report.
        """
        stream = self.stream(
            image, indication=indication, comparison=comparison, view=view, template=template, lateral=lateral,
            max_new_tokens=max_new_tokens, decoding=decoding, accept_any_image=accept_any_image,
        )  # fmt: skip
        for _ in stream:
            pass
        return stream.report

    def generate_many(self, requests: Sequence[Mapping[str, Any]]) -> list[Report | CbedgeError]:
        """Draft the reports of several studies, one after another.

        Args:
            requests: for each study the arguments of :meth:`generate`, ``image`` among them.

        Returns:
            For each study its report, or the error that :meth:`generate` would raise.

        Example:
            >>> reports = generator.generate_many([{"image": "1.png"}, {"image": "2.png", "indication": "cough"}])
        """

        def draft(request: Mapping[str, Any]) -> Report | CbedgeError:
            try:
                return self.generate(**request)
            except CbedgeError as error:
                return error

        return [draft(request) for request in requests]

    async def generate_async(self, image: Any, **options: Any) -> Report:
        """:meth:`generate` for an event loop: the work is done in a thread, and a draft that is cancelled ends with the
        token that is being written.

        Args:
            image: as for :meth:`generate`.
            options: those of :meth:`generate`.

        Raises:
            RadiographError, ContextError: as :meth:`generate`.
        """
        stream = await asyncio.to_thread(self.stream, image, **options)
        async for _ in stream:
            pass
        return stream.report

    def stream(
        self,
        image: Any,
        *,
        indication: str | None = None,
        comparison: str | None = None,
        view: str | None = None,
        template: str | None = None,
        lateral: Any = None,
        max_new_tokens: int | None = None,
        decoding: Decoding | Mapping[str, Any] | None = None,
        accept_any_image: bool = False,
    ) -> ReportStream:
        """Like :meth:`generate`, as an iterator over pieces of text; its ``report`` is there when it is exhausted.

        The input is checked here, before the first piece is asked for; whether it looks like a chest radiograph, by
        what the vision encoder makes of it, when the first piece is.
        """
        limit = None if max_new_tokens is None else check_max_new_tokens(max_new_tokens)
        context = ClinicalContext(indication, comparison, view)
        wording = self._house_template if template is None else self._check_template(template)
        radiograph = load_radiograph(image)
        second = None if lateral is None else self._load_lateral(lateral, radiograph, context)
        empty = [
            f"The {name} says nothing and was left out."
            for name, text in (("indication", indication), ("comparison", comparison))
            if text is not None and getattr(context, name) is None
        ]
        source = "given" if context.indication else "DICOM header" if radiograph.indication else None
        context = ClinicalContext(
            context.indication or radiograph.indication,
            context.comparison,
            context.view or radiograph.view or "frontal",
        )
        settings = self.choose_decoding(decoding)
        return ReportStream(
            self, radiograph, context, limit, settings, source, accept_any_image, second, wording, empty
        )

    def keep_to(self, template: str) -> None:
        """Keep every draft to a template from now on, a department's own, unless one is given with the radiograph.

        Raises:
            ContextError: it is no normal report, or the model has no image scores that say what it must not hide.
        """
        self._house_template = self._check_template(template)

    def _check_template(self, template: str) -> str:
        return check_template(self.bundle, template, self._tokenizer)

    def choose_decoding(self, decoding: Decoding | Mapping[str, Any] | None) -> Decoding:
        """The settings that are given, those of a mapping in place of :attr:`decoding`'s, or :attr:`decoding`.

        Raises:
            ContextError: it is neither, or a setting is unknown or out of its range.
        """
        if decoding is None or isinstance(decoding, Decoding):
            return decoding or self.decoding
        if not isinstance(decoding, Mapping):
            raise ContextError(
                f"decoding must be a Decoding or a mapping of its settings, not {type(decoding).__name__}"
            )
        known = [field.name for field in fields(Decoding) if field.name != "constraint"]
        unknown = [str(name) for name in decoding if name not in known]
        if unknown:
            raise ContextError(f"decoding has no setting {unknown[0][:40]!r}; it has: {', '.join(known)}")
        return replace(self.decoding, **decoding)

    @property
    def reads_lateral(self) -> bool:
        """Whether the model was trained to read a lateral radiograph beside the frontal one."""
        return self.bundle.manifest.reads_lateral

    def _load_lateral(self, lateral: Any, frontal: Radiograph, context: ClinicalContext) -> Radiograph:
        if not self.reads_lateral:
            raise ContextError(
                f"{self.bundle.manifest.name} reads one radiograph a study: leave the lateral one out, or give a model "
                "that was trained with both"
            )
        if "lateral" in (context.view, frontal.view):
            raise ContextError("the first radiograph is a lateral one: give the frontal one there, and one lateral one")
        radiograph = load_radiograph(lateral)
        if radiograph.view == "frontal":
            raise ContextError("the radiograph that is given as lateral is a frontal one, as its header says")
        if radiograph.sha256 == frontal.sha256:
            raise ContextError("the frontal and the lateral radiograph are one file: give the lateral one, or leave it")
        if frontal.study_uid and radiograph.study_uid and frontal.study_uid != radiograph.study_uid:
            raise ContextError("the two radiographs are of different studies, as their headers say: give one study's")
        return radiograph

    @property
    def decoding(self) -> Decoding:
        """How the bundle's maker chose that tokens be chosen: greedy, its template and phrasebook guessing ahead."""
        chosen = self.bundle.manifest.decoding
        return Decoding(no_repeat=chosen.get("no_repeat", 0), stop_bias=chosen.get("stop_bias", 0.0))

    def tokens(
        self, decoder: Decoder, logits: np.ndarray, limit: int, settings: Decoding, drafting: Drafting,
        begun: Sequence[int] = (), constraint: Constraint | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """The tokens of a report, as the settings choose them.

        Args:
            decoder: has read image embeddings and prompt; ``logits``, float32 [V], follow them.
            limit: tokens at most.
            settings: how tokens are chosen.
            drafting: is filled in where tokens are guessed ahead.
            begun: tokens that the draft began with, read already.
            constraint: of :meth:`plan`.
        """
        stop = self.bundle.manifest.stop_ids
        settings = replace(settings, never=(*settings.never, *self.bundle.manifest.never_ids), constraint=constraint)
        if settings.beams > 1:
            return iter(beam_search(decoder, logits, stop, limit, settings, begun))
        plain = not (settings.is_greedy and settings.speculative)
        guesser: GuessSource | None = self.phrasebook or (_NO_GUESSES if constraint else None)
        if plain or guesser is None:
            return sample(decoder, logits, stop, limit, settings, begun=begun)
        return speculate(decoder, logits, stop, limit, guesser, self._guess_length, drafting, settings, begun)

    def template_for(self, context: ClinicalContext) -> str | None:
        """The bundle's template that is usual for a context; ``None`` where the bundle has none."""
        return self.templates.choose(context) if self.templates else None

    def plan(
        self, template: str | None, look: Look, *, conclusion: bool = False, given: bool = False,
        texts: Sequence[str] = (), begun: Sequence[int] = (),
    ) -> DraftPlan:  # fmt: skip
        """What a draft is to say: a template's sentences, but for those that contradict what was seen.

        Its impression says what opened the findings. A template that is not in English cannot be checked: it concludes
        nothing where anything was seen, and its findings stay with a warning.

        Args:
            template: of :func:`cbedge.templates.read_template`, or of a bundle; ``None`` keeps to none.
            look: what was seen.
            conclusion: keep the impression alone to it, and leave the findings to the language model.
            given: it is the user's: tell what is left out.
            texts: whose words the draft may use beside those of the training reports.
            begun: tokens that the draft begins with.
        """
        told, seen = self.bundle.manifest.image_findings, look.seen or ()
        opened = told.open(seen) if told and seen else {}
        opening = [*opened.values()]
        house = self._parsed(template) if template else Template((), (), True)
        warnings: list[str] = []

        def uncontradicted(sentences: Sequence[str], said: Sequence[str]) -> list[str]:
            kept = []
            for text in sentences:
                against = [n for n in checked if (found := self.contradicting([n])) is not None and found.search(text)]
                if against:
                    reason = f"because the image scores point to {', '.join(against)}"
                    warnings.append(f"The template's sentence {text!r} was left out {reason}.")
                elif normalize(text) not in map(normalize, said):
                    kept.append(text)
            return kept

        checked = seen if house.english else ()  # the patterns are in English
        concludes = house.english or not seen
        findings = [] if conclusion else uncontradicted(house.findings, opening)
        impression = uncontradicted(house.impression, opening) if concludes else []
        if house.impression and not concludes:
            warnings.append(
                f"The template's impression was left out because the image scores point to {', '.join(seen)} and it "
                "could not be checked, for it is not in English."
            )
        if seen and not house.english:
            warnings.append(
                "The template is not in English: its sentences could not be checked against what the image scores "
                f"point to ({', '.join(seen)}). Check each of them."
            )
        impression = [*opening, *impression] if template else []
        affirming = bool(findings and seen and not opened)
        first = SectionPlan(
            self._headings[0], self._sentence_tokens(findings),
            MAX_OWN if not findings else MAX_OWN_IN_TEMPLATE if affirming else 0, tuple(opening),
        )  # fmt: skip
        second = SectionPlan(self._headings[1], self._sentence_tokens(impression), 0 if impression else MAX_OWN)
        words = self._tokens.extended([*texts, *opening, *house.findings, *house.impression])
        constraint = DraftConstraint((first, second), begun, self.bundle.manifest.stop_ids, words, self._full_stop)
        tokens = sum(map(len, (*self._headings, *first.sentences, *second.sentences)))
        return DraftPlan(
            constraint, (*opening, *findings, *impression), affirming, tuple(warnings if given else ()), tokens
        )

    def _parsed(self, template: str) -> Template:
        if self._last_parsed is None or self._last_parsed[0] != template:
            self._last_parsed = (template, parse_template(template))
        return self._last_parsed[1]

    def _sentence_tokens(self, sentences: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self._encode(self._tokenizer, f" {text}", False)) for text in sentences)

    @cached_property
    def _headings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first, second = (tuple(self._encode(self._tokenizer, t, False)) for t in ("FINDINGS:", " IMPRESSION:"))
        return first, second

    @cached_property
    def _tokens(self) -> TokenTexts:
        special = (i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)
        never = frozenset((*self.bundle.manifest.never_ids, *special))
        return TokenTexts(self.token_text, self.backend.vocabulary, never, self.lexicon)

    @cached_property
    def _full_stop(self) -> int:
        return self._encode(self._tokenizer, "a.", False)[-1]

    def token_text(self, token_id: int) -> str:
        """The text that a token adds within a report; a space before a word belongs to it."""
        if token_id not in self._token_texts:
            anchor = self._encode(self._tokenizer, "a", False)
            before, both = self.decode(anchor), self.decode([*anchor, token_id])
            self._token_texts[token_id] = both[len(before) :] if both.startswith(before) else ""
        return self._token_texts[token_id]

    def prompt_ids(self, context: ClinicalContext, seen: tuple[str, ...] | None, lateral: bool = False) -> list[int]:
        """The language model's tokens that follow the image embeddings, for what the Q-Former has seen."""
        return self.encode_prompt(build_prompt(context, seen, lateral))

    def encode_prompt(self, prompt: str) -> list[int]:
        """Any prompt's tokens with the special tokens around it, as transformers' processor gives them."""
        manifest = self.bundle.manifest
        return [*manifest.prefix_ids, *self._encode(self._tokenizer, prompt, False), *manifest.suffix_ids]

    def opening(self, look: Look) -> list[Spoken]:
        """What the draft begins with, token by token, for what was seen; empty where nothing opens it."""
        findings = self.bundle.manifest.image_findings
        opened = findings.open(look.seen) if findings and look.seen else {}
        stream, spoken = self.decode_stream(), []
        for name, text in zip(opened, build_opening([*opened.values()]), strict=True):
            for token_id in self._encode(self._tokenizer, text, False):
                piece = self.decode_piece(stream, token_id)
                spoken.append(Spoken(piece, look.scores[name], name, token_id))
        return spoken

    def prefill(
        self, look: Look, prompt_ids: list[int], begun: list[int], limit: int, study: Study | None = None
    ) -> tuple[Decoder, np.ndarray]:
        """A decoder that has read image, prompt and what the draft begins with, and the logits after it, float32 [V].

        Args:
            look: what was seen.
            prompt_ids: of :meth:`prompt_ids`.
            begun: tokens of the draft.
            limit: tokens of the draft at most, ``begun`` among them.
            study: may keep a decoder that has read a prompt of the same image embeddings.
        """
        capacity = look.image_embeds.shape[1] + limit + len(prompt_ids)
        decoder = (study.take_decoder(capacity) if study else None) or self.backend.new_decoder(capacity)
        if self.backend.decoder_only:  # else an encoder reads the prompt
            prompt_ids, begun = [*prompt_ids, *begun], []
        embeds = self.backend.embed_tokens(np.array([prompt_ids], np.int64))
        logits = decoder.prefill(np.concatenate([look.image_embeds, embeds], axis=1))
        return decoder, decoder.read(begun)[-1].copy() if begun else logits

    def check_images(
        self, images: Sequence[Radiograph], features: Sequence[np.ndarray], context: ClinicalContext,
        accept_any_image: bool = False,
    ) -> tuple[str, ...]:  # fmt: skip
        """See that a study's radiographs look like the chest radiographs that they are given as.

        Args:
            images: the study's, its frontal one first.
            features: of each, by the vision encoder, [1, P, H].
            context: of the study; its view is the first image's.
            accept_any_image: refuse nothing.

        Returns:
            What looks doubtful, a sentence each.

        Raises:
            RadiographError: one looks like no chest radiograph, or like a lateral one that is given as frontal.
        """
        views = ["lateral" if context.view == "lateral" else "frontal", "lateral"]
        doubts: list[str] = []
        for image, view, found in zip(images, views, features, strict=False):
            looks_lateral = self.film_view is not None and self.film_view.is_lateral(found)
            if looks_lateral and view == "frontal":
                self._doubt_frontal(image, found, accept_any_image, doubts)
                continue
            gate = self.lateral_gate if view == "lateral" and self.lateral_gate is not None else self.gate
            if gate is not None and not accept_any_image:
                self._pass_gate(gate, image, view, found)
            if self.film_view is None:
                continue
            if view == "lateral" and not looks_lateral:
                doubts.append("The radiograph given as lateral looks like a frontal view: check the view.")
            if view == "frontal" and self.film_view.is_mirrored(found):
                doubts.append("The radiograph looks mirrored, left and right exchanged: check its side marker.")
        return tuple(doubts)

    def _doubt_frontal(
        self, image: Radiograph, features: np.ndarray, accept_any_image: bool, doubts: list[str]
    ) -> None:
        """A film given as frontal looks lateral: refuse it, or say so where any image is accepted."""
        gate = self.lateral_gate or self.gate
        if gate is not None and not accept_any_image:
            gate.check(features, image.chroma)
        if not accept_any_image:
            beside = "give it as --lateral beside the frontal one, or alone with --view lateral"
            beside = beside if self.reads_lateral else "give the frontal one, or --view lateral"
            raise RadiographError(f"the radiograph looks like a lateral view: {beside}")
        doubts.append("The radiograph given as frontal looks like a lateral view: check the view.")

    def _pass_gate(self, gate: Gate, image: Radiograph, view: str, features: np.ndarray) -> None:
        """Let a chest radiograph pass; a frontal one given as lateral passes the frontal films' gate."""
        try:
            gate.check(features, image.chroma)
        except NotAChestRadiograph:
            if view != "lateral" or self.gate is None or gate is self.gate:
                raise
            self.gate.check(features, image.chroma)

    def look(self, features: np.ndarray, context: ClinicalContext, lateral: np.ndarray | None = None) -> Look:
        """Ask the Q-Former about the vision encoder's features [1, P, H], and about the lateral radiograph's."""
        return self.judge(self.query([features] if lateral is None else [features, lateral], context))

    def query(self, features: Sequence[np.ndarray], context: ClinicalContext) -> list[Queried]:
        """What the Q-Former answers for each radiograph of a study, its frontal one first."""
        contexts = [context, replace(context, view="lateral")]
        ids = (self.encode_instruction(build_query_instruction(one)) for one in contexts)
        return [self.backend.query_image(f, np.array([i], np.int64)) for f, i in zip(features, ids, strict=False)]

    def encode_instruction(self, instruction: str) -> list[int]:
        """Any instruction's tokens for the Q-Former, with its special tokens."""
        return self._encode(self._qformer_tokenizer, instruction, True)

    def judge(self, queried: Sequence[Queried]) -> Look:
        """What is seen, by what the Q-Former answers for each radiograph of a study."""
        findings = self.bundle.manifest.image_findings
        embeds, attention, logits = queried[0]
        for more, _, second in queried[1:]:
            embeds = np.concatenate([embeds, more], axis=1)
            logits = findings.join(logits, second) if findings and logits is not None and second is not None else None
        two = len(queried) > 1
        if findings is None or logits is None:
            return Look(embeds, None, {}, attention.mean(0), two)
        scores = scores_of(logits)
        seen = findings.read(scores)
        rows = [i for i, name in enumerate(findings.names) if name in seen] or [0]
        named = dict(zip(findings.names, map(float, scores), strict=True))
        return Look(embeds, seen, named, attention[rows].mean(0), two)

    def contradicting(self, seen: Sequence[str] | None) -> re.Pattern[str] | None:
        """What is found in sentences that contradict what was seen, and that a draft leaves out; ``None`` for none."""
        findings = self.bundle.manifest.image_findings
        return findings.contradicting(seen) if findings and seen else None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def decode_stream(self) -> DecodeStream:
        """A decoder of token ids to text that waits for whole characters."""
        return DecodeStream(skip_special_tokens=True)

    def decode_piece(self, stream: DecodeStream, token_id: int) -> str:
        """The text that one more token completes, empty where it completes none."""
        return stream.step(self._tokenizer, token_id) or ""

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special).ids


def check_max_new_tokens(count: Any) -> int:
    """A limit of tokens, checked.

    Raises:
        ContextError: it is no whole number, or out of its range.
    """
    if isinstance(count, (bool, np.bool_)) or not isinstance(count, numbers.Integral):
        raise ContextError(f"max_new_tokens must be a whole number, not {type(count).__name__}")
    if not 1 <= int(count) <= MAX_NEW_TOKENS:
        raise ContextError(f"max_new_tokens is {count}; give 1 to {MAX_NEW_TOKENS:,}")
    return int(count)


def check_template(bundle: Bundle, text: str, tokenizer: Tokenizer | None = None) -> str:
    """A user's template, read for a bundle; see :func:`cbedge.templates.parse_template`.

    Raises:
        ContextError: it is no normal report, the model cannot write its words as they are, or has no image scores that
            say what a template must not hide.
    """
    template = parse_template(text)
    if bundle.manifest.image_findings is None:
        raise ContextError(
            f"{bundle.manifest.name} has no image scores that say what a template must not hide: leave the template out"
        )
    tokenizer = tokenizer or _load_tokenizer(bundle, TOKENIZER)
    count = ROOM_FOR_OWN
    for sentence in (*template.findings, *template.impression):
        ids = tokenizer.encode(f" {sentence}", add_special_tokens=False).ids
        count += len(ids)
        if tokenizer.decode(ids, skip_special_tokens=True).strip() != sentence:
            raise ContextError(
                f"{bundle.manifest.name} cannot write the template's {sentence[:60]!r} as it is: reword it"
            )
    if count > MAX_NEW_TOKENS:
        raise ContextError(
            f"the template has {count - ROOM_FOR_OWN} tokens, more than {MAX_NEW_TOKENS - ROOM_FOR_OWN}: shorten it"
        )
    return template.text


class ReportStream(Iterator[str]):
    """Pieces of a draft as they are written; :attr:`report` holds the whole once the iterator is exhausted.

    ``for`` and ``async for`` both take it; the latter writes each piece in a thread, so an event loop goes on.
    """

    def __init__(
        self, generator: ReportGenerator, radiograph: Radiograph, context: ClinicalContext, limit: int | None,
        decoding: Decoding, indication_source: str | None = None, accept_any_image: bool = False,
        lateral: Radiograph | None = None, template: str | None = None, notes: Sequence[str] = (),
    ):  # fmt: skip
        self._notes = tuple(notes)
        self._report: Report | None = None
        self._attention: np.ndarray | None = None
        self._complete = False
        self._indication_source, self._accept_any_image = indication_source, accept_any_image
        self._template = template if decoding.keep_to_template else None
        self._pieces = self._run(generator, radiograph, context, limit, decoding, lateral)

    def __next__(self) -> str:
        return next(self._pieces)

    def __aiter__(self) -> ReportStream:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(next, self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    @property
    def report(self) -> Report:
        """The finished report.

        Raises:
            RuntimeError: the iterator is not exhausted.
        """
        if self._report is None:
            raise RuntimeError("the draft is not finished: exhaust the iterator first")
        return self._report

    @property
    def attention(self) -> np.ndarray:
        """Where the Q-Former looked: shares of patches, float32 [rows, columns]; see :mod:`cbedge.heatmap`.

        Raises:
            RuntimeError: the first piece was not asked for yet.
        """
        if self._attention is None:
            raise RuntimeError("nothing was looked at yet: ask for the first piece before")
        side = math.isqrt(len(self._attention) - 1)
        return self._attention[1:].reshape(side, side)

    def _run(
        self, generator: ReportGenerator, radiograph: Radiograph, context: ClinicalContext, limit: int | None,
        decoding: Decoding, lateral: Radiograph | None,
    ) -> Iterator[str]:  # fmt: skip
        manifest, backend = generator.bundle.manifest, generator.backend
        images = [image for image in (radiograph, lateral) if image is not None]
        start = perf_counter() - sum(image.read_ms for image in images) / 1000
        pixels = [preprocess_radiograph(image, manifest.preprocessing) for image in images]
        # The pixels of a large film are not held while its draft is written.
        images = [replace(image, pixels=np.empty((0, 0), np.float32), stored=None) for image in images]
        radiograph, lateral = images[0], images[1] if lateral else None
        read = perf_counter()
        study = generator.recent.study(pixels, context.view)
        image_reused = bool(study.queried)
        features = study.features or [backend.encode_image(planes) for planes in pixels]
        doubts = generator.check_images(images, features, context, self._accept_any_image)
        vision = perf_counter()
        queried = study.queried or generator.query(features, context)
        study.features, study.queried = features, queried
        look = generator.judge(queried)
        self._attention = look.attention
        qformer = perf_counter()
        template, template_source = self._template, "given" if self._template else None
        usual = generator.template_for(context) if template is None and decoding.keep_to_template else None
        if usual and not look.seen:
            template, template_source = usual, "model"
        prompt_ids = generator.prompt_ids(context, look.seen, look.lateral)
        opening = generator.opening(look)
        begun = [word.token_id for word in opening]
        plan = generator.plan(
            template or usual, look, conclusion=not template, given=template_source == "given", begun=begun,
            texts=[text for text in (context.indication, context.comparison) if text],
        )  # fmt: skip
        if limit is None:
            needed = len(begun) + plan.tokens + ROOM_FOR_OWN
            limit = min(MAX_NEW_TOKENS, max(manifest.decoding["max_new_tokens"], needed if self._template else 0))
        opening, begun = opening[:limit], begun[:limit]
        decoder, logits = generator.prefill(look, prompt_ids, begun, limit, study)
        prefill = perf_counter()
        drafting = Drafting()
        tokens = generator.tokens(decoder, logits, limit - len(begun), decoding, drafting, begun, plan.constraint)
        words = (Spoken("", token.probability, None, token.id) for token in tokens)
        check = SentenceFilter(
            generator.contradicting(look.seen), plan.constraint.tokens.lexicon, plan.given, plan.affirming
        )
        spoken: list[Spoken] = []
        try:
            for said in self._speak(generator, opening, words, check, look):
                spoken.append(said)
                if said.piece:
                    yield said.piece
        finally:
            study.give_decoder(decoder)
        end = perf_counter()
        text = "".join(word.piece for word in spoken).strip()
        findings, impression = split_sections(text)
        missing = " and no ".join(n for n, part in (("findings", findings), ("impression", impression)) if not part)
        if self._complete and missing:
            raise DraftError(
                f"the model wrote no whole report of this radiograph (no {missing}): write it without draft"
            )
        told = ["A sentence was left out because it had a word that is in no training report."] if check.unknown else []
        of_files = [warning for image in images for warning in image.warnings]
        marks = (start, read, vision, qformer, prefill, end)
        read_ms, vision_ms, qformer_ms, prefill_ms, decode_ms = (1000 * (b - a) for a, b in pairwise(marks))
        self._report = Report(
            findings=findings, impression=impression, text=text, complete=self._complete, model=manifest.name,
            model_version=manifest.version, variant=generator.variant, device=backend.device,
            view=context.view or "frontal", indication_source=self._indication_source,
            image_findings=look.seen, finding_scores=look.scores, image_sha256=radiograph.sha256,
            lateral_sha256=lateral.sha256 if lateral else None,
            template=template, template_source=template_source,
            warnings=tuple(dict.fromkeys([*self._notes, *doubts, *of_files, *plan.warnings, *told])),
            sentences=split_sentences(spoken),
            prompt_tokens=look.image_embeds.shape[1] + len(prompt_ids), new_tokens=len(spoken),
            opening_tokens=len(opening),
            guessed_tokens=drafting.guessed, accepted_tokens=drafting.accepted, passes=drafting.steps,
            image_reused=image_reused, reused_tokens=getattr(decoder, "shared", 0),
            timings=Timings(read_ms, vision_ms, qformer_ms, prefill_ms, decode_ms, total=1000 * (end - start)),
        )  # fmt: skip

    def _speak(
        self, generator: ReportGenerator, opening: Sequence[Spoken], words: Iterator[Spoken], check: SentenceFilter,
        look: Look,
    ) -> Iterator[Spoken]:  # fmt: skip
        """The words with their text up to the stop token, whole sentences at a time, those that pass the check."""
        for word in opening:
            yield from check.add(word)
        stream = generator.decode_stream()
        for word in opening:  # some tokenizers drop the space of the first token that they decode
            generator.decode_piece(stream, word.token_id)
        for word in words:
            if word.token_id in generator.bundle.manifest.stop_ids:
                self._complete = True
                break
            yield from check.add(word._replace(piece=generator.decode_piece(stream, word.token_id)))
        yield from check.end()
        if self._complete and not check.said[1]:  # all that it concluded contradicts the findings: they conclude it
            for place, said in enumerate(opening_sentences(opening)):
                heading = [Spoken(" IMPRESSION:", None)] if place == 0 else []
                yield from [*heading, said]


def opening_sentences(opening: Sequence[Spoken]) -> list[Spoken]:
    """Each finding's sentence of an opening as one piece, without the heading."""
    pieces: dict[str, Spoken] = {}
    for word in opening:
        if word.finding is not None:
            known = pieces.get(word.finding)
            pieces[word.finding] = word if known is None else known._replace(piece=known.piece + word.piece)
    return [said._replace(piece=f" {said.piece.replace('FINDINGS:', '').strip()}") for said in pieces.values()]


def _load_tokenizer(bundle: Bundle, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(bundle.folder / name))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{name} in {bundle.folder} cannot be read: install or export the bundle again") from error
