"""A checkpoint's image processor and special tokens are taken over as transformers has them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_chest
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from cbedge.images.preprocess import Preprocessing, preprocess_radiograph
from cbedge.images.radiograph import load_radiograph
from training.base import load_model
from training.batches import load_pixels
from training.processor import PREPROCESSOR_CONFIG, from_image_processor, load_preprocessing, save_preprocessing

# As Salesforce/instructblip-vicuna-7b has it.
RELEASED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "BlipImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "InstructBlipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


def film(mode: str, kind: str, rows: int, columns: int) -> bytes:
    """A drawn film of the full range 0..255 as a file; in RGB with colours, in ``grey RGB`` without."""
    plane = draw_chest(1, rows, columns).astype(float)
    plane = np.uint8(255 * (plane - plane.min()) / (plane.max() - plane.min()))
    image = Image.fromarray(plane)
    if mode == "grey RGB":
        image = image.convert("RGB")
    elif mode == "RGB":
        image = Image.fromarray(np.stack([plane, plane // 2, 255 - plane], axis=2))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": {"height": 336, "width": 336}},
        {"size": 96, "resample": 2},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "grey RGB"])
@pytest.mark.parametrize(("kind", "rows", "columns"), [("PNG", 240, 200), ("JPEG", 150, 401), ("PNG", 224, 224)])
def test_pixel_values_are_those_of_transformers(mode: str, kind: str, rows: int, columns: int, change: dict):
    values, data = RELEASED | change, film(mode, kind, rows, columns)
    theirs = BlipImageProcessorPil.from_dict(dict(values))(Image.open(io.BytesIO(data)), return_tensors="np")
    settings = from_image_processor(values)
    ours = preprocess_radiograph(load_radiograph(data), settings)
    tolerance = 1 if change == {"do_rescale": False} else 1 / 255
    assert ours.shape == theirs["pixel_values"].shape
    assert np.abs(ours - theirs["pixel_values"]).max() < 0.01 * tolerance


@pytest.mark.parametrize("colour", [False, True])
def test_a_stored_range_and_colours_reach_only_a_model_that_asks_for_them(colour: bool):
    half = draw_chest(0) // 2  # half of the range of 8 bits
    dark = Image.fromarray(np.stack([half, half, draw_chest(1)], axis=2) if colour else half)
    file = io.BytesIO()
    dark.save(file, "PNG")
    radiograph = load_radiograph(file.getvalue())
    released = preprocess_radiograph(radiograph, from_image_processor(RELEASED))
    theirs = BlipImageProcessorPil.from_dict(dict(RELEASED))(dark, return_tensors="np")["pixel_values"]
    assert np.abs(released - theirs).max() < 1e-4
    mini = preprocess_radiograph(radiograph, Preprocessing(mean=(0, 0, 0), std=(1, 1, 1)))
    assert np.array_equal(mini[0, 0], mini[0, 1]) and np.array_equal(mini[0, 1], mini[0, 2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"shortest_edge": 224}}, "shortest_edge"),
        ({"size": {"height": 224, "width": 336}}, "336"),
        ({"resample": 17}, "resample 17"),
        ({"size": {"height": 384, "width": 384}}, "384 x 384"),
        ({"image_std": [0, 0, 0]}, "std"),
    ],
)
def test_settings_that_are_not_supported_are_named(tmp_path: Path, change: dict, named: str):
    (tmp_path / PREPROCESSOR_CONFIG).write_text(json.dumps(RELEASED | change))
    with pytest.raises(ValueError, match=named):
        load_preprocessing(tmp_path, 224)


def test_a_damaged_file_is_an_error_and_a_missing_one_gives_the_mini_models_settings(tmp_path: Path):
    assert load_preprocessing(tmp_path, 336) == Preprocessing(image_size=336)
    (tmp_path / PREPROCESSOR_CONFIG).write_text("{")
    with pytest.raises(OSError, match="not valid JSON"):
        load_preprocessing(tmp_path, 224)


@pytest.mark.parametrize(
    "settings",
    [Preprocessing(), from_image_processor(RELEASED), replace(Preprocessing(), image_size=336, resample="lanczos")],
)
def test_settings_are_saved_with_a_checkpoint_in_transformers_form(tmp_path: Path, settings: Preprocessing):
    save_preprocessing(settings, 32, tmp_path)
    assert load_preprocessing(tmp_path, settings.image_size) == settings
    theirs = BlipImageProcessorPil.from_pretrained(tmp_path)
    assert tuple(theirs.image_mean) == settings.mean and theirs.size.height == settings.image_size


def test_a_trained_model_keeps_its_settings(tiny_checkpoint: Path, tmp_path: Path, chest_png: Path):
    parts = load_model(str(tiny_checkpoint), tmp_path)
    assert parts.preprocessing == Preprocessing()
    parts.preprocessing = from_image_processor(RELEASED)
    parts.save(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), tmp_path)
    assert again.preprocessing == parts.preprocessing
    plain, seen = (load_pixels(chest_png, p) for p in (Preprocessing(), again.preprocessing))
    assert plain.shape == seen.shape and not np.allclose(plain, seen, atol=0.01)
    rng = np.random.default_rng(0)
    assert load_pixels(chest_png, again.preprocessing, rng).dtype == np.float32
