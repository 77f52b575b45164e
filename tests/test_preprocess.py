import importlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cbedge import BundleError, ReportGenerator, open_bundle
from cbedge.images.preprocess import Preprocessing, preprocess
from cbedge.images.radiograph import load_radiograph
from tests.conftest import DEFAULT_BUNDLE, EXAMPLES, needs_default_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def format_1_pixels(pixels: np.ndarray) -> np.ndarray:
    """What bundles of format 1 were given: 224 x 224, bicubic in floats, ImageNet's mean and deviation."""
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.float32))
    if image.size != (224, 224):
        image = image.resize((224, 224), Image.Resampling.BICUBIC)
    grey = np.clip(np.asarray(image, dtype=np.float32), 0.0, 1.0)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return ((grey[None] - mean) / std)[None]


@given(st.integers(32, 300), st.integers(32, 300), st.integers(0, 9))
def test_default_settings_give_the_values_of_format_1_bit_for_bit(rows: int, columns: int, seed: int):
    pixels = np.random.default_rng(seed).random((rows, columns)).astype(np.float32)
    values = preprocess(pixels, Preprocessing())
    assert values.shape == (1, 3, 224, 224) and values.dtype == np.float32
    assert np.array_equal(values, format_1_pixels(pixels))


@needs_default_model
@pytest.mark.parametrize("name", ["chest_pa.png", "chest_pa.dcm"])
def test_the_embedded_model_sees_the_values_of_format_1_bit_for_bit(name: str):
    manifest = open_bundle(DEFAULT_BUNDLE).manifest
    pixels = load_radiograph(EXAMPLES / name).pixels
    assert manifest.format_version == 2
    assert np.array_equal(preprocess(pixels, manifest.preprocessing), format_1_pixels(pixels))


def test_a_format_1_bundle_opens_and_drafts_the_same(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    old = Path(shutil.copytree(tiny_bundle, tmp_path / "old"))
    path = old / "manifest.json"
    values = json.loads(path.read_text())
    del values["preprocessing"], values["suffix_ids"]
    path.write_text(json.dumps(values | {"format_version": 1}))
    assert open_bundle(old).manifest.preprocessing == Preprocessing()
    drafts = [
        ReportGenerator.from_pretrained(bundle, "fp32", "cpu").generate(
            chest_png, indication="cough", accept_any_image=True, max_new_tokens=24
        )
        for bundle in (tiny_bundle, old)
    ]
    assert drafts[0].text == drafts[1].text and drafts[0].finding_scores == drafts[1].finding_scores


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 336}, "image size of preprocessing is not"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0, 1, 1]}, "std"),
        ({"resample": "wavelet"}, "wavelet"),
        ({"resize_mode": "crop"}, "crop"),
        ({"colour": "rgb"}, "value_range"),
        ({"gamma": 2}, "gamma"),
    ],
)
def test_settings_that_cannot_be_used_are_named(tiny_bundle: Path, tmp_path: Path, change: dict, named: str):
    copy = tmp_path / "bundle"
    copy.mkdir()
    values = json.loads((tiny_bundle / "manifest.json").read_text())
    values["preprocessing"] |= change
    (copy / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=named):
        open_bundle(copy)


def test_settings_come_back_from_json():
    settings = Preprocessing(336, resample="lanczos", resize_dtype="uint8", colour="rgb", value_range="stored")
    assert Preprocessing.from_values(json.loads(json.dumps(asdict(settings)))) == settings


def test_left_stays_left():
    pixels = np.zeros((100, 100), np.float32)
    pixels[:, 60:] = 1
    values = preprocess(pixels, Preprocessing())[0, 0]
    assert values[:, 200:].mean() > values[:, :20].mean()


def test_the_former_names_still_work_and_warn():
    radiograph = importlib.import_module("cbedge.radiograph")
    for name, value in (("IMAGE_SIZE", 224), ("IMAGE_MEAN", MEAN), ("IMAGE_STD", STD)):
        with pytest.warns(DeprecationWarning, match=name):
            assert getattr(radiograph, name) == value
    pixels = np.random.default_rng(0).random((50, 60)).astype(np.float32)
    with pytest.warns(DeprecationWarning, match="preprocess"):
        assert np.array_equal(radiograph.preprocess(pixels), format_1_pixels(pixels))


def test_every_setting_changes_the_values():
    pixels = np.random.default_rng(0).random((64, 48)).astype(np.float32)
    plain = Preprocessing(image_size=32)
    before = preprocess(pixels, plain)
    changes = (
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (1.0, 1.0, 1.0)},
        {"rescale_factor": 1 / 127.5},
        {"resample": "nearest"},
        {"resize_dtype": "uint8"},
    )
    for change in changes:
        assert not np.array_equal(preprocess(pixels, replace(plain, **change)), before), change
