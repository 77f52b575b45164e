"""The Python interface: a generator of report drafts, what it is asked, and the stream that it answers."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from cbedge.arguments import check_count, check_names, check_type
from cbedge.backends import Backend, choose_variant, open_backend
from cbedge.bundles.bundle import Bundle, open_bundle
from cbedge.decoding import Decoding, GuessLength
from cbedge.drafting.assessment import compile_expressions
from cbedge.drafting.plan import MAX_NEW_TOKENS, DraftingResources
from cbedge.drafting.recent import MAX_RECENT_STUDIES, Recent
from cbedge.drafting.request import DraftOptions, DraftRequest
from cbedge.drafting.templates import Template
from cbedge.errors import CbedgeError, ContextError, RadiographError, memory_errors
from cbedge.findings.finding_reader import FINDINGS, FindingReader
from cbedge.findings.reading import ImageReading
from cbedge.images.film_check import FilmCheck
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.pipeline import Engine, Study, draft_report
from cbedge.prompt import ClinicalContext
from cbedge.report import Report

if TYPE_CHECKING:
    from cbedge.images.radiograph import ImageSource

__all__ = ["DraftOptions", "DraftRequest", "ReportGenerator", "ReportStream"]
MAX_THREADS = 1024
_FIELDS = [field.name for field in fields(DraftRequest)]


class ReportGenerator:
    """Drafts reports with one model. Create it once and reuse it, because loading takes time.

    A generator is thread-safe: every draft has its own state, and the model is read-only. Concurrent drafts share the
    CPU cores, so each takes longer. A :class:`ReportStream` belongs to one thread.

    Intermediate results of the last study are cached (:mod:`cbedge.drafting.recent`): drafting it again, with another
    indication or template, takes half the time.

    Args:
        bundle: an opened bundle, its files verified.
        variant: name of one of its variants.
        backend: runs that variant.
        recent_studies: number of studies to cache.

    Attributes:
        bundle: as given.
        variant: as given.
        backend: as given.
        resources: tokenizers, phrasebook, templates and lexicon of the bundle.
        film_check: the bundle's check of input images.
        finding_reader: calibrated readers of findings; ``None`` if the bundle has none.
        recent: the cached studies; ``recent.clear()`` removes them.

    Examples:
        >>> generator = ReportGenerator.from_pretrained()
        >>> report = generator.generate("chest_pa.png", indication="cough")
        >>> print(report.findings)
    """

    def __init__(self, bundle: Bundle, variant: str, backend: Backend, recent_studies: int = 1):
        self.bundle, self.variant, self.backend = bundle, variant, backend
        self.recent = Recent(recent_studies)
        self.resources = DraftingResources(bundle, backend.vocabulary)
        self.film_check = FilmCheck.load(bundle.folder, bundle.manifest.files, bundle.manifest.reads_lateral)
        findings, has_reader = bundle.manifest.image_findings, FINDINGS in bundle.manifest.files
        self.finding_reader = (
            FindingReader.load(bundle.folder / FINDINGS, findings) if findings and has_reader else None
        )
        self._guess_length = GuessLength()
        self._house_template: Template | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str | None = None,
        variant: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        recent_studies: int = 1,
        operating_point: str | None = None,
    ) -> ReportGenerator:
        """Open a bundle, verify the hash of every file it needs, and load it.

        Args:
            model: folder of a bundle; default is the embedded model.
            variant: a variant of the bundle, such as ``int4``; default depends on the machine
                (:func:`cbedge.backends.choose_variant`).
            device: ``auto``, ``cpu`` or ``cuda``.
            threads: CPU threads, 1 to 1,024; default is one per core.
            recent_studies: number of studies to cache in memory for repeated drafts, 0 to 64.
            operating_point: thresholds of all findings, such as ``sensitive``, ``balanced`` or ``specific``; default
                is the bundle's. It applies to every draft, so that those of a department agree.

        Raises:
            BundleError: the bundle is missing, altered, of an unknown format, or lacks the variant.
            OptionError: ``threads`` or ``recent_studies`` is out of range, or the operating point is unknown.
            DeviceError: ONNX Runtime is not installed, the device is unknown or not available, or memory ran out.
        """
        if threads is not None:
            check_count("threads", threads, 1, MAX_THREADS)
        check_count("recent_studies", recent_studies, 0, MAX_RECENT_STUDIES)
        with memory_errors():
            bundle = open_bundle(model).at(operating_point)
            name, device = choose_variant(bundle, variant, device)  # reports a missing runtime before files are read
            chosen = bundle.manifest.variants[name]
            files = bundle.variant_files(chosen)
            bundle.verify(files, sizes_alone=True)
            with ThreadPoolExecutor(1) as pool:  # all the rest is done while the graphs load, for a faster cold start
                loading = pool.submit(open_backend, bundle, chosen, device, threads)
                bundle.verify(files)
                if bundle.manifest.image_findings is not None:
                    compile_expressions(bundle.manifest.image_findings)
                return cls(bundle, name, loading.result(), recent_studies)

    @property
    def decoding(self) -> Decoding:
        """The bundle's decoding settings: greedy, with speculative decoding from template and phrasebook."""
        chosen = self.bundle.manifest.decoding
        return Decoding(no_repeat=chosen.get("no_repeat", 0), stop_bias=chosen.get("stop_bias", 0.0))

    @property
    def reads_lateral(self) -> bool:
        """Whether the model was trained to read a lateral radiograph together with the frontal one."""
        return self.bundle.manifest.reads_lateral

    def keep_to(self, template: str) -> None:
        """Make every draft follow a template, such as a department's own, unless a request has another one.

        Raises:
            ContextError: the template is not a normal report, or the model has no image scores to check it against.
        """
        self._house_template = self._checked_template(template)

    def generate(self, image: ImageSource | DraftRequest, **options: Unpack[DraftOptions]) -> Report:
        """Draft the report of one study: a frontal chest radiograph, and optionally a lateral one.

        Args:
            image: the radiograph, or a whole request.
            options: the other fields of :class:`DraftRequest`; they replace those of a whole request.

        Raises:
            RadiographError: an image cannot be read, or does not look like a chest radiograph, or frontal and lateral
                radiograph do not belong together.
            ContextError: another field is unknown or invalid.
            DeviceError: memory ran out.
            DraftError: the model wrote an incomplete report.
        """
        stream = self.stream(image, **options)
        for _ in stream:
            pass
        return stream.report

    def generate_many(self, requests: Sequence[DraftRequest | Mapping[str, Any]]) -> list[Report | CbedgeError]:
        """Draft the reports of several studies, one after another.

        Args:
            requests: one request for each study, or a mapping with its fields.

        Returns:
            For each study, its report or the error that :meth:`generate` would raise.

        Raises:
            OptionError: ``requests`` is a single request, or cannot be iterated.

        Examples:
            >>> reports = generator.generate_many([{"image": "1.png"}, {"image": "2.png", "indication": "cough"}])
        """
        is_single = isinstance(requests, str | bytes | Mapping)
        check_type("requests", requests, () if is_single else Iterable, "a sequence of requests")  # type: ignore[type-abstract]
        reports: list[Report | CbedgeError] = []
        for request in requests:
            try:
                check_type("a request", request, (DraftRequest, Mapping), "a DraftRequest or a mapping of its fields")
                chosen = request if isinstance(request, Mapping) else {"image": request}
                check_names("a request", chosen, _FIELDS)
                if "image" not in chosen:
                    raise ContextError("a request has no image: give the field image")
                reports.append(self.generate(**chosen))
            except CbedgeError as error:
                reports.append(error)
        return reports

    async def generate_async(self, image: ImageSource | DraftRequest, **options: Unpack[DraftOptions]) -> Report:
        """:meth:`generate` for an event loop. The work runs in a thread; a cancelled draft stops after the current
        token."""
        stream = await asyncio.to_thread(self.stream, image, **options)
        async for _ in stream:
            pass
        return stream.report

    def stream(self, image: ImageSource | DraftRequest, **options: Unpack[DraftOptions]) -> ReportStream:
        """Like :meth:`generate`, as an iterator over pieces of text; its ``report`` is available at the end.

        Input is checked in this call, except that the check whether the image looks like a chest radiograph runs with
        the first piece, because it needs the vision encoder.
        """
        check_names("a request", options, _FIELDS)
        request = replace(image, **options) if isinstance(image, DraftRequest) else DraftRequest(image, **options)
        with memory_errors():
            return ReportStream(self._engine(), self._study(request))

    def _engine(self) -> Engine:
        return Engine(
            self.bundle.manifest,
            self.variant,
            self.backend,
            self.resources,
            self.film_check,
            self.finding_reader,
            self.recent,
            self._guess_length,
        )

    def _study(self, request: DraftRequest) -> Study:
        """Check a request and load its radiographs."""
        limit = request.max_new_tokens
        limit = None if limit is None else check_count("max_new_tokens", limit, 1, MAX_NEW_TOKENS)
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
            notes=tuple(f"The {name} has no content and was ignored." for name in empty),
            template=template,
            max_new_tokens=limit,
            decoding=self._decoding_of(request.decoding),
            accept_any_image=request.accept_any_image,
            unassessed=request.unassessed,
        )

    def _checked_template(self, template: str) -> Template:
        from cbedge.drafting.template_parser import check_template  # only a user's template needs it

        return check_template(self.bundle.manifest, template, self.resources.codec)

    def _decoding_of(self, decoding: Decoding | Mapping[str, Any] | None) -> Decoding:
        """The given settings; a mapping changes :attr:`decoding`; ``None`` is :attr:`decoding`."""
        if decoding is None or isinstance(decoding, Decoding):
            return decoding or self.decoding
        check_type("decoding", decoding, Mapping, "a Decoding or a mapping of its settings")  # type: ignore[type-abstract]
        check_names("decoding", decoding, [field.name for field in fields(Decoding)])
        return replace(self.decoding, **decoding)

    def _load_lateral(self, lateral: ImageSource, frontal: Radiograph, context: ClinicalContext) -> Radiograph:
        if not self.reads_lateral:
            raise ContextError(
                f"{self.bundle.manifest.name} cannot read a lateral radiograph: leave it out, or use a model that was "
                "trained with both views"
            )
        if "lateral" in (context.view, frontal.view):
            raise RadiographError(
                "the first radiograph is a lateral view: give the frontal view first, then the lateral view"
            )
        radiograph = load_radiograph(lateral)
        if radiograph.view == "frontal":
            raise RadiographError(
                "the lateral radiograph is a frontal view according to its header: give the lateral view"
            )
        if radiograph.sha256 == frontal.sha256:
            raise RadiographError(
                "the frontal and the lateral radiograph are the same image: give two, or only the frontal one"
            )
        if frontal.study_uid and radiograph.study_uid and frontal.study_uid != radiograph.study_uid:
            raise RadiographError(
                "the two radiographs have different Study Instance UIDs: give two views of the same study"
            )
        return radiograph

    def __getattr__(self, name: str) -> Any:
        """Deprecated attributes, moved to :attr:`resources` and :attr:`film_check`."""
        home = _MOVED.get(name)
        if home is None or home not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"ReportGenerator.{name} is deprecated: use .{home}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(self.__dict__[home], name)


_MOVED = {
    **dict.fromkeys(("phrasebook", "templates", "lexicon"), "resources"),
    "gate": "film_check",
}


class ReportStream(Iterator[str]):
    """Iterator over the pieces of a draft as they are written; :attr:`report` is available once it is exhausted.

    Works with ``for`` and ``async for``; the latter generates each piece in a thread and does not block the event loop.
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
        """The Q-Former's attention to each patch, float32 [rows, columns]; see :mod:`cbedge.images.heatmap`.

        Raises:
            RuntimeError: the iterator was not started.
        """
        if self._reading is None:
            raise RuntimeError("the image was not read yet: get the first piece from the iterator first")
        patches = self._reading.attention[1:]
        side = math.isqrt(len(patches))
        return patches.reshape(side, side)

    def _run(self, pieces: Generator[str, None, Report]) -> Iterator[str]:
        with memory_errors():
            self._report = yield from pieces

    def _keep(self, reading: ImageReading) -> None:
        self._reading = reading
