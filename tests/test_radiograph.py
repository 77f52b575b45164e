import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_chest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from cbedge import RadiographError, load_radiograph
from cbedge.images.intensity import stretch

CHEST = draw_chest(1)
STRETCHED = stretch(CHEST)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour_files_of_every_format_give_the_same_picture(kind: str, mode: str):
    radiograph = load_radiograph(encoded(Image.fromarray(CHEST).convert(mode), kind, quality=95))
    assert radiograph.pixels.dtype == np.float32 and radiograph.pixels.shape == CHEST.shape
    assert np.abs(radiograph.pixels - STRETCHED).mean() < 0.02


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
        (b"not an image at all", "not a supported image"),
        (encoded(Image.fromarray(CHEST), "PNG")[:5000], "damaged or truncated"),
        (encoded(Image.fromarray(CHEST), "JPEG")[:3000], "damaged or truncated"),
        (encoded(Image.fromarray(CHEST), "JPEG")[:-2], "damaged or truncated"),  # without its end-of-image marker
        (encoded(Image.fromarray(np.full((64, 64), 7, np.uint8)), "PNG"), "blank"),
        (encoded(Image.fromarray(CHEST[:8, :8]), "PNG"), "the minimum is 32 x 32"),
    ],
)
def test_unusable_files_are_named(data: bytes, told: str):
    with pytest.raises(RadiographError, match=told):
        load_radiograph(data)


def test_a_folder_without_a_name_of_its_own_is_named():
    with pytest.raises(RadiographError, match=r"^\. is a folder"):
        load_radiograph(".")


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = encoded(Image.new("L", (20_000, 20_000)), "PNG")
    assert len(bomb) < 500_000
    with pytest.raises(RadiographError, match="the limit is 64,000,000"):
        load_radiograph(bomb)


def test_several_frames_are_refused():
    image = Image.fromarray(CHEST)
    data = encoded(image, "TIFF", save_all=True, append_images=[image])
    with pytest.raises(RadiographError, match="2 frames"):
        load_radiograph(data)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 4, 0), (1, 0, 1)])
@pytest.mark.parametrize(("byteorder", "bigtiff"), [("<", False), (">", False), ("<", True)])  # those Pillow reads
def test_thumbnails_and_masks_in_a_tiff_are_no_frames(order: tuple[int, ...], byteorder: str, bigtiff: bool):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=byteorder, bigtiff=bigtiff) as writer:
        for kind in order:
            page = CHEST[::4, ::4] > 100 if kind == 4 else 255 - CHEST[::4, ::4] if kind else CHEST
            writer.write(page, subfiletype=kind, photometric="minisblack")
    assert np.array_equal(load_radiograph(file.getvalue()).pixels, STRETCHED)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((64, 64, 2), np.uint8),
        np.zeros(64, np.uint8),
        np.zeros((64, 64), np.int64),
        np.full((64, 64), np.nan),
        np.full((64, 64), "x"),
        np.ones((64, 64), complex),
        CHEST * 1.5,
    ],
)
def test_arrays_that_mean_nothing_are_refused(array: np.ndarray):
    with pytest.raises(RadiographError):
        load_radiograph(array)


@pytest.mark.parametrize("values", [CHEST, CHEST.astype(np.int32) * 9000, CHEST / 255, CHEST.astype(np.uint16) * 256])
def test_the_largest_films_are_averaged(values: np.ndarray):
    odd = values[:239, :199]
    small = stretch(odd, factor=2)
    assert small.shape == (120, 100) and small.dtype == np.float32
    whole = stretch(odd)
    assert np.allclose(small[:119, :99], whole[:238, :198].reshape(119, 2, 99, 2).mean((1, 3)), atol=1e-6)
    assert np.allclose(small[119, :99], whole[238, :198].reshape(99, 2).mean(1), atol=1e-6)


@pytest.mark.parametrize("values", [CHEST, CHEST.astype(np.int32) * 9000, CHEST / 255])
def test_what_is_not_counted_is_dark_and_no_part_of_the_range(values: np.ndarray):
    counted = np.ones(values.shape, bool)
    counted[:40] = False
    marked = values.copy()
    marked[:40] = values.max() * 2
    for inverted in (False, True):
        film = stretch(marked, counted, transform=lambda v: 3 * v + 1, inverted=inverted)
        wanted = stretch(values[40:], inverted=inverted)
        assert (film[:40] == 0).all() and np.abs(film[40:] - wanted).max() < 1e-5


def test_one_saturated_pixel_changes_nothing_else():
    hot = CHEST.astype(np.uint16) * 16
    hot[5, 5] = 65535
    assert np.abs(load_radiograph(hot).pixels - STRETCHED)[10:].max() < 0.01


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "offset", "share"),
    [
        ("u8", 2**63, 1),
        ("u8", 2**60, 1),
        (">u8", 2**63, 2**30),
        ("i8", -(2**63), 1),
        ("i8", 2**62, 1),
        ("u4", 3 * 10**9, 1),
    ],
)
@pytest.mark.parametrize("tint", [0, 1])
def test_integers_far_from_zero_give_the_same_picture(planes: int, dtype: str, offset: int, share: int, tint: int):
    native = np.dtype(dtype).newbyteorder("=")
    values = (CHEST.astype(native) * share + np.array(offset, native)).astype(dtype)
    if planes == 3:
        values = np.stack([values] * 3, -1)
        values[0, 0, 0] += tint  # a single pixel in colour
    assert np.abs(load_radiograph(values).pixels - STRETCHED).max() < 0.005


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_orientation_tag_is_obeyed_as_in_every_viewer(orientation: int, kind: str):
    stored_as = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    image = Image.fromarray(CHEST)
    if orientation > 1:
        image = image.transpose(getattr(Image.Transpose, stored_as[orientation]))
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(image, kind, exif=exif, **({"quality": 95} if kind != "TIFF" else {}))
    assert np.abs(load_radiograph(data).pixels - STRETCHED).mean() < 0.02
    assert np.abs(load_radiograph(Image.open(io.BytesIO(data))).pixels - STRETCHED).mean() < 0.02


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "Raw profile type exif", "Raw profile type APP1"])
def test_an_orientation_tag_of_another_type_or_place_is_obeyed(kind: str):
    turned = Image.fromarray(CHEST[::-1, ::-1])
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHLLL", 1, 0x112, 1, 1, 3, 0)  # of type BYTE
    if kind.startswith("Raw"):
        info, digits = PngInfo(), exif.hex()
        info.add_text(kind, f"\nexif\n{len(exif):8}\n{digits[:72]}\n{digits[72:]}\n", zip=True)
        data = encoded(turned, "PNG", pnginfo=info)
    else:
        data = encoded(turned, kind, exif=exif, quality=95)
    assert np.abs(load_radiograph(data).pixels - STRETCHED).mean() < 0.02


def _profile(curve: bytes, space: bytes = b"GRAY", tag: bytes = b"kTRC", connection: bytes = b"XYZ ") -> bytes:
    header = bytearray(128)
    header[8:12], header[12:24], header[36:40] = b"\2\x10\0\0", b"mntr" + space + connection, b"acsp"
    header[68:80] = struct.pack(">3l", 63190, 65536, 54061)
    description = b"desc\0\0\0\0" + struct.pack(">L", 6) + b"Films\0" + bytes(78)
    content = bytes(header) + struct.pack(">L4sLL4sLL", 2, tag, 156, len(curve), b"desc", 156 + len(curve), 96)
    content += curve + description
    return struct.pack(">L", len(content)) + content[4:]


_GAMMA_ONE = b"curv\0\0\0\0\0\0\0\0"
_SRGB_NUMBERS = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _parameters(kind: int, *numbers: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(f">HH{len(numbers)}l", kind, 0, *(round(65536 * n) for n in numbers))


def _with_gamma(png: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    made = [struct.pack(">L", len(d)) + k + d + struct.pack(">L", zlib.crc32(k + d)) for k, d in chunks]
    return png[:33] + b"".join(made) + png[33:]


@pytest.mark.parametrize(
    ("light", "profile"),
    [
        (2.2, _profile(_GAMMA_ONE)),
        (2.2, _profile(_GAMMA_ONE, b"RGB ", b"gTRC")),
        (2.2, _profile(b"curv\0\0\0\0\0\0\0\2\0\0\xff\xff")),
        (2.2, _profile(_parameters(0, 1.0))),
        (2.2 / 1.8, _profile(b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(1.8 * 256)))),
        (2.2 / 1.8, _profile(_parameters(1, 1.8, 1.0, 0.0))),
        (2.2 / 1.8, _profile(_parameters(2, 1.8, 1.0, 0.0, 0.0))),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "white is zero", "image"])
def test_values_by_a_profile_are_shown_as_in_every_viewer(light: float, profile: bytes, kind: str):
    linear = (CHEST / 255) ** light
    if kind in ("JPEG", "WEBP"):
        data = encoded(Image.fromarray(np.rint(linear * 255).astype(np.uint8)), kind, quality=100, icc_profile=profile)
    else:
        linear = 1 - linear if kind == "white is zero" else linear
        image = Image.fromarray(np.rint(linear * 65535).astype(np.uint16))
        tags = {262: 0} if kind == "white is zero" else {}
        data = encoded(image, "PNG" if kind == "PNG" else "TIFF", icc_profile=profile, tiffinfo=tags)
    radiograph = load_radiograph(Image.open(io.BytesIO(data)) if kind == "image" else data)
    assert np.abs(radiograph.pixels - STRETCHED).mean() < (0.02 if kind in ("JPEG", "WEBP") else 0.002)
    assert radiograph.warnings == ()


@pytest.mark.parametrize(("gamma", "light"), [(100000, 2.2), (55556, 2.2 / 1.8), (45455, 1.0)])
def test_the_gamma_of_a_png_is_obeyed(gamma: int, light: float):
    png = encoded(Image.fromarray(np.rint((CHEST / 255) ** light * 65535).astype(np.uint16)), "PNG")
    stated = (b"gAMA", struct.pack(">L", gamma))
    assert np.abs(load_radiograph(_with_gamma(png, stated)).pixels - STRETCHED).max() < 0.01
    # A statement of sRGB takes precedence.
    srgb = load_radiograph(_with_gamma(png, stated, (b"sRGB", b"\0")))
    assert np.array_equal(srgb.pixels, load_radiograph(png).pixels)


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        _profile(_parameters(3, *_SRGB_NUMBERS)),
        _profile(_parameters(4, *_SRGB_NUMBERS, 0.0, 0.0), b"RGB ", b"gTRC"),
        _profile(b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(2.2 * 256))),
    ],
)
def test_usual_profiles_change_no_bit(profile: bytes):
    plain, stated = (load_radiograph(encoded(Image.fromarray(CHEST), "PNG", icc_profile=p)) for p in (None, profile))
    assert np.array_equal(plain.pixels, stated.pixels) and stated.warnings == ()


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        (_profile(_GAMMA_ONE, tag=b"xTRC"), "Films"),
        (_profile(_GAMMA_ONE, connection=b"Lab "), "Films"),
        (_profile(b"curv\0\0\0\0\0\0\0\1\0\0"), "Films"),
        (_profile(_parameters(9, 1.0)), "Films"),
        (b"no profile", "without a name"),
    ],
)
def test_a_profile_that_cannot_be_applied_is_named(profile: bytes, name: str):
    plain, stated = (load_radiograph(encoded(Image.fromarray(CHEST), "PNG", icc_profile=p)) for p in (None, profile))
    assert np.array_equal(plain.pixels, stated.pixels)
    assert len(stated.warnings) == 1 and f"colour profile {name} could not be applied" in stated.warnings[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_that_does_not_say_whether_zero_is_black_is_refused(dtype: type):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, CHEST.astype(dtype), photometric="minisblack")
    without = file.getvalue().replace(struct.pack("<HHL", 262, 3, 1), struct.pack("<HHL", 263, 3, 1))
    with pytest.raises(RadiographError, match="lacks the TIFF tag PhotometricInterpretation"):
        load_radiograph(without)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_with_white_as_zero_is_inverted_once(dtype: type, tmp_path: Path):
    tifffile = pytest.importorskip("tifffile")
    most = np.iinfo(dtype).max
    inverted = (most - CHEST.astype(np.float64) * (most // 255)).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", inverted, photometric="miniswhite")
    assert np.abs(load_radiograph(tmp_path / "x.tif").pixels - STRETCHED).max() < 0.01


@pytest.mark.parametrize(
    "values",
    [
        (CHEST.astype(np.int16) - 128).astype(np.int8),
        CHEST.astype(np.int16) * 100 - 12000,
        CHEST.astype(np.uint32) * 16843009,
        CHEST.astype(np.int32) * 5000 - 600000,
        CHEST.astype(np.float32),
    ],
)
def test_a_tiff_of_any_sample_format_gives_the_same_picture(values: np.ndarray):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack")
    assert np.abs(load_radiograph(file.getvalue()).pixels - STRETCHED).max() < 0.01


def test_modes_that_pillow_cannot_convert_are_read_or_named():
    grey = Image.fromarray(CHEST)
    premultiplied = grey.convert("LA").convert("La")
    assert np.abs(load_radiograph(premultiplied).pixels - STRETCHED).max() < 0.01
    lab = Image.merge("LAB", [grey, grey, grey])
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, CHEST, photometric="miniswhite", extratags=[(65000, "H", 1, 2, True)])
    reversed_bits = file.getvalue().replace(struct.pack("<H", 65000), struct.pack("<H", 266))  # FillOrder 2
    for source in (lab, encoded(lab, "TIFF"), reversed_bits):
        with pytest.raises(RadiographError, match=r"has the unsupported pixel type \w+; save it as 8 or 16 bit grey"):
            load_radiograph(source)


def test_a_tiff_of_samples_that_are_not_read_is_not_called_damaged_alone():
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, CHEST.astype(np.float64), photometric="minisblack")
    with pytest.raises(RadiographError, match="unsupported pixel type; save it as 8 or 16 bit greyscale PNG"):
        load_radiograph(file.getvalue())


def test_the_preview_of_a_camera_file_is_passed_over():
    image = Image.fromarray(CHEST).convert("RGB")
    data = encoded(image, "MPO", save_all=True, append_images=[image.resize((80, 96))])
    assert load_radiograph(data).pixels.shape == CHEST.shape


@pytest.mark.parametrize(
    "array",
    [
        CHEST.astype(">u2") * 100,
        CHEST.astype(np.int16) - 128,
        CHEST.astype(np.int32) * 5000,
        CHEST.astype(np.int64),
        CHEST.astype(np.uint32),
        CHEST / 255,
        (CHEST / 255).astype(np.float16),
        CHEST[..., None],
        np.repeat(CHEST[..., None], 3, 2),
        np.asfortranarray(CHEST),
        (CHEST.astype(np.int16) - 128).astype(np.int8),
    ],
)
def test_arrays_of_every_type_give_the_same_picture(array: np.ndarray):
    array.setflags(write=False)
    assert np.abs(load_radiograph(array).pixels - STRETCHED).max() < 0.01


def test_file_objects_and_path_like_objects_are_read(chest_png: Path):
    class Named(os.PathLike):
        def __fspath__(self) -> str:
            return str(chest_png)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 1000))

    wanted = load_radiograph(chest_png)
    with open(chest_png, "rb") as file:
        sources = [Named(), io.BytesIO(chest_png.read_bytes()), Slow(chest_png.read_bytes()), file]
        for source in sources:
            assert load_radiograph(source).sha256 == wanted.sha256
    with pytest.raises(RadiographError, match="binary mode"):
        load_radiograph(io.StringIO("text"))
    with pytest.raises(RadiographError, match="NoneType"):
        load_radiograph(None)


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


def _png(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits, which Pillow cannot write in several channels: uint16 [rows, columns, channels]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("channels", "colour_type"), [(3, 2), (2, 4), (4, 6)])
def test_an_image_that_would_lose_its_low_bits_is_refused(channels: int, colour_type: int, tmp_path: Path):
    values = np.repeat(16 * draw_chest(0).astype(np.uint16)[..., None], channels, axis=2)
    with pytest.raises(RadiographError, match="several channels of more than 8 bits; save it as 16 bit greyscale"):
        load_radiograph(_png(values, colour_type))
    grey = load_radiograph(_png(values[..., :1], 0))
    assert np.abs(grey.pixels - load_radiograph(values[..., 0]).pixels).max() < 1e-6


def test_a_tiff_of_sixteen_bits_in_colour_is_refused(tmp_path: Path):
    tifffile = pytest.importorskip("tifffile")
    values = np.repeat(16 * draw_chest(0).astype(np.uint16)[..., None], 3, axis=2)
    for planes in ("contig", "separate"):
        written = values if planes == "contig" else np.moveaxis(values, 2, 0)
        tifffile.imwrite(tmp_path / "film.tif", written, photometric="rgb", planarconfig=planes)
        with pytest.raises(RadiographError, match="bit"):
            load_radiograph(tmp_path / "film.tif")


def test_a_transparent_array_is_read_like_its_picture():
    values = np.repeat(draw_chest(0)[..., None], 4, axis=2)
    values[..., 3] = 255
    values[:, :100, 3] = 128
    picture = load_radiograph(Image.fromarray(values, "RGBA"))
    for array in (values, values.astype(np.float32) / 255, values.astype(np.uint16) * 257):
        assert np.abs(load_radiograph(array).pixels - picture.pixels).max() < 0.01
