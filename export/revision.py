"""Change a bundle without exporting again: its variants, manifest, and the files made of training data."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import yaml

from cbedge.backends import open_backend
from cbedge.bundles.bundle import CARD, PHRASEBOOK, TEMPLATES, WORDS, Bundle, write_bundle
from cbedge.bundles.manifest import IN_INT8, Manifest, Variant
from cbedge.findings.finding_reader import FINDINGS, FindingReader
from cbedge.findings.image_findings import ImageFindings
from cbedge.images.familiarity import FAMILIARITY
from cbedge.images.gate import GATE
from cbedge.provenance import bundle_sha256
from export.bundle import PARITY, PARITY_CASES
from export.card import model_card
from export.film_samples import collect_films
from export.gate import fit_gate
from export.half import half_on_the_same_weights
from export.parity import Parity, VariantParity, compare, example_pixels, parity_cases
from export.phrases import lexicon_of, phrasebook_of
from export.quantize import DESCRIPTIONS, SUFFIX, in_int8
from export.tracing import DECODER, EMBED
from training.fetch import DEFAULT_CACHE
from training.openings import with_denials
from training.templates import templates_of
from training.trained import load_adapted

_EARLIER = (
    "Measured on an earlier state of this bundle: rules, thresholds or templates changed since, so drafts can differ."
)

Progress = Callable[[int, int], None]  # gets how many drafts are done, of how many


class Revision:
    """A verified bundle and its changes; :meth:`write` writes the result into another folder, or into the same.

    Attributes:
        manifest: the manifest with the changes.
        files: name of each new or changed file, and the function that writes it.
        removed: names of files that are left out.
    """

    def __init__(self, source: Bundle):
        self.source, self.manifest = source, source.manifest
        self.files: dict[str, Callable[[Path], object]] = {}
        self.removed: set[str] = set()

    def set_version(self, version: str) -> None:
        """Set the version of the model."""
        self.manifest = replace(self.manifest, version=version)

    def keep(self, names: list[str]) -> None:
        """Keep only these variants; the first becomes the default."""
        kept = [self.source.variant(name)[0] for name in names]
        variants = {name: self.manifest.variants[name] for name in dict.fromkeys(kept)}
        self.manifest = replace(self.manifest, variants=variants, default_variant=kept[0])

    def add_q4f16(self) -> None:
        """Add q4f16, which shares int4's weights and has a decoder graph of its own."""
        shared = self._int4("--gpu", "q4f16")
        half, name = half_on_the_same_weights(self.source.folder / shared.graphs[DECODER]), SUFFIX["q4f16"]
        graphs = {**shared.graphs, DECODER: f"{DECODER}{name}.onnx"}
        about = "int4's weights, the decoder in 16 bit arithmetic, for GPUs"
        self._add("q4f16", replace(shared, description=about, graphs=graphs))
        self.files[graphs[DECODER]] = lambda path: onnx.save(half, str(path))

    def add_q4a8(self) -> None:
        """Add q4a8, which shares int4's embedding and weights."""
        shared = self._int4("--vnni", IN_INT8)
        kinds = [kind for kind in shared.graphs if kind != EMBED]
        names = {kind: f"{kind}{SUFFIX[IN_INT8]}" for kind in kinds}
        data = (*shared.data, *(shared.graphs[kind] for kind in kinds), *(f"{name}.json" for name in names.values()))
        graphs = {**shared.graphs, **{kind: f"{name}.onnx" for kind, name in names.items()}}
        self._add(IN_INT8, Variant(DESCRIPTIONS[IN_INT8], graphs, data))

    def set_openings(self, path: Path) -> None:
        """Take the opening sentences of drafts from a YAML file, finding → sentence."""
        sentences = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        findings = self._findings("--openings")
        if not isinstance(sentences, dict) or not all(isinstance(text, str) for text in sentences.values()):
            raise ValueError(f"{path} is not a mapping of findings to sentences")
        if unknown := [name for name in sentences if name not in findings.names]:
            raise ValueError(f"{path} has {unknown[0]!r}; {self.manifest.name} knows: {', '.join(findings.names)}")
        lines = tuple(sentences.get(name, "") for name in findings.names) if sentences else ()
        self.manifest = replace(self.manifest, image_findings=replace(findings, openings=lines))

    def update_denials(self) -> None:
        """Take the patterns of contradictions from ``training/ontology.yaml``."""
        self.manifest = replace(self.manifest, image_findings=with_denials(self._findings("--denials")))

    def set_quality(self, path: Path) -> None:
        """Take the measured scores from a JSON file. The comparison with torch stays, and what a record does not have:
        the scores if it is of films of other hospitals alone."""
        measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        quality = self.manifest.quality
        if (measured.get("bundle") or {}).get("sha256") not in (None, bundle_sha256(self.source.folder)):
            measured["notes"] = [*measured.get("notes", ()), _EARLIER]
        if "scores" in measured:
            quality = {name: value for name, value in quality.items() if name in ("parity", "external")}
            measured = {name: value for name, value in measured.items() if value or name != "external"}
        else:
            measured = {"external": measured["external"]}
        self.manifest = replace(self.manifest, quality=quality | measured)

    def compare(self, checkpoint: Path, data: Path | None, progress: Progress) -> None:
        """Compare the source's variants with a merged fp32 checkpoint; recorded variants on the same cases stay.

        Args:
            checkpoint: folder, for example from ``python -m export.restore``.
            data: IU X-RAY folder; ``None`` takes the example radiograph.
        """
        bundle = self.source
        cases, where = parity_cases(bundle.manifest.preprocessing, data, PARITY_CASES)
        variants = bundle.manifest.variants
        backends = {name: partial(open_backend, bundle, variant, "cpu") for name, variant in variants.items()}
        sizes = {
            name: sum((bundle.folder / file).stat().st_size for file in _files(variant)) / 1e6
            for name, variant in variants.items()
        }
        before = _parity(bundle.manifest)
        error = before.merge_error if before else 0.0
        parts = load_adapted(str(checkpoint), [], DEFAULT_CACHE)
        found = compare(parts, backends, sizes, cases, where, error, progress=progress)
        if before and (before.cases, before.source) == (found.cases, found.source):
            found = replace(found if "fp32" in variants else before, variants=before.variants | found.variants)
        measured = asdict(found)
        self.manifest = replace(self.manifest, quality=self.manifest.quality | {"parity": measured})
        self.files[PARITY] = lambda path: path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")

    def set_templates(self, data: Path) -> None:
        """Build the templates from the train reports of IU X-RAY."""
        if (templates := templates_of(self._findings("--templates"), data)) is not None:
            self.files[TEMPLATES] = templates.save

    def remove_templates(self) -> None:
        """Leave the templates out."""
        self.removed.add(TEMPLATES)

    def set_phrases(self, data: Path, limit: int | None, progress: Progress) -> None:
        """Build the phrasebook from train reports and from the bundle's own drafts of these studies."""
        self.files[PHRASEBOOK] = phrasebook_of(self.source.folder, data, limit, progress).save

    def set_gate(self, data: Path, more: list[Path], others: Path | None, cache: Path | None) -> None:
        """Fit the gate and the measure of familiarity on films of IU X-RAY and of further folders.

        Args:
            data: IU X-RAY folder.
            more: further folders of films (:func:`export.film_samples.collect_films`).
            others: folder of images that are not chest radiographs.
            cache: folder for the features of images.
        """
        backend = open_backend(self.source, self.manifest.variants[self.manifest.default_variant], "cpu")
        fitted = fit_gate(backend, self.manifest.preprocessing, collect_films(data, more), others, cache)
        if fitted is None:
            raise ValueError(f"{data} has too few training films of each view to fit a gate")
        self.files |= {GATE: fitted.gate.save, FAMILIARITY: fitted.familiarity.save}
        self.removed |= {"gate_lateral.npy", "film_view.npy"}  # of older bundles

    def set_findings(self, findings: ImageFindings, reader: FindingReader) -> None:
        """Take fitted readers of findings (:mod:`export.finding_fit`)."""
        self.manifest = replace(self.manifest, image_findings=findings)
        self.files[FINDINGS] = reader.save

    def set_words(self, data: Path) -> None:
        """Build the word list from train reports."""
        self.files[WORDS] = lexicon_of(data).save

    def write(self, out: Path, force: bool) -> None:
        """Write the bundle, with a new model card.

        Raises:
            OutputError: ``out`` exists and may not be overwritten, or cannot be written.
        """
        has_templates = TEMPLATES in {*self.files, *self.source.manifest.files} - self.removed
        card = model_card(self.manifest, _parity(self.manifest), has_templates)
        self.files[CARD] = lambda path: path.write_text(card, encoding="utf-8")
        write_bundle(out, self._fill, force)

    def _fill(self, folder: Path) -> Manifest:
        before, after = (
            {file for variant in manifest.variants.values() for file in _files(variant)}
            for manifest in (self.source.manifest, self.manifest)
        )
        for name in self.source.manifest.files.keys() - (before - after) - {*self.files} - self.removed:
            shutil.copyfile(self.source.folder / name, folder / name)
        for name, write in self.files.items():
            write(folder / name)
        if IN_INT8 in self.manifest.variants.keys() - self.source.manifest.variants.keys():
            graphs = self.manifest.variants["int4"].graphs
            film = example_pixels(self.manifest.preprocessing)
            in_int8({kind: folder / file for kind, file in graphs.items()}, folder, film)
        return self.manifest

    def _add(self, name: str, variant: Variant) -> None:
        self.manifest = replace(self.manifest, variants={**self.manifest.variants, name: variant})

    def _int4(self, option: str, name: str) -> Variant:
        """int4, whose weights another variant will share."""
        variants = self.manifest.variants
        if "int4" not in variants or name in variants:
            reason = f"has {name} already" if name in variants else "has no int4, whose weights it would share"
            raise ValueError(f"{option} adds {name}, and {self.manifest.name} {reason}")
        return variants["int4"]

    def _findings(self, option: str) -> ImageFindings:
        if self.manifest.image_findings is None:
            raise ValueError(f"{self.manifest.name} has no finding scores, which {option} needs")
        return self.manifest.image_findings


def _files(variant: Variant) -> set[str]:
    return {*variant.graphs.values(), *variant.data}


def _parity(manifest: Manifest) -> Parity | None:
    """The recorded comparison with torch."""
    if (values := manifest.quality.get("parity")) is None:
        return None
    variants = {name: VariantParity(**variant) for name, variant in values["variants"].items()}
    return Parity(**{**values, "variants": variants})
