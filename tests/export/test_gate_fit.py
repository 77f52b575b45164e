from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbedge.images.gate import CLASSES, Gate
from cbedge.images.preprocess import Preprocessing
from export.drawn_images import drawn_images
from export.film_samples import ALTERATIONS, LABELS, Films, collect_films, film_samples, square
from export.gate import Fitted, fit_gate

SIZE = 32
SETTINGS = Preprocessing(image_size=SIZE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class PatchMeans:
    """Stands for a vision encoder: each of 16 patches is described by its mean and its differences from its
    neighbours; the class token holds all means."""

    def __init__(self):
        self.images = 0

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels [1, 3, 32, 32] → features [1, 17, 16]."""
        self.images += 1
        means = pixels[0, 0].reshape(4, 8, 4, 8).mean((1, 3))
        patches = np.zeros((17, 16), np.float32)
        patches[0] = means.reshape(-1)
        patches[1:, 0] = means.reshape(-1)
        return patches[None]


def film(rng: np.random.Generator) -> np.ndarray:
    """A drawn "frontal film", uint8 [64, 64]: two dark lungs, a bright abdomen below, a heart that reaches right."""
    pixels = np.full((64, 64), 150.0)
    pixels[6:46, 6:28] = pixels[6:46, 36:58] = 40
    pixels[28:46, 28:52] = 200
    pixels[48:] = 230
    pixels += rng.normal(0, 8, pixels.shape)
    return np.clip(pixels * rng.uniform(0.9, 1.1), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Films:
    folder, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    paths = [folder / f"{place}.png" for place in range(90)]
    for path in paths:
        Image.fromarray(film(rng)).save(path)
    return Films("drawn", {"frontal": paths[:60]}, {"frontal": paths[60:]})


@pytest.fixture(scope="module")
def fitted(films: Films, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    cache = tmp_path_factory.mktemp("cache")
    first, second = PatchMeans(), PatchMeans()
    made = fit_gate(first, SETTINGS, [films], cache=cache)
    again = fit_gate(second, SETTINGS, [films], cache=cache)
    assert made is not None and again is not None
    assert first.images > 300 and second.images == 1  # a probe: all others come from the cache
    layers = zip(made.gate.layers, again.gate.layers, strict=True)
    assert all(np.array_equal(one[place], two[place]) for one, two in layers for place in (0, 1))
    return made


def logits(gate: Gate, pixels: np.ndarray) -> np.ndarray:
    planes = np.repeat(square(pixels / np.float32(255), SIZE)[None, None] / np.float32(255), 3, 1)
    return gate.logits(PatchMeans().encode_image(planes))


def test_a_fitted_gate_tells_upright_films_from_altered_ones_and_from_other_images(fitted: Fitted):
    rng = np.random.default_rng(5)
    new = [film(rng) for _ in range(40)]
    upright = [logits(fitted.gate, pixels) for pixels in new]
    assert np.mean([fitted.gate.reason(row, 0.0) is None for row in upright]) >= 0.95
    assert np.mean([fitted.gate.is_mirrored(row) for row in upright]) <= 0.1
    for name in ("rotated by 180", "rotated by 90", "rotated by 270", "mirrored"):
        rows = [logits(fitted.gate, ALTERATIONS[name](pixels, rng)) for pixels in new]
        told = [fitted.gate.is_mirrored(row) or fitted.gate.reason(row, 0.0) is not None for row in rows]
        assert np.mean(told) >= 0.9, name
    others = [logits(fitted.gate, pixels * 255) for _, pixels in drawn_images(np.random.default_rng(7), 60)]
    assert np.mean([fitted.gate.reason(row, 0.0) is not None for row in others]) >= 0.9


def test_validation_films_are_familiar(fitted: Fitted, films: Films):
    planes = [np.asarray(Image.open(path)) for path in films.validation["frontal"]]
    rows = [
        PatchMeans().encode_image(np.repeat(square(pixels / np.float32(255), SIZE)[None, None] / np.float32(255), 3, 1))
        for pixels in planes
    ]
    values = [fitted.familiarity.unfamiliarity(row, "frontal") for row in rows]
    assert sum(value > 1 for value in values) <= 1 and min(values) == 0


def test_too_few_films_give_no_gate(films: Films):
    few = Films("few", {"frontal": films.fit["frontal"][:39]}, films.validation)
    assert fit_gate(PatchMeans(), SETTINGS, [few]) is None


def test_samples_of_films_are_labelled_and_reproducible(films: Films):
    first, again = ([*film_samples([films], SIZE)] for _ in range(2))
    labels = {sample.label for sample in first}
    assert labels == {"frontal", "mirrored", "upside down", "on its side", "part"} and labels <= {*CLASSES}
    assert sum(sample.is_film for sample in first) == 60
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("name", "corner"),
    [
        ("mirrored", (0, -1)),
        ("rotated by 180", (-1, -1)),
        ("flipped top to bottom", (-1, 0)),
        ("rotated by 90", (-1, 0)),
    ],
)
def test_alterations_move_the_upper_left_corner(name: str, corner: tuple[int, int]):
    pixels = np.zeros((5, 7), np.float32)
    pixels[0, 0] = 1
    assert ALTERATIONS[name](pixels, np.random.default_rng(0))[corner] == 1 and LABELS[name] in CLASSES


def test_films_of_a_test_split_are_not_used_for_fitting(tmp_path: Path):
    from training.encoder.films import patient_share

    folder = tmp_path / "more"
    folder.mkdir()
    lines = [f'{{"file": "{p}.png", "patient": "{p}", "split": "{"test" if p % 2 else "train"}"}}' for p in range(40)]
    (folder / "films.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "studies.jsonl").write_text("", encoding="utf-8")
    chosen = collect_films(tmp_path, [folder])[1]
    held_out = {path.stem for path in chosen.validation["frontal"]}
    assert held_out == {str(p) for p in range(0, 40, 2) if patient_share(str(p)) < 0.15}
    assert {path.stem for path in chosen.fit["frontal"]} == {str(p) for p in range(0, 40, 2)} - held_out
    measured = collect_films(tmp_path, [folder], "test")[1].validation["frontal"]
    assert {path.stem for path in measured} == {str(p) for p in range(1, 40, 2)}
    with pytest.raises(ValueError, match=r"no readable films\.jsonl .*: give a line with file and patient"):
        collect_films(tmp_path, [tmp_path / "nothing"])
