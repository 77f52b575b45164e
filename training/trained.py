"""Load a run: its base model, and the parts and adapters that its stages trained."""

import json
from pathlib import Path

from peft import PeftModel

from training.base import ModelAndTokenizers, load_finding_head, load_model
from training.parallel import choose_device
from training.processor import PREPROCESSOR_CONFIG, load_preprocessing
from training.stages import load_trained


def stage_folders(folder: Path) -> list[Path]:
    """The finished stages of a run, in order; or the folder itself if it is one finished stage.

    Raises:
        FileNotFoundError: the folder is neither, or a stage of the run is not finished.
    """
    folder = Path(folder)
    if (folder / "finished").is_file():
        return [folder]
    try:
        stages = json.loads((folder / "config.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError):
        raise FileNotFoundError(f"{folder} is neither a run nor a finished stage of one") from None
    for stage in stages:
        if not (folder / stage["name"] / "finished").is_file():
            raise FileNotFoundError(f"stage {stage['name']} of {folder} is not finished: resume the run")
    return [folder / stage["name"] for stage in stages]


def checkpoint_of(folder: Path) -> str:
    """The base model of a run, or of one stage of it: the folder ``base/`` if it was assembled, else the checkpoint of
    its configuration.

    Raises:
        FileNotFoundError: the folder is neither.
    """
    for place in (Path(folder), Path(folder).parent):
        if (place / "base").is_dir():
            return str(place / "base")
        if (place / "config.json").is_file():
            return json.loads((place / "config.json").read_text(encoding="utf-8"))["base"]
    raise FileNotFoundError(f"{folder} is neither a run nor a stage of one")


def load_adapted(checkpoint: str, adapters: list[Path], cache: Path, image_side: bool = False) -> ModelAndTokenizers:
    """Load a checkpoint with the trained parts and adapters of stages; adapters are not merged.

    Args:
        checkpoint: an InstructBLIP folder or hub name, or one of :data:`training.base.BASES`.
        adapters: folders of finished stages, in order; the folder of a run means all of its stages.
        image_side: load only a part of the language model, without adapters; a large one may not fit into memory.

    Raises:
        FileNotFoundError: a folder has no finished stage.
        ValueError: a stage does not fit the checkpoint.
    """
    stages = [stage for folder in adapters for stage in stage_folders(folder)]
    parts = load_model(checkpoint, cache, image_side=image_side)
    for stage in stages:
        load_trained(parts.model, stage, ("vision",) if image_side else ("vision", "language"))
        parts.finding_head = load_finding_head(stage)
        if (stage / PREPROCESSOR_CONFIG).is_file():
            parts.preprocessing = load_preprocessing(stage, parts.model.config.vision_config.image_size)
    parts.model.eval()
    return parts


def load_merged(folder: Path, cache: Path, device: str) -> ModelAndTokenizers:
    """Load a run, or one stage of it, with merged adapters on a device.

    Raises:
        FileNotFoundError, ValueError: as :func:`checkpoint_of` and :func:`load_adapted`.
        RuntimeError: CUDA was requested and is not available.
    """
    parts = load_adapted(checkpoint_of(folder), [folder], cache)
    merge_adapters(parts)
    parts.model.to(choose_device(device))
    return parts


def merge_adapters(parts: ModelAndTokenizers) -> None:
    """Merge all adapters into the weights, in place; the result is a plain transformers model."""
    for name in ("vision_model", "language_model"):
        part = getattr(parts.model, name)
        if isinstance(part, PeftModel):
            setattr(parts.model, name, part.merge_and_unload())
