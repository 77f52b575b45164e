"""The Python interface: a generator of report drafts, what it is asked, and the stream that it answers."""

from __future__ import annotations

import asyncio
import math
import numbers
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from cbedge.backends import Backend, choose_variant, open_backend
from cbedge.bundles.bundle import Bundle, open_bundle
from cbedge.decoding import Decoding, GuessLength
from cbedge.drafting.plan import MAX_NEW_TOKENS, DraftingResources, check_template
from cbedge.drafting.recent import Recent
from cbedge.errors import CbedgeError, ContextError
from cbedge.findings.reading import ImageReading
from cbedge.images.film_check import FilmCheck
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.pipeline import Engine, Study, draft_report
from cbedge.prompt import ClinicalContext
from cbedge.report import Report

if TYPE_CHECKING:
    from cbedge.images.radiograph import ImageSource


class DraftOptions(TypedDict, total=False):
    """The fields of :class:`DraftRequest` beside ``image``, as keyword arguments."""

    lateral: ImageSource | None
    indication: str | None
    comparison: str | None
    view: str | None
    template: str | None
    max_new_tokens: int | None
    decoding: Decoding | Mapping[str, Any] | None
    accept_any_image: bool


@dataclass(frozen=True)
class DraftRequest:
    """What a draft is to be written of, and how.

    Attributes:
        image: the frontal radiograph: a path, the file's bytes, a binary file object, a PIL image, an array, a pydicom
            dataset or a :class:`~cbedge.images.radiograph.Radiograph`; see
            :func:`~cbedge.images.radiograph.load_radiograph`.
        lateral: the same study's lateral radiograph, for a model that :attr:`~ReportGenerator.reads_lateral`.
        indication: why the study was requested; default is what a DICOM header says of it.
        comparison: what earlier study it is compared with.
        view: ``frontal`` or ``lateral``; default is what the file says, else ``frontal``.
        template: a normal report in the wording that the draft is to keep to. Default is the one of
            :meth:`~ReportGenerator.keep_to`; else, if no abnormality is detected, the bundle's template that is usual
            for the indication.
        max_new_tokens: stop after so many tokens, 1 to 1,024; the draft is cut at the last whole sentence then, and is
            not ``complete``. Default is the bundle's limit, or what the template needs.
        decoding: how tokens are chosen; default is :attr:`~ReportGenerator.decoding`. A mapping changes some of its
            settings.
        accept_any_image: draft even of what does not look like a chest radiograph.
    """

    image: ImageSource
    lateral: ImageSource | None = None
    indication: str | None = None
    comparison: str | None = None
    view: str | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    decoding: Decoding | Mapping[str, Any] | None = None
    accept_any_image: bool = False


class ReportGenerator:
    """Drafts reports with one model. Create it once and keep it: the first draft then costs no loading.

    One generator may be used by many threads at once: every draft has its own state, and the model is only read. Drafts
    at the same time share the machine's cores, so each takes longer. A :class:`ReportStream` belongs to one thread.

    What was computed for the last study is kept (:mod:`cbedge.drafting.recent`): drafted again, with another indication
    or template, it takes half the time.

    Args:
        bundle: an opened bundle, its files verified.
        variant: name of one of its variants.
        backend: runs that variant.
        recent_studies: of how many studies to keep what was computed.

    Attributes:
        bundle, variant, backend: as given.
        resources: tokenizers, phrasebook, templates and word list of the bundle.
        film_check: the bundle's check of radiographs.
        recent: the studies that are kept; ``recent.clear()`` forgets them.

    Example:
        >>> generator = ReportGenerator.from_pretrained()
        >>> report = generator.generate("chest_pa.png", indication="cough")
        >>> print(report.findings)
    """

    def __init__(self, bundle: Bundle, variant: str, backend: Backend, recent_studies: int = 1):
        self.bundle, self.variant, self.backend = bundle, variant, backend
        self.recent = Recent(recent_studies)
        self.resources = DraftingResources(bundle, backend.vocabulary)
        self.film_check = FilmCheck.load(bundle.folder, bundle.manifest.files, bundle.manifest.reads_lateral)
        self._guess_length = GuessLength()
        self._house_template: str | None = None

    @classmethod
    def from_pretrained(
        cls, model: Path | str | None = None, variant: str | None = None, device: str = "auto",
        threads: int | None = None, recent_studies: int = 1,
    ) -> ReportGenerator:  # fmt: skip
        """Open a bundle, check the hash of every file that is needed, and load it.

        Args:
            model: folder of a bundle; default is the embedded model.
            variant: a variant of the bundle, such as ``int4``; default is the one that suits the machine
                (:func:`cbedge.backends.choose_variant`).
            device: ``auto``, ``cpu`` or ``cuda``.
            threads: CPU threads; default is one per core.
            recent_studies: of how many studies to keep in memory what was computed, for their next draft; 0 to 64.

        Raises:
            BundleError: the bundle is missing, altered, of another format, or lacks the variant.
            ContextError: ``recent_studies`` is out of its range.
            DeviceError: ONNX Runtime is not installed, or CUDA was asked for and is not available.
        """
        bundle = open_bundle(model)
        name, device = choose_variant(bundle, variant, device)  # what is not installed is said before files are read
        chosen = bundle.manifest.variants[name]
        files = bundle.variant_files(chosen)
        bundle.verify(files, sizes_alone=True)
        with ThreadPoolExecutor(1) as pool:  # hashes are computed while graphs load: a user waits for a cold start
            loading = pool.submit(open_backend, bundle, chosen, device, threads)
            bundle.verify(files)
            return cls(bundle, name, loading.result(), recent_studies)

    @property
    def decoding(self) -> Decoding:
        """How the bundle's maker chose that tokens are chosen: greedy, with guesses of its template and phrasebook."""
        chosen = self.bundle.manifest.decoding
        return Decoding(no_repeat=chosen.get("no_repeat", 0), stop_bias=chosen.get("stop_bias", 0.0))

    @property
    def reads_lateral(self) -> bool:
        """Whether the model was trained to read a lateral radiograph beside the frontal one."""
        return self.bundle.manifest.reads_lateral

    def keep_to(self, template: str) -> None:
        """Keep every draft to a template from now on, a department's own, unless a request brings another one.

        Raises:
            ContextError: it is no normal report, or the model has no image scores that say what it must not hide.
        """
        self._house_template = self._checked_template(template)

    def generate(self, image: ImageSource | DraftRequest, **options: Unpack[DraftOptions]) -> Report:
        """Draft the report of one frontal chest radiograph, and of the lateral one beside it.

        Args:
            image: the radiograph, or a whole request.
            options: the other fields of :class:`DraftRequest`.

        Raises:
            RadiographError: an image cannot be used, or does not look like a chest radiograph.
            ContextError: another field cannot be used.
            DraftError: the model wrote no whole report.
        """
        stream = self.stream(image, **options)
        for _ in stream:
            pass
        return stream.report

    def generate_many(self, requests: Sequence[DraftRequest | Mapping[str, Any]]) -> list[Report | CbedgeError]:
        """Draft the reports of several studies, one after another.

        Args:
            requests: for each study a request, or a mapping with its fields.

        Returns:
            For each study its report, or the error that :meth:`generate` would raise.

        Example:
            >>> reports = generator.generate_many([{"image": "1.png"}, {"image": "2.png", "indication": "cough"}])
        """
        reports: list[Report | CbedgeError] = []
        for request in requests:
            try:
                request = request if isinstance(request, DraftRequest) else DraftRequest(**request)
                reports.append(self.generate(request))
            except CbedgeError as error:
                reports.append(error)
        return reports

    async def generate_async(self, image: ImageSource | DraftRequest, **options: Unpack[DraftOptions]) -> Report:
        """:meth:`generate` for an event loop: the work is done in a thread, and a draft that is cancelled ends with the
        token that is being written."""
        stream = await asyncio.to_thread(self.stream, image, **options)
        async for _ in stream:
            pass
        return stream.report

    def stream(self, image: ImageSource | DraftRequest, **options: Unpack[DraftOptions]) -> ReportStream:
        """Like :meth:`generate`, as an iterator over pieces of text; its ``report`` is there when it is exhausted.

        The input is checked here; whether it looks like a chest radiograph, by what the vision encoder makes of it,
        when the first piece is asked for.
        """
        request = image if isinstance(image, DraftRequest) else DraftRequest(image, **options)
        return ReportStream(self._engine(), self._study(request))

    def _engine(self) -> Engine:
        return Engine(
            self.bundle.manifest, self.variant, self.backend, self.resources, self.film_check, self.recent,
            self._guess_length,
        )  # fmt: skip

    def _study(self, request: DraftRequest) -> Study:
        """A request, checked, its radiographs loaded."""
        limit = check_max_new_tokens(request.max_new_tokens)
        context = ClinicalContext(request.indication, request.comparison, request.view)
        template = self._house_template if request.template is None else self._checked_template(request.template)
        films = [load_radiograph(request.image)]
        if request.lateral is not None:
            films.append(self._load_lateral(request.lateral, films[0], context))
        given = {"indication": request.indication, "comparison": request.comparison}
        empty = [name for name, text in given.items() if text is not None and getattr(context, name) is None]
        of_header = films[0].indication
        return Study(
            films=tuple(films),
            context=ClinicalContext(
                context.indication or of_header, context.comparison, context.view or films[0].view or "frontal"
            ),
            indication_source="given" if context.indication else "DICOM header" if of_header else None,
            notes=tuple(f"The {name} says nothing and was left out." for name in empty),
            template=template, max_new_tokens=limit, decoding=self._decoding_of(request.decoding),
            accept_any_image=request.accept_any_image,
        )  # fmt: skip

    def _checked_template(self, template: str) -> str:
        return check_template(self.bundle.manifest, template, self.resources.codec)

    def _decoding_of(self, decoding: Decoding | Mapping[str, Any] | None) -> Decoding:
        """The settings that are given, those of a mapping in place of :attr:`decoding`'s, or :attr:`decoding`."""
        if decoding is None or isinstance(decoding, Decoding):
            return decoding or self.decoding
        if not isinstance(decoding, Mapping):
            raise ContextError(
                f"decoding must be a Decoding or a mapping of its settings, not {type(decoding).__name__}"
            )
        known = [field.name for field in fields(Decoding)]
        unknown = [str(name) for name in decoding if name not in known]
        if unknown:
            raise ContextError(f"decoding has no setting {unknown[0][:40]!r}; it has: {', '.join(known)}")
        return replace(self.decoding, **decoding)

    def _load_lateral(self, lateral: ImageSource, frontal: Radiograph, context: ClinicalContext) -> Radiograph:
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

    def __getattr__(self, name: str) -> Any:
        """Deprecated attributes, which are those of :attr:`resources` and :attr:`film_check` now."""
        home = _MOVED.get(name)
        if home is None or home not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"ReportGenerator.{name} is deprecated: use .{home}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(self.__dict__[home], name)


_MOVED = {
    "phrasebook": "resources",
    "templates": "resources",
    "lexicon": "resources",
    "gate": "film_check",
    "lateral_gate": "film_check",
    "film_view": "film_check",
}


class ReportStream(Iterator[str]):
    """Pieces of a draft as they are written; :attr:`report` holds the whole once the iterator is exhausted.

    ``for`` and ``async for`` both take it; the latter writes each piece in a thread, so an event loop goes on.

    Args:
        engine: of the model.
        study: to draft.
    """

    def __init__(self, engine: Engine, study: Study):
        self._report: Report | None = None
        self._reading: ImageReading | None = None
        self._pieces = self._run(draft_report(engine, study, self._keep))

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
        """What the Q-Former attended to: shares of patches, float32 [rows, columns]; see :mod:`cbedge.images.heatmap`.

        Raises:
            RuntimeError: the first piece was not asked for yet.
        """
        if self._reading is None:
            raise RuntimeError("the image was not read yet: ask for the first piece before")
        patches = self._reading.attention[1:]
        side = math.isqrt(len(patches))
        return patches.reshape(side, side)

    def _run(self, pieces: Generator[str, None, Report]) -> Iterator[str]:
        self._report = yield from pieces

    def _keep(self, reading: ImageReading) -> None:
        self._reading = reading


def check_max_new_tokens(count: Any) -> int | None:
    """A limit of tokens, checked; ``None`` stays ``None``.

    Raises:
        ContextError: it is no whole number, or out of its range.
    """
    if count is None:
        return None
    if isinstance(count, (bool, np.bool_)) or not isinstance(count, numbers.Integral):
        raise ContextError(f"max_new_tokens must be a whole number, not {type(count).__name__}")
    if not 1 <= int(count) <= MAX_NEW_TOKENS:
        raise ContextError(f"max_new_tokens is {count}; give 1 to {MAX_NEW_TOKENS:,}")
    return int(count)
