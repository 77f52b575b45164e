import io

import numpy as np
import pytest
from conftest import draw_chest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbedge import RadiographError, load_radiograph

CHEST = draw_chest(1)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour_files_of_every_format_give_the_same_picture(kind: str, mode: str):
    radiograph = load_radiograph(encoded(Image.fromarray(CHEST).convert(mode), kind))
    assert radiograph.pixels.dtype == np.float32 and radiograph.pixels.shape == CHEST.shape
    assert np.abs(radiograph.pixels - CHEST / 255).mean() < 0.02


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [12, 16])
def test_sixteen_bit_files_are_stretched_by_their_own_range(kind: str, bits: int):
    deep = (CHEST.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)
    pixels = load_radiograph(encoded(Image.fromarray(deep), kind)).pixels
    assert pixels.min() == 0 and pixels.max() == 1
    assert np.corrcoef(pixels.ravel(), CHEST.ravel())[0, 1] > 0.999


def test_transparent_palette_and_one_bit_images_are_read():
    image = Image.fromarray(CHEST)
    rgba = image.convert("RGBA")
    assert load_radiograph(encoded(rgba, "PNG")).pixels.shape == CHEST.shape
    assert load_radiograph(encoded(image.convert("P"), "PNG")).pixels.std() > 0.05
    assert load_radiograph(encoded(image.convert("1"), "PNG")).pixels.max() == 1


def test_path_bytes_image_and_array_agree(chest_png):
    by_path = load_radiograph(chest_png)
    by_bytes = load_radiograph(chest_png.read_bytes())
    image = Image.open(chest_png)
    assert by_path.sha256 == by_bytes.sha256
    for other in (by_bytes, load_radiograph(image), load_radiograph(np.asarray(image))):
        assert np.allclose(by_path.pixels, other.pixels)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes"),
        (b"not an image at all", "not an image"),
        (encoded(Image.fromarray(CHEST), "PNG")[:5000], "damaged or cut short"),
        (encoded(Image.fromarray(CHEST), "JPEG")[:3000], "damaged or cut short"),
        (encoded(Image.fromarray(np.full((64, 64), 7, np.uint8)), "PNG"), "blank"),
        (encoded(Image.fromarray(CHEST[:8, :8]), "PNG"), "too few"),
    ],
)  # fmt: skip
def test_unusable_files_are_named(data: bytes, told: str):
    with pytest.raises(RadiographError, match=told):
        load_radiograph(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("L", (20_000, 20_000)), "PNG")
    assert len(bomb) < 500_000
    with pytest.raises(RadiographError, match="at most 100,000,000"):
        load_radiograph(bomb)


def test_several_frames_are_refused():
    image = Image.fromarray(CHEST)
    data = encoded(image, "TIFF", save_all=True, append_images=[image])
    with pytest.raises(RadiographError, match="2 frames"):
        load_radiograph(data)


@pytest.mark.parametrize(
    "array",
    [np.zeros((64, 64, 2), np.uint8), np.zeros(64, np.uint8), np.zeros((64, 64), np.int64), np.full((64, 64), np.nan)],
)
def test_arrays_that_mean_nothing_are_refused(array: np.ndarray):
    with pytest.raises(RadiographError):
        load_radiograph(array)


@given(st.binary(max_size=400))
def test_random_bytes_never_raise_anything_else(data: bytes):
    with pytest.raises(RadiographError):
        load_radiograph(data)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(["PNG", "JPEG", "TIFF"]))
def test_damaged_files_are_read_or_refused_but_never_crash(data: st.DataObject, kind: str):
    whole = bytearray(encoded(Image.fromarray(CHEST), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = load_radiograph(bytes(whole), max_pixels=1_000_000).pixels
    except RadiographError:
        return
    assert np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1
