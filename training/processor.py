"""Preprocessing settings of a checkpoint, in the files of transformers' ``InstructBlipProcessor``.

A checkpoint's ``preprocessor_config.json`` (or ``image_processor`` in its ``processor_config.json``, as transformers 5
writes it) has the settings. A checkpoint without either file has the mini model's settings. Settings without a key in
transformers are in the same file under ``cbedge``.
"""

import json
from pathlib import Path
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from cbedge.images.preprocess import RESAMPLING, Preprocessing

PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"
_OWN = "cbedge"
_OWN_SETTINGS = ("resize_dtype", "colour", "value_range")
_IMAGE_PROCESSORS = ("BlipImageProcessor", "BlipImageProcessorFast", "BlipImageProcessorPil")
_DEFAULTS = {  # BlipImageProcessor's, for missing keys
    "do_resize": True,
    "size": {"height": 384, "width": 384},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}


def load_preprocessing(base: str | Path, image_size: int) -> Preprocessing:
    """The settings of a checkpoint's image processor; the mini model's if it has none.

    Args:
        base: a checkpoint's folder or hub name.
        image_size: rows and columns of the vision encoder's input.

    Raises:
        ValueError: the settings give another image size, or are not supported.
        OSError: a file is not valid JSON or cannot be fetched.
    """
    nested = _read(base, PROCESSOR_CONFIG).get("image_processor")
    values = nested if nested is not None else _read(base, PREPROCESSOR_CONFIG)
    if not values:
        return Preprocessing(image_size=image_size)
    try:
        settings = from_image_processor(values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"the image processor's settings of {base} are not valid: {error}") from None
    except ValueError as error:
        raise ValueError(f"{base}: {error}") from None
    if settings.image_size != image_size:
        raise ValueError(
            f"{base}: the image processor gives {settings.image_size} x {settings.image_size} pixels, the vision "
            f"encoder reads {image_size} x {image_size}: correct size in {PREPROCESSOR_CONFIG}"
        )
    return settings


def from_image_processor(values: dict[str, Any]) -> Preprocessing:
    """Settings from the JSON of a ``BlipImageProcessor``.

    Raises:
        ValueError: another image processor, or an unsupported setting.
    """
    kind = values.get("image_processor_type")
    if kind is not None and kind not in _IMAGE_PROCESSORS:
        raise ValueError(f"image_processor_type {kind} is not supported; convert it to BlipImageProcessor")
    chosen = _DEFAULTS | {key: value for key, value in values.items() if key in _DEFAULTS and value is not None}
    for key in ("do_center_crop", "do_pad", "interpolate_pos_encoding"):
        if values.get(key):
            raise ValueError(f"{key} of the image processor is not supported; set it to false")
    if not chosen["do_resize"]:
        raise ValueError("do_resize of the image processor is false; set it to true, because films have all sizes")
    own = {key: value for key, value in (values.get(_OWN) or {}).items() if key in _OWN_SETTINGS}
    resample = int(chosen["resample"])
    names = {int(filter_): name for name, filter_ in RESAMPLING.items()}
    if resample not in names:
        raise ValueError(f"resample {resample} of the image processor is unknown; give 0 to {len(names) - 1}")
    return Preprocessing(
        image_size=_square(chosen["size"]),
        mean=_channels(chosen["image_mean"]) if chosen["do_normalize"] else (0.0, 0.0, 0.0),
        std=_channels(chosen["image_std"]) if chosen["do_normalize"] else (1.0, 1.0, 1.0),
        rescale_factor=float(chosen["rescale_factor"]) if chosen["do_rescale"] else 1.0,
        resample=names[resample],
        **{"resize_dtype": "uint8", "colour": "rgb", "value_range": "stored", **own},
    )


def save_preprocessing(settings: Preprocessing, num_query_tokens: int, folder: Path) -> None:
    """Write ``preprocessor_config.json`` and ``processor_config.json``, which ``InstructBlipProcessor`` can read."""
    values: dict[str, Any] = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "InstructBlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": settings.image_size, "width": settings.image_size},
        "resample": int(RESAMPLING[settings.resample]),
        "do_rescale": True,
        "rescale_factor": settings.rescale_factor,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }
    own = {key: getattr(settings, key) for key in _OWN_SETTINGS}
    if from_image_processor(values) != settings:
        values[_OWN] = own
    processor = {"processor_class": "InstructBlipProcessor", "num_query_tokens": num_query_tokens}
    for name, content in ((PREPROCESSOR_CONFIG, values), (PROCESSOR_CONFIG, processor)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read(base: str | Path, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if it has none."""
    path = cached_file(str(base), name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return {}
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{name} of {base} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise OSError(f"{name} of {base} is not a JSON object")
    return values


def _square(size: Any) -> int:
    """Rows and columns of a square ``size``, in any form that transformers accepts."""
    if isinstance(size, int):
        return size
    if isinstance(size, list | tuple):
        size = dict(zip(("height", "width"), size, strict=True))
    height, width = size.get("height"), size.get("width")
    if height is None or height != width:
        raise ValueError(f"size {size} of the image processor is not supported; give the same height and width")
    return int(height)


def _channels(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))
