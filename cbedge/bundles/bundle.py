"""A model on disk: a folder with ONNX graphs, tokenizers and a model card, described by its manifest.

Opening verifies every file that a variant needs; writing is atomic. No file is a pickle.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cbedge.arguments import check_type
from cbedge.bundles.manifest import MANIFEST, FileRecord, Manifest, Variant, read_manifest
from cbedge.errors import BundleError, OptionError, OutputError
from cbedge.files import file_sha256
from cbedge.findings.finding_reader import FINDINGS
from cbedge.images.familiarity import FAMILIARITY
from cbedge.images.gate import GATE

CARD = "MODEL_CARD.md"
TOKENIZER = "tokenizer.json"
QFORMER_TOKENIZER = "qformer_tokenizer.json"
PHRASEBOOK = "phrasebook.npy"
TEMPLATES = "templates.npz"
WORDS = "words.npy"
DEFAULT_BUNDLE = Path(__file__).parent.parent / "models" / "default"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    def variant(self, name: str | None = None) -> tuple[str, Variant]:
        """The named or the default variant, as (name, variant). See :func:`cbedge.backends.choose_variant` for the
        best variant of a machine.

        Raises:
            BundleError: the bundle has no such variant.
        """
        name = self.manifest.default_variant if name is None else name
        check_type("variant", name, str, "text", BundleError)
        if name not in self.manifest.variants:
            known = ", ".join(self.manifest.variants)
            raise BundleError(f"unknown variant {name[:40]!r}; {self.manifest.name} has: {known}")
        return name, self.manifest.variants[name]

    def at(self, operating_point: str | None) -> "Bundle":
        """This bundle with the thresholds of an operating point; ``None`` keeps them.

        Raises:
            OptionError: there is no such operating point.
        """
        if operating_point is None:
            return self
        check_type("operating_point", operating_point, str, "text", OptionError)
        findings = self.manifest.image_findings
        if findings is None:
            raise OptionError(f"{self.manifest.name} has no image findings, so it has no operating point: leave it out")
        return replace(self, manifest=replace(self.manifest, image_findings=findings.at(operating_point)))

    def verify(self, names: tuple[str, ...] | None = None, sizes_alone: bool = False) -> None:
        """Check size and SHA-256 of the named files (default: all), or only existence and size.

        Raises:
            BundleError: a file is missing, altered or damaged.
        """
        names = tuple(self.manifest.files) if names is None else names
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(self._verify_file, sizes_alone=sizes_alone), names))

    def variant_files(self, variant: Variant) -> tuple[str, ...]:
        """All files that are needed to run a variant."""
        optional = [
            name for name in (PHRASEBOOK, TEMPLATES, WORDS, GATE, FAMILIARITY, FINDINGS) if name in self.manifest.files
        ]
        return (*variant.graphs.values(), *variant.data, TOKENIZER, QFORMER_TOKENIZER, *optional)

    def _verify_file(self, name: str, sizes_alone: bool) -> None:
        record = self.manifest.files.get(name)
        path = self.folder / name
        if record is None:
            raise BundleError(
                f"{MANIFEST} does not list {name}, so the bundle is incomplete: install or export it again"
            )
        if not path.is_file():
            raise BundleError(f"{name} is missing from the bundle {self.folder}: install or export it again")
        if path.stat().st_size != record.size or not (sizes_alone or file_sha256(path) == record.sha256):
            raise BundleError(f"{name} in the bundle {self.folder} was altered or damaged: install or export it again")


def open_bundle(folder: Path | str | None = None) -> Bundle:
    """Read a bundle's manifest; :meth:`Bundle.verify` checks the files.

    Args:
        folder: the bundle; default is the embedded model.

    Raises:
        BundleError: there is no bundle, or its manifest is damaged or has an unsupported format or prompt version.
    """
    folder = DEFAULT_BUNDLE if folder is None else folder
    check_type("model", folder, (str, os.PathLike), "the path of a folder", BundleError)
    path = Path(folder)
    return Bundle(path, read_manifest(path))


def write_bundle(folder: Path, fill: Callable[[Path], Manifest], force: bool = False) -> Bundle:
    """Write a bundle atomically: a temporary folder next to it, fsync, rename.

    Args:
        folder: folder of the bundle.
        fill: writes the files into a given folder and returns the manifest; its ``files`` are set here.
        force: overwrite an existing bundle.

    Raises:
        OutputError: ``folder`` exists and may not be overwritten, or cannot be written.
    """
    check_target(folder, force)
    scratch = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    try:
        scratch.mkdir(parents=True)
        manifest = fill(scratch)
        manifest = replace(manifest, files={path.name: _record(path) for path in sorted(scratch.iterdir())})
        (scratch / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for path in (*scratch.iterdir(), scratch):
            _fsync(path)
        old = scratch.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except PermissionError:
        raise OutputError(f"no permission to write {folder}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_bundle(folder)


def check_target(folder: Path, force: bool) -> None:
    """Check that a folder may be written.

    Raises:
        OutputError: ``folder`` is not empty, and it is not a bundle or ``force`` is false.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise OutputError(f"{folder} exists and is not a bundle: give another folder; nothing was written")
    if not force:
        raise OutputError(f"{folder} already has a bundle: give --force to overwrite it, or another folder")


def _record(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_sha256(path))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
