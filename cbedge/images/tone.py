"""The tone curve of an image file: which displayed grey each stored value stands for.

A PNG's gAMA chunk or an ICC profile can state that the values are not sRGB but, for example, proportional to light.
Viewers convert them; most files state sRGB, gamma 2.2 or nothing, and need no conversion.
"""

from __future__ import annotations

import io
import struct
from contextlib import suppress

import numpy as np
from PIL import Image

from cbedge.images.intensity import Transform

_DISPLAY = 2.2  # exponent from displayed values to light
_SAME = 0.012  # of the display's range: a smaller difference is rounding in the profile
_CURVES = {b"GRAY": b"kTRC", b"RGB ": b"gTRC"}  # by colour space; equal red, green and blue have equal curves
_PARAMETERS = (1, 3, 4, 5, 7)  # number of them, by type of parametric curve
_STEPS = np.linspace(0, 1, 257)


def tone_curve(image: Image.Image) -> tuple[Transform | None, tuple[str, ...]]:
    """The function from an image's stored values to displayed ones, both 0 to 1; ``None`` if they are the same.

    Also returns a warning about a profile that cannot be applied.
    """
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    if profile:  # takes precedence over gAMA
        try:
            light = _profile_curve(profile)
        except (ValueError, KeyError, struct.error):
            return None, unusable(image)
    elif "srgb" not in image.info and isinstance(gamma, float) and 0.05 < gamma < 20:
        light = lambda values: values ** (1 / gamma)  # noqa: E731
    else:
        return None, ()
    return (None if _is_usual(light) else lambda values: light(values) ** (1 / _DISPLAY)), ()


def unusable(image: Image.Image) -> tuple[str, ...]:
    """The warning that an image's colour profile was not applied."""
    from PIL import ImageCms

    name = ""
    with suppress(Exception):  # a damaged profile
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        name = ImageCms.getProfileDescription(profile).strip()
    if "sRGB" in name:
        return ()
    shown = "".join(c for c in name if c.isascii() and c.isprintable())[:60]
    return (
        f"The file's colour profile {shown or 'without a name'} could not be applied: the image may be brighter or "
        "darker than in a viewer.",
    )


def _is_usual(light: Transform) -> bool:
    """Whether a curve from stored values to light is that of sRGB or of gamma 2.2."""
    found = light(_STEPS)
    srgb = np.where(found <= 0.0031308, 12.92 * found, 1.055 * found ** (1 / 2.4) - 0.055)
    return any(np.abs(shown - _STEPS).max() < _SAME for shown in (srgb, found ** (1 / _DISPLAY)))


def _profile_curve(profile: bytes) -> Transform:
    """The curve from stored values to light in an ICC profile that has one curve per channel (ICC.1, 8.3 and 8.4).

    Raises:
        ValueError, KeyError, struct.error: the profile is damaged or of another kind.
    """
    if profile[20:24] != b"XYZ ":
        raise ValueError("another connection space")
    (count,) = struct.unpack_from(">L", profile, 128)
    entries = [struct.unpack_from(">4sL", profile, 132 + 12 * i) for i in range(min(count, 100))]
    curve = _curve(profile, dict(entries)[_CURVES[profile[16:20]]])
    found = curve(_STEPS)
    if not np.isfinite(found).all() or np.ptp(found) == 0:
        raise ValueError("a flat curve")
    return lambda values: np.clip(curve(values), 0, 1)


def _curve(profile: bytes, start: int) -> Transform:
    """A curve of type curv or para (ICC.1, 10.6 and 10.18)."""
    kind, number = struct.unpack_from(">4s4xL", profile, start)
    if kind == b"curv" and number > 1:
        table = np.frombuffer(profile, ">u2", number, start + 12) / 65535
        return lambda values: np.interp(values, np.linspace(0, 1, number), table)
    if kind == b"curv":
        exponent = struct.unpack_from(">H", profile, start + 12)[0] / 256 if number else 1.0
        return lambda values: values**exponent
    if kind != b"para" or number >> 16 >= len(_PARAMETERS):
        raise ValueError("an unknown curve")
    found = struct.unpack_from(f">{_PARAMETERS[number >> 16]}l", profile, start + 12)
    numbers = [value / 65536 for value in found]
    g, a, b, c, d, e, f = numbers + [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0][len(numbers) :]
    if number >> 16 == 2:
        c, e = 0.0, c
    return lambda values: np.where(values >= d, np.maximum(a * values + b, 0) ** g + e, c * values + f)
