from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, call_cli, needs_default_model
from PIL import Image, ImageDraw

from cbedge import BundleError, RadiographError, ReportGenerator
from cbedge.images.familiarity import Familiarity
from cbedge.images.film_check import FilmAssessment
from cbedge.images.gate import CLASSES, FRONTAL, LATERAL, MIRRORED, Gate, NotAChestRadiograph, halves, pooled
from cbedge.images.radiograph import load_radiograph
from export.gate import distribution

WIDTH = 4


def logits(name: str) -> np.ndarray:
    """Logits that clearly say one class."""
    return np.where(np.array(CLASSES) == name, 5.0, -5.0)


@pytest.fixture
def gate() -> Gate:
    rng = np.random.default_rng(0)
    layers = [(3 * WIDTH, 5), (5, len(CLASSES))]
    made = [(rng.standard_normal(shape), rng.standard_normal(shape[1])) for shape in layers]
    return Gate([(w.astype(np.float32), b.astype(np.float32)) for w, b in made], -0.5, 0.25)


def test_logits_are_those_of_a_network_with_one_hidden_layer(gate: Gate):
    features = np.random.default_rng(1).standard_normal((1, 5, WIDTH)).astype(np.float32)
    (first, bias), (last, last_bias) = gate.layers
    expected = np.maximum(halves(features) @ first + bias, 0) @ last + last_bias
    assert gate.logits(features) == pytest.approx(expected[0], rel=1e-5)


def test_a_gate_is_saved_and_read_again(gate: Gate, tmp_path: Path):
    gate.save(tmp_path / "gate.npy")
    again = Gate.load(tmp_path / "gate.npy")
    features = np.random.default_rng(2).standard_normal((1, 5, WIDTH)).astype(np.float32)
    assert again.logits(features) == pytest.approx(gate.logits(features), rel=1e-6)
    assert (again.limit, again.mirrored_limit) == (-0.5, 0.25)


@pytest.mark.parametrize("damage", ["bytes", "cut", "long", "nan", "classes", "format", "empty"])
def test_a_damaged_gate_is_refused(gate: Gate, damage: str, tmp_path: Path):
    path = tmp_path / "gate.npy"
    gate.save(path)
    values = np.load(path)
    if damage == "bytes":
        path.write_bytes(b"nothing")
    else:
        changed = {
            "cut": values[:-1],
            "long": np.append(values, np.float32(0)),
            "nan": np.where(np.arange(len(values)) == 20, np.float32("nan"), values),
            "classes": np.where(np.arange(len(values)) == 1, np.float32(8), values),
            "format": np.where(np.arange(len(values)) == 0, np.float32(3), values),
            "empty": values[:0],
        }
        np.save(path, changed[damage])
    with pytest.raises(BundleError, match="is not a gate: install or export the bundle again"):
        Gate.load(path)


def test_a_gate_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path):
    np.save(tmp_path / "gate.npy", np.zeros((50, 8), np.float32))
    with pytest.raises(
        BundleError, match=r"older version of cbedge: export the bundle again, or renew it with .*--gate"
    ):
        Gate.load(tmp_path / "gate.npy")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("upside down", "the radiograph is upside down: rotate it by 180°"),
        ("on its side", "the radiograph lies on its side: rotate it by 90°"),
        ("part", "the image shows only a small part of a chest: give the whole radiograph"),
        ("other", "the image does not look like a chest radiograph: check it"),
    ],
)
def test_the_message_says_what_an_image_looks_like(gate: Gate, name: str, words: str):
    with pytest.raises(NotAChestRadiograph) as error:
        gate.check(logits(name), 0.0)
    assert str(error.value) == f"{words}, or accept any image (--accept-any-image, accept_any_image)"


def test_readable_classes_are_accepted_and_colour_is_not(gate: Gate):
    for name in ("frontal", "mirrored", "lateral"):
        assert gate.reason(logits(name), 0.0) is None
        assert gate.reason(logits(name), 0.2) == "the image is in colour, but radiographs are greyscale: check it"
    assert [gate.is_lateral(logits(CLASSES[place])) for place in (FRONTAL, MIRRORED, LATERAL)] == [False, False, True]
    assert [gate.is_mirrored(logits(CLASSES[place])) for place in (FRONTAL, MIRRORED)] == [False, True]


def test_the_limit_is_the_log_odds_of_the_readable_classes(gate: Gate):
    values = np.full(len(CLASSES), -50.0)
    values[CLASSES.index("frontal")], values[CLASSES.index("other")] = 0.0, 0.49
    assert gate.reason(values, 0.0) is None
    values[CLASSES.index("other")] = 0.51
    assert gate.reason(values, 0.0) is not None


def test_pooling_keeps_class_token_and_means_of_patches():
    features = np.arange(20, dtype=np.float32).reshape(1, 5, 4)
    assert pooled(features).tolist() == [[0, 1, 2, 3, 10, 11, 12, 13]]
    assert halves(features).tolist() == [[0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]]


def known(rng: np.random.Generator, count: int) -> np.ndarray:
    """Pooled features of "radiographs": few directions vary much, the rest little."""
    strong = rng.standard_normal((count, 4)) @ np.eye(4, 40) * 5
    return (10 + strong + 0.1 * rng.standard_normal((count, 40))).astype(np.float32)


def features_of(row: np.ndarray) -> np.ndarray:
    """Vision features, float32 [1, 2, H], with these pooled features."""
    return row.reshape(1, 2, -1)


def test_unfamiliarity_is_0_for_typical_and_above_1_for_few_validation_radiographs(tmp_path: Path):
    rng = np.random.default_rng(1)
    Familiarity(distribution(known(rng, 400), known(rng, 400), 6)[None]).save(tmp_path / "familiarity.npy")
    familiarity = Familiarity.load(tmp_path / "familiarity.npy")
    values = np.array([familiarity.unfamiliarity(features_of(row), "lateral") for row in known(rng, 400)])
    assert np.median(values) == pytest.approx(0, abs=0.1) and 0.001 < np.mean(values > 1) < 0.04
    shifted = known(rng, 50) + np.where(np.arange(40) == 30, 3, 0)  # outside the main directions
    far = known(rng, 50) + np.where(np.arange(40) == 1, 60, 0)  # far along one
    assert all(familiarity.unfamiliarity(features_of(row), "frontal") > 2 for row in (*shifted, *far))


def test_a_damaged_measure_of_familiarity_is_refused(tmp_path: Path):
    np.save(tmp_path / "familiarity.npy", np.zeros((50, 8), np.float32))
    with pytest.raises(BundleError, match="is not a measure of familiarity"):
        Familiarity.load(tmp_path / "familiarity.npy")


def test_a_study_is_familiar_up_to_1():
    assert FilmAssessment().familiar and FilmAssessment((), 1.0).familiar and not FilmAssessment((), 1.01).familiar


@pytest.fixture(scope="module")
def generator() -> ReportGenerator:
    return ReportGenerator.from_pretrained(device="cpu")


@needs_default_model
@pytest.mark.parametrize("name", ["chest_pa.png", "chest_pa.dcm"])
def test_the_example_radiograph_passes(name: str, generator: ReportGenerator):
    report = generator.generate(EXAMPLES / name)
    assert report.complete and report.findings
    assert report.unfamiliarity is not None and report.unfamiliarity >= 0
    assert not any("mirrored" in warning or "lateral" in warning for warning in report.warnings)


@needs_default_model
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pixels: pixels[::-1, ::-1], "the radiograph is upside down: rotate it by 180°"),
        (np.rot90, "the radiograph lies on its side: rotate it by 90°"),
        (lambda pixels: np.rot90(pixels, 3), "the radiograph lies on its side: rotate it by 90°"),
        (lambda pixels: pixels[: len(pixels) // 4, : len(pixels) // 4], "the image"),
    ],
)
def test_a_turned_or_cropped_example_is_refused_with_what_to_do(change, words: str, generator: ReportGenerator):
    pixels = np.ascontiguousarray(change(load_radiograph(EXAMPLES / "chest_pa.png").pixels))
    with pytest.raises(NotAChestRadiograph, match=words):
        generator.generate(pixels)


@needs_default_model
def test_a_mirrored_example_is_told(generator: ReportGenerator):
    pixels = np.ascontiguousarray(load_radiograph(EXAMPLES / "chest_pa.png").pixels[:, ::-1])
    assert "The radiograph looks mirrored (left and right swapped): check its side marker." in (
        generator.generate(pixels).warnings
    )


def drawn(kind: str) -> np.ndarray:
    """An image that is not a radiograph, uint8 [300, 300] or [300, 300, 3]."""
    rng = np.random.default_rng(0)
    if kind == "noise":
        return rng.integers(0, 255, (300, 300)).astype(np.uint8)
    if kind == "gradient":
        return np.tile(np.linspace(0, 255, 300), (300, 1)).astype(np.uint8)
    if kind == "colour":
        return rng.integers(0, 255, (300, 300, 3)).astype(np.uint8)
    image = Image.new("L", (300, 300), 250 if kind == "document" else 170)
    draw = ImageDraw.Draw(image)
    if kind == "document":
        for top in range(20, 280, 12):
            draw.text((20, top), "The quick brown fox jumps over the lazy dog again"[: int(rng.integers(30, 50))], 20)
    else:  # a landscape: hills, a sun, a house and a fence
        draw.ellipse((210, 20, 260, 70), 240)
        draw.polygon([(0, 170), (80, 90), (150, 160), (230, 110), (300, 180), (300, 300), (0, 300)], 90)
        draw.rectangle((90, 180, 160, 240), 200)
        draw.polygon([(80, 180), (125, 140), (170, 180)], 50)
        for left in range(0, 300, 15):
            draw.rectangle((left, 250, left + 6, 290), 220)
    return np.asarray(image)


@needs_default_model
@pytest.mark.parametrize("kind", ["noise", "gradient", "colour", "document", "landscape"])
def test_what_is_no_radiograph_is_refused_and_drafted_only_when_told(kind: str, generator: ReportGenerator):
    with pytest.raises(NotAChestRadiograph, match="accept_any_image"):
        generator.generate(drawn(kind))
    report = generator.generate(drawn(kind), accept_any_image=True)
    assert report.findings and any(warning.startswith("Accepted on request, though ") for warning in report.warnings)


@needs_default_model
def test_the_command_refuses_in_one_line_and_goes_on_when_told(tmp_path: Path):
    Image.fromarray(drawn("noise")).save(tmp_path / "x.png")
    refused = call_cli("cbedge.cli", "generate", tmp_path / "x.png")
    assert refused.returncode == 3 and len(refused.stderr.strip().splitlines()) == 1 and not refused.stdout
    assert call_cli("cbedge.cli", "generate", tmp_path / "x.png", "--accept-any-image").returncode == 0


def test_a_gate_error_is_an_error_of_the_radiograph():
    assert issubclass(NotAChestRadiograph, RadiographError)
