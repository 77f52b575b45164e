"""What ``manifest.json`` says about a model: its dataclasses, and reading formats 1 and 2 with validation."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cbedge.errors import BundleError
from cbedge.findings.image_findings import ImageFindings
from cbedge.images.preprocess import Preprocessing
from cbedge.prompt import PROMPT_VERSION

FORMAT_VERSION = 2
READABLE_FORMATS = (1, 2)  # format 1 implies the default preprocessing and no suffix_ids
MANIFEST = "manifest.json"
GRAPHS = ("vision_encoder", "qformer", "embed_tokens", "decoder_model_merged")
FOR_GPUS = ("q4f16", "fp16")  # variants for GPUs, best first
IN_INT8 = "q4a8"  # the variant that reads int4's weights and multiplies in 8-bit integers
ENCODER = "encoder_model"  # additional graph of an encoder-decoder language model (Flan-T5)
BACKENDS = ("onnx", "torch_nf4")


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

    def to_json(self) -> str:
        """The content of ``manifest.json``, always in the newest format."""
        return json.dumps(asdict(self) | {"format_version": FORMAT_VERSION}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the bundle in ``folder``.

    Raises:
        BundleError: there is no bundle, or its manifest is damaged or has an unsupported format or prompt version.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"no model bundle at {folder} ({MANIFEST} is missing): give the folder of an exported bundle"
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{MANIFEST} in {folder} cannot be read ({type(error).__name__}): export it again") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in READABLE_FORMATS or isinstance(version, bool):
        known = " and ".join(map(str, READABLE_FORMATS))
        raise BundleError(f"{folder} has bundle format {version!r}; this cbedge reads {known}: update the older one")
    try:
        manifest = _manifest(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{MANIFEST} in {folder} is not valid ({error}): export it again") from None
    if manifest.prompt_version != PROMPT_VERSION:
        raise BundleError(
            f"{manifest.name} was trained with prompt version {manifest.prompt_version}, but this cbedge uses version "
            f"{PROMPT_VERSION}: update cbedge or the model"
        )
    return manifest


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
        values["image_findings"] = ImageFindings.from_json(values["image_findings"])
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
