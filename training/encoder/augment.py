"""Augmentation for differences between hospitals: geometry, contrast, sharpness, noise, borders, lines, markers,
compression.

It works on whole batches of tensors, on a CPU or a GPU. All random numbers come from one generator, so a seed gives the
same films. Films are never mirrored, because sides matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Luminance quantization of the JPEG standard (ITU-T T.81, table K.1).
_JPEG_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_GLYPHS = (
    ("10000", "10000", "10000", "10000", "10000", "10000", "11111"),
    ("11110", "10001", "10001", "11110", "10100", "10010", "10001"),
)


class Augmenter:
    """Augments batches of films.

    Args:
        size: rows and columns of the output.
        strength: 1 is the default; less makes every change smaller and rarer.
    """

    def __init__(self, size: int, strength: float = 1.0):
        self.size, self.strength = size, strength

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Films float [B, 1, side, side] in 0..1 → augmented films float [B, 1, size, size] in 0..1.

        Args:
            images: the films.
            generator: random generator on the same device.
        """
        chance = _Chance(len(images), generator, self.strength)
        for _ in range(3):
            images = _some(images, chance, 0.15, _draw_line)
        for _ in range(2):
            images = _some(images, chance, 0.1, _draw_disc)
        images = _some(images, chance, 0.2, _draw_letter)
        images = images.clamp(1e-4, 1) ** chance.around(0, 0.5).exp()  # gamma
        images = _some(images, chance, 0.35, _change_curve)
        images = _some(images, chance, 0.4, _change_local_contrast)
        images = (images * chance.around(0.97, 0.2) + chance.around(0, 0.08)).clamp(0, 1)
        images = _some(images, chance, 0.35, _collimate)
        images = _move(images, self.size, chance)
        images = _some(images, chance, 0.3, _blur)
        images = _some(images, chance, 0.2, _coarsen)
        images = _some(images, chance, 0.4, _add_noise)
        return _some(images.clamp(0, 1), chance, 0.3, _compress).clamp(0, 1)


class _Chance:
    """Random numbers for a batch, [B, 1, 1, 1] unless a shape is given."""

    def __init__(self, count: int, generator: torch.Generator, strength: float):
        self.count, self.device, self.generator, self.strength = count, generator.device, generator, strength

    def uniform(self, low: float, high: float, *more: int) -> Tensor:
        shape = (self.count, *(more or (1, 1, 1)))
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def around(self, middle: float, reach: float) -> Tensor:
        return middle + self.strength * self.uniform(-reach, reach)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, device=self.device)

    def pick(self, probability: float) -> Tensor:
        return self.uniform(0, 1) < probability * self.strength


def _some(images: Tensor, chance: _Chance, probability: float, change: Callable[[Tensor, _Chance], Tensor]) -> Tensor:
    """Change some films of a batch, each with a probability."""
    chosen = chance.pick(probability).flatten().nonzero()[:, 0]
    if not len(chosen):
        return images
    changed = change(images[chosen], _Chance(len(chosen), chance.generator, chance.strength))
    return images.index_copy(0, chosen, changed)


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates x [1, 1, 1, S] and y [1, 1, S, 1], -1 to 1."""
    line = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    return line.view(1, 1, 1, -1), line.view(1, 1, -1, 1)


def _draw_line(images: Tensor, chance: _Chance) -> Tensor:
    """A tube, line or wire: a soft bright curve."""
    side = images.shape[-1]
    time = torch.linspace(0, 1, 2 * side, device=images.device).view(1, -1, 1)
    first, middle, last = (chance.uniform(-1.1, 1.1, 1, 2) for _ in range(3))
    curve = (1 - time) ** 2 * first + 2 * time * (1 - time) * middle + time**2 * last
    place = ((curve + 1) / 2 * (side - 1)).round().long()
    inside = ((place >= 0) & (place < side)).all(-1)
    place = place.clamp(0, side - 1)
    canvas = torch.zeros_like(images).flatten(1)
    canvas.scatter_reduce_(1, place[..., 1] * side + place[..., 0], inside.to(images.dtype), "amax")
    thin = canvas.view_as(images)
    thick = functional.max_pool2d(thin, 3, 1, 1)
    line = functional.avg_pool2d(torch.where(chance.uniform(0, 1) < 0.5, thick, thin), 3, 1, 1)
    return images + chance.uniform(0.2, 0.9) * line * (1 - images)


def _draw_disc(images: Tensor, chance: _Chance) -> Tensor:
    """An electrode or button."""
    x, y = _grid(images)
    centre_x, centre_y, radius = chance.uniform(-0.9, 0.9), chance.uniform(-0.9, 0.9), chance.uniform(0.015, 0.05)
    distance = ((x - centre_x) ** 2 + (y - centre_y) ** 2).sqrt()
    disc = ((radius - distance) * images.shape[-1] / 4).clamp(0, 1) * chance.uniform(0.3, 0.9)
    return images + disc * (1 - images)


def _draw_letter(images: Tensor, chance: _Chance) -> Tensor:
    """A side marker, L or R, at a random position, so that the position has no meaning."""
    side = images.shape[-1]
    letter = torch.tensor([[[int(c) for c in row] for row in glyph] for glyph in _GLYPHS], device=images.device)
    zoom = 2 + int(torch.rand(1, generator=chance.generator, device=images.device) < 0.5)
    pixels = letter.to(images.dtype).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    rows, columns = pixels.shape[1:]
    top = chance.uniform(0, side - rows, 1, 1).long()
    left = chance.uniform(0, side - columns, 1, 1).long()
    down = torch.arange(rows, device=images.device).view(1, -1, 1)
    across = torch.arange(columns, device=images.device).view(1, 1, -1)
    place = ((top + down) * side + left + across).flatten(1)
    which = (chance.uniform(0, 1, 1)[:, 0] < 0.5).long()
    canvas = torch.zeros_like(images).flatten(1).scatter(1, place, pixels[which].flatten(1)).view_as(images)
    return torch.maximum(images, canvas * chance.uniform(0.6, 1))


def _change_curve(images: Tensor, chance: _Chance) -> Tensor:
    """A sigmoid characteristic curve."""
    slope, middle = chance.uniform(3, 8), chance.uniform(0.35, 0.65)
    low, high = torch.sigmoid(-slope * middle), torch.sigmoid(slope * (1 - middle))
    curve = (torch.sigmoid(slope * (images - middle)) - low) / (high - low)
    return torch.lerp(images, curve, chance.uniform(0.3, 1))


def _change_local_contrast(images: Tensor, chance: _Chance) -> Tensor:
    """More or less contrast of small structures with their surroundings."""
    small = functional.avg_pool2d(images, 8)
    wide = functional.avg_pool2d(small, 5, 1, 2, count_include_pad=False)
    wide = functional.interpolate(wide, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return images + chance.uniform(-0.4, 0.9) * (images - wide)


def _collimate(images: Tensor, chance: _Chance) -> Tensor:
    """Darken, or rarely brighten, everything outside a rotated rectangle."""
    x, y = _grid(images)
    angle = chance.uniform(-0.12, 0.12)
    turned = (x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin())
    inside = torch.ones_like(images)
    for values in turned:
        for sign in (-1, 1):
            edge = 1.05 - chance.uniform(0, 1) ** 2 * 0.3
            inside = inside * torch.sigmoid((edge - sign * values) * chance.uniform(40, 300))
    fill = torch.where(chance.uniform(0, 1) < 0.15, chance.uniform(0.7, 1), chance.uniform(0, 0.12))
    return images * inside + fill * (1 - inside)


def _move(images: Tensor, size: int, chance: _Chance) -> Tensor:
    """Rotation up to 15°, scaling, aspect ratio, shift; sometimes padding on two sides; resized to ``size``."""
    angle = chance.around(0, math.pi / 12)
    angle = torch.where(chance.pick(0.7), angle, 0.25 * angle).flatten()
    zoom = chance.around(0.97, 0.17).flatten()
    aspect = chance.around(0, 0.1).exp().flatten()
    padding = torch.where(chance.pick(0.15), chance.uniform(1, 1.3), torch.ones_like(zoom).view(-1, 1, 1, 1)).flatten()
    wide = (chance.uniform(0, 1) < 0.5).flatten()
    scale_x = zoom * aspect * torch.where(wide, padding, torch.ones_like(padding))
    scale_y = zoom / aspect * torch.where(wide, torch.ones_like(padding), padding)
    shift = [chance.around(0, 0.1).flatten() for _ in range(2)]
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * scale_x, -sin * scale_y, shift[0]], 1)
    matrix = torch.stack([first, torch.stack([sin * scale_x, cos * scale_y, shift[1]], 1)], 1)
    grid = functional.affine_grid(matrix, [len(images), 1, size, size], align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    inside = functional.grid_sample(torch.ones_like(images), grid, align_corners=False)
    fill = torch.where(chance.pick(0.2), chance.uniform(0, 1), chance.uniform(0, 0.05))
    return moved.clamp(0, 1) + fill * (1 - inside)


def _blur(images: Tensor, chance: _Chance) -> Tensor:
    """Gaussian blur, different for each film."""
    sigma = chance.uniform(0.3, 1.6)[:, :, 0]
    line = torch.arange(-4, 5, device=images.device).view(1, 1, -1)
    kernel = torch.exp(-0.5 * (line / sigma) ** 2)
    kernel = kernel / kernel.sum(-1, keepdim=True)
    row = images.transpose(0, 1)  # [1, B, S, S]: one group per film
    row = functional.conv2d(row, kernel.unsqueeze(2), padding=(0, 4), groups=len(images))
    return functional.conv2d(row, kernel.unsqueeze(3), padding=(4, 0), groups=len(images)).transpose(0, 1)


def _coarsen(images: Tensor, chance: _Chance) -> Tensor:
    """A lower resolution."""
    factor = 0.5 + 0.4 * float(torch.rand(1, generator=chance.generator, device=images.device))
    shape = images.shape[-2:]
    coarse = functional.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True, align_corners=False)
    return functional.interpolate(coarse, size=shape, mode="bilinear", align_corners=False)


def _add_noise(images: Tensor, chance: _Chance) -> Tensor:
    """Detector noise: fine or grainy, uniform or stronger in bright areas."""
    fine = chance.normal(images)
    grainy = functional.avg_pool2d(fine, 3, 1, 1) * 3
    noise = torch.where(chance.uniform(0, 1) < 0.4, grainy, fine)
    noise = torch.where(chance.uniform(0, 1) < 0.5, noise * images.clamp(0, 1).sqrt(), noise)
    return images + chance.uniform(0, 0.05) * noise


def _compress(images: Tensor, chance: _Chance) -> Tensor:
    """Lossy compression like JPEG: blocks of 8 x 8, cosine transform, quantization."""
    count, _, side, _ = images.shape
    pad = -side % 8
    padded = functional.pad(images, (0, pad, 0, pad), mode="replicate") if pad else images
    place = torch.arange(8, device=images.device)
    basis = torch.cos(math.pi * (2 * place[None] + 1) * place[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = padded.view(count, (side + pad) // 8, 8, (side + pad) // 8, 8).transpose(2, 3) * 255 - 128
    found = basis @ blocks @ basis.T
    quality = chance.uniform(15, 85)
    factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50).view(-1, 1, 1, 1, 1)
    table = (torch.tensor(_JPEG_TABLE, device=images.device) * factor).clamp_min(1)
    blocks = basis.T @ ((found / table).round() * table) @ basis
    restored = ((blocks + 128) / 255).transpose(2, 3).reshape(count, 1, side + pad, side + pad)[..., :side, :side]
    return restored
