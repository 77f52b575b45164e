"""A model on disk: a folder with ONNX graphs, tokenizers and a model card, described by ``manifest.json``.

Opening verifies every file that a variant needs; writing is atomic. No file is a pickle.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from cbedge.errors import BundleError, OutputError
from cbedge.findings.image_findings import CONTRARY, ImageFindings
from cbedge.images.film_view import FILM_VIEW
from cbedge.images.gate import GATE, LATERAL_GATE
from cbedge.images.preprocess import Preprocessing
from cbedge.prompt import PROMPT_VERSION

FORMAT_VERSION = 2
READABLE_FORMATS = (1, 2)  # format 1 implies the default preprocessing and no suffix_ids
MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
TOKENIZER = "tokenizer.json"
QFORMER_TOKENIZER = "qformer_tokenizer.json"
PHRASEBOOK = "phrasebook.npy"
TEMPLATES = "templates.npz"
WORDS = "words.npy"
GRAPHS = ("vision_encoder", "qformer", "embed_tokens", "decoder_model_merged")
FOR_GPUS = ("q4f16", "fp16")  # variants for GPUs, best first
IN_INT8 = "q4a8"  # the variant that reads int4's weights and multiplies in 8-bit integers
ENCODER = "encoder_model"  # additional graph of an encoder-decoder language model (Flan-T5)
BACKENDS = ("onnx", "torch_nf4")
DEFAULT_BUNDLE = Path(__file__).parent.parent / "models" / "default"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of a bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Variant:
    """One precision of the same model.

    Attributes:
        description: one line of text.
        graphs: ONNX file of each of :data:`GRAPHS`, and of :data:`ENCODER` if the language model has an encoder.
        data: files with external weights of those graphs, or files of another backend.
        backend: ``onnx``, or ``torch_nf4``, which has no graphs.
    """

    description: str
    graphs: dict[str, str]
    data: tuple[str, ...] = ()
    backend: str = "onnx"


@dataclass(frozen=True)
class Shapes:
    """Sizes that the runtime needs before it runs a graph."""

    image_size: int
    num_query_tokens: int
    hidden_size: int
    num_layers: int
    num_key_value_heads: int
    head_size: int


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        name, version, license: name, version and license of the model.
        prompt_version: version of the prompt that the model was trained with.
        shapes: see :class:`Shapes`.
        preprocessing: settings of the preprocessing.
        prefix_ids: token ids between the image embeddings and the prompt (a beginning-of-text token, or none).
        suffix_ids: token ids right after the prompt (an end-of-text token for an encoder such as Flan-T5's, or none).
        stop_ids: token ids that end a report.
        start_ids: start token ids of the decoder of an encoder-decoder model.
        decoding: defaults: ``max_new_tokens``, and ``no_repeat`` and ``stop_bias`` of
            :class:`cbedge.decoding.Decoding`.
        default_variant: the variant that is used by default.
        variants, files: content of the folder.
        training_data, base_weights: origin and licence of each.
        quality: measured scores, each with its control rows.
        image_findings: findings that the Q-Former's graph scores (its output ``finding_logits``), the prompt lists, and
            drafts start with; ``None`` for a model without finding scores.
        reads_lateral: whether the model was trained to read a lateral radiograph together with the frontal one.
        never_ids: tokens that are never generated: parts of characters that occur in no training report.
    """

    name: str
    version: str
    license: str
    shapes: Shapes
    preprocessing: Preprocessing
    stop_ids: tuple[int, ...]
    default_variant: str
    variants: dict[str, Variant]
    files: dict[str, FileRecord]
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    start_ids: tuple[int, ...] = ()
    prompt_version: int = PROMPT_VERSION
    format_version: int = FORMAT_VERSION
    decoding: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 160})
    training_data: tuple[dict[str, str], ...] = ()
    base_weights: tuple[dict[str, str], ...] = ()
    quality: dict[str, Any] = field(default_factory=dict)
    image_findings: ImageFindings | None = None
    reads_lateral: bool = False
    never_ids: tuple[int, ...] = ()


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
        name = name or self.manifest.default_variant
        if name not in self.manifest.variants:
            known = ", ".join(self.manifest.variants)
            raise BundleError(f"unknown variant {name[:40]!r}; {self.manifest.name} has: {known}")
        return name, self.manifest.variants[name]

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
            name
            for name in (PHRASEBOOK, TEMPLATES, WORDS, GATE, LATERAL_GATE, FILM_VIEW)
            if name in self.manifest.files
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_bundle(folder: Path | str | None = None) -> Bundle:
    """Read a bundle's manifest; :meth:`Bundle.verify` checks the files.

    Args:
        folder: the bundle; default is the embedded model.

    Raises:
        BundleError: there is no bundle, or its manifest is damaged or has an unsupported format or prompt version.
    """
    path = DEFAULT_BUNDLE if folder is None else Path(folder)
    try:
        values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"no model bundle at {path} ({MANIFEST} is missing): give the folder of an exported bundle"
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{MANIFEST} in {path} cannot be read ({type(error).__name__}): export it again") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in READABLE_FORMATS or isinstance(version, bool):
        known = " and ".join(map(str, READABLE_FORMATS))
        raise BundleError(f"{path} has bundle format {version!r}; this cbedge reads {known}: update the older one")
    try:
        manifest = _manifest(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{MANIFEST} in {path} is not valid ({error}): export it again") from None
    if manifest.prompt_version != PROMPT_VERSION:
        raise BundleError(
            f"{manifest.name} was trained with prompt version {manifest.prompt_version}, but this cbedge uses version "
            f"{PROMPT_VERSION}: update cbedge or the model"
        )
    return Bundle(path, manifest)


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
        values = asdict(manifest) | {"format_version": FORMAT_VERSION}
        values |= {"files": {p.name: asdict(_record(p)) for p in sorted(scratch.iterdir())}}
        (scratch / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
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


def _manifest(values: dict[str, Any]) -> Manifest:
    if values.get("topics") or values.get("decoding", {}).get("guidance", 1) != 1:
        raise ValueError("it uses guided decoding or topics, which cbedge no longer supports")
    known = {f.name for f in fields(Manifest)}
    values = {key: value for key, value in values.items() if key in known}
    values["shapes"] = shapes = Shapes(**values["shapes"])
    if values["format_version"] == 1:
        values["preprocessing"] = Preprocessing(image_size=shapes.image_size)
        values.pop("suffix_ids", None)
    else:
        values["preprocessing"] = Preprocessing.from_values(values["preprocessing"])
    if values["preprocessing"].image_size != shapes.image_size:
        raise ValueError(f"the image size of preprocessing is not {shapes.image_size}")
    values["files"] = {_plain(name): FileRecord(**record) for name, record in values["files"].items()}
    values["variants"] = {name: _variant(variant) for name, variant in values["variants"].items()}
    for key in ("stop_ids", "prefix_ids", "suffix_ids", "start_ids", "never_ids", "training_data", "base_weights"):
        values[key] = tuple(values.get(key, ()))
    if values.get("image_findings"):
        told = values["image_findings"]
        openings, denials = (tuple(map(str, told.get(key, ()))) for key in ("openings", "denials"))
        thresholds = tuple(map(float, told["thresholds"]))
        shares = tuple(map(float, told.get("lateral_shares", ())))
        excludes = tuple((str(one), str(other)) for one, other in told.get("excludes", CONTRARY))
        values["image_findings"] = ImageFindings(tuple(told["names"]), thresholds, openings, denials, shares, excludes)
    manifest = Manifest(**values)
    if manifest.default_variant not in manifest.variants:
        raise ValueError(f"no variant {manifest.default_variant!r}")
    return manifest


def _variant(values: dict[str, Any]) -> Variant:
    backend = values.get("backend", "onnx")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {str(backend)[:20]!r}")
    kinds = (*GRAPHS, *([ENCODER] if ENCODER in values["graphs"] else [])) if backend == "onnx" else ()
    graphs = {kind: _plain(values["graphs"][kind]) for kind in kinds}
    return Variant(values["description"], graphs, tuple(_plain(name) for name in values.get("data", ())), backend)


def _plain(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"the file name {name!r} is not a plain name")
    return name
