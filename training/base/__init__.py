"""The model that training starts from: one of :data:`BASES`, or an InstructBLIP checkpoint.

To add a base model, write a module beside this one that makes a :class:`~training.base.parts.Base`, and add an entry to
:data:`BASES`.
"""

import inspect
from pathlib import Path
from typing import Any

from training.base.checkpoint import load_checkpoint
from training.base.mini import MINI
from training.base.parts import Base, FindingHead, ModelAndTokenizers, load_finding_head, save_finding_head

BASES: dict[str, Base] = {"mini": MINI}


def load_model(
    base: str, cache: Path, precision: str = "fp32", image_side: bool = False, **options: Any
) -> ModelAndTokenizers:
    """Load the model that a configuration names.

    Args:
        base: one of :data:`BASES`, a checkpoint folder, or a hub name such as ``Salesforce/instructblip-vicuna-7b``.
        cache: folder of the downloaded weights of :data:`BASES`.
        precision: of a checkpoint's weights, see :func:`~training.base.checkpoint.load_checkpoint`.
        image_side: load only a part of the language model, for work on the image side alone.
        options: ``base_options`` of the configuration, for one of :data:`BASES`.

    Raises:
        FileNotFoundError: weights are not in ``cache`` and cannot be downloaded.
        OSError: the folder or hub name holds no InstructBLIP checkpoint.
        ValueError: an option is unknown, or a checkpoint's preprocessing is not supported.
        ImportError: ``nf4`` without bitsandbytes.
    """
    if base not in BASES:
        return load_checkpoint(base, precision, image_side)
    known = [name for name in inspect.signature(BASES[base].assemble).parameters if name != "cache"]
    for name in options.keys() - {*known}:
        raise ValueError(f"base_options of {base}: unknown option {name!r}; known: {', '.join(known)}")
    return BASES[base].assemble(cache, **({**BASES[base].image_side, **options} if image_side else options))


__all__ = [
    "BASES",
    "Base",
    "FindingHead",
    "ModelAndTokenizers",
    "load_finding_head",
    "load_model",
    "save_finding_head",
]
