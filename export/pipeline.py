"""One export from top to bottom: merge, trace, quantize, compare with torch, pack."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from cbedge.backends.int8 import multiplies_exactly
from cbedge.bundles.bundle import Bundle
from cbedge.bundles.manifest import IN_INT8
from export.blockwise import ALGORITHMS, Int4Settings
from export.bundle import ModelInfo, VariantFiles, check, describe, write_packed
from export.console import Steps
from export.gptq import Rounded, can_be_rounded
from export.graphs import export_graphs
from export.merge import merge
from export.nf4 import write_nf4
from export.parity import Parity, example_pixels
from export.quantize import ALIASES, HALF, NF4, VARIANTS, round_for, write_variant
from export.tracing import HEAD, ExportError
from export.vocabulary import COMMON, domain_texts, restrict_vocabulary
from training.base import ModelAndTokenizers
from training.fetch import DEFAULT_CACHE
from training.trained import load_adapted


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how.

    Attributes:
        adapters: folders of runs, or of finished stages, in order.
        info: about the model; its ``data`` are also used for GPTQ, for the vocabulary, and to compare with torch.
        variants: names given by the user; the first is the default. ``all`` means every variant that fits.
        domain_vocabulary: keep only the tokens of the train reports and the ``common`` first merges.
        algorithm: quantization of the language model's 4-bit weights; ``None`` means GPTQ where it can run, else
            ``rtn``.
        block_size, tune: see :class:`export.quantize.Int4Settings`.
        language: a bundle whose language model is copied.
    """

    checkpoint: str
    adapters: list[Path]
    out: Path
    info: ModelInfo
    variants: list[str] = field(default_factory=lambda: ["int4"])
    domain_vocabulary: bool = False
    common: int = COMMON
    algorithm: str | None = None
    block_size: int = 32
    tune: int = 0
    language: Bundle | None = None
    cache: Path = DEFAULT_CACHE
    force: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked before the model is loaded.

        Raises:
            ValueError: an option is unknown, or needs ``data``.
        """
        _known_variants(self.variants)
        if self.algorithm not in (None, *ALGORITHMS):
            raise ValueError(f"unknown algorithm {self.algorithm!r}; give one of: {', '.join(ALGORITHMS)}")
        if self.domain_vocabulary and self.info.data is None:
            raise ValueError("--vocabulary domain takes its words from the train reports: give --data")
        if self.algorithm == "gptq" and self.info.data is None:
            raise ValueError("--algorithm gptq rounds on prompts and reports of train studies: give --data")


def export_model(settings: ExportSettings, steps: Steps) -> Parity:
    """Export one bundle; returns the comparison with torch.

    Raises:
        ValueError: the options do not fit the model or this machine.
    """
    parts = load_adapted(settings.checkpoint, settings.adapters, settings.cache)
    wanted = choose_variants(settings.variants, steps, parts.model.config.use_decoder_only_language_model)
    copied = {*settings.language.manifest.variants} if settings.language else set()
    for name in sorted(copied & {*wanted} - {"fp32", NF4, "int8", "int4"}):
        raise ExportError(f"{name}: a language model can be copied from a bundle only in int8 or int4")
    steps.done("loaded", f"{sum(p.numel() for p in parts.model.parameters()) / 1e6:,.0f} million weights")
    merge_error = merge(parts)
    int4 = _int4_settings(settings, parts)
    steps.done("merged", f"adapters; relative difference of logits {merge_error:.1e}")
    info = settings.info
    if settings.domain_vocabulary and info.data is not None:
        before, after = restrict_vocabulary(parts, domain_texts(info.data), settings.common)
        steps.done("vocabulary", f"{after:,} of {before:,} tokens kept")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.out.parent, prefix=f".{settings.out.name}.graphs.") as scratch:
        made = _write_variants(parts, wanted, int4, settings, Path(scratch), steps)
        chosen = {name: made[name] for name in wanted}
        manifest = describe(parts, chosen, info)
        parity = check(parts, made, manifest, info.data, merge_error, steps.console)
        steps.done("checked", f"{len(made)} variants against torch, {parity.cases} cases")
        write_packed(parts, manifest, chosen, settings.out, parity, info.data, settings.force)
    steps.done("packed", str(settings.out), settings.out.iterdir())
    return parity


def choose_variants(names: list[str], steps: Steps, decoder_only: bool = True) -> tuple[str, ...]:
    """The variants to write, by their full names and without repetition.

    Raises:
        ValueError: a name is unknown, or the model or this machine cannot run the variant.
    """
    wanted = _known_variants(names)
    if not decoder_only:
        half = [one for one in wanted if one in HALF]
        if half and "all" not in names:
            raise ExportError(f"{half[0]}: Flan-T5 does not fit 16-bit floats; give fp32, int8, int4 or nf4")
        wanted = [one for one in wanted if one not in half]
    if IN_INT8 in wanted and not multiplies_exactly():  # it could not be compared with torch here
        if "all" not in names:
            raise ValueError(
                f"{IN_INT8} needs an x86 processor with AVX2; or add it to a bundle with int4: export.revise --vnni"
            )
        steps.note(f"{IN_INT8} is left out: this is no x86 processor with AVX2; export.revise --vnni adds it")
        wanted = [one for one in wanted if one != IN_INT8]
    return tuple(dict.fromkeys(wanted))


def _known_variants(names: list[str]) -> list[str]:
    wanted = [one for name in names for one in (("int4", *VARIANTS) if name == "all" else (ALIASES.get(name, name),))]
    for one in wanted:
        if one not in VARIANTS:
            raise ValueError(f"unknown variant {one!r}; give one of: {', '.join(VARIANTS)}, or all")
    return wanted


def _int4_settings(settings: ExportSettings, parts: ModelAndTokenizers) -> Int4Settings:
    possible = can_be_rounded(parts.model.language_model)
    algorithm = settings.algorithm or ("gptq" if settings.info.data is not None and possible else "rtn")
    if algorithm == "gptq" and not possible:
        raise ValueError("GPTQ is for language models of the LLaMA family: give --algorithm rtn")
    if settings.tune and algorithm != "gptq":
        raise ValueError(f"--tune continues from gptq, not from {algorithm}: give --data, or no --tune")
    int4 = Int4Settings(block_size=settings.block_size, algorithm=algorithm, tune=settings.tune)
    if algorithm != "gptq":
        return int4
    return replace(int4, eight_bits=HEAD, eight_bits_block_size=64)  # 64 divides widths that 128 does not


def _write_variants(
    parts: ModelAndTokenizers,
    wanted: tuple[str, ...],
    int4: Int4Settings,
    settings: ExportSettings,
    scratch: Path,
    steps: Steps,
) -> dict[str, VariantFiles]:
    """Write the fp32 graphs, and from them each wanted variant into a folder of its own."""
    (scratch / "fp32").mkdir()
    made = {"fp32": VariantFiles(export_graphs(parts, scratch / "fp32"))}
    exact = made["fp32"].graphs
    steps.done("traced", f"{len(exact)} graphs in fp32", made["fp32"].paths)
    data, language = settings.info.data, settings.language
    copied = {*language.manifest.variants} if language else set()
    rounded: dict[str, Rounded] | None = None
    if int4.algorithm == "gptq" and data is not None and {"int4", "q4a8", "q4f16"} & {*wanted} - copied:
        rounded = round_for(parts, data, int4, lambda *progress: _report_tuning(steps, *progress))
        steps.done("rounded", f"{len(rounded)} weights by GPTQ")
    film = example_pixels(parts.preprocessing) if IN_INT8 in wanted else None
    for name in wanted:
        if name == "fp32":
            continue
        (scratch / name).mkdir()
        if name == NF4:
            made[name] = VariantFiles(others=tuple(write_nf4(parts, scratch / name)))
        else:
            source = language if name in copied else None
            made[name] = VariantFiles(write_variant(name, exact, scratch / name, int4, rounded, source, film))
        steps.done("quantized", name, made[name].paths)
    return made


def _report_tuning(steps: Steps, step: int, of: int, divergence: float) -> None:
    if step % 10 == 0 or step in (1, of):
        steps.done("tuned", f"scales, step {step} of {of}: {divergence:.4f} nats a token from fp32")
