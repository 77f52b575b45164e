import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import EXAMPLES, ROOT, needs_default_model, run_cli

from cbedge import ReportGenerator
from cbedge.bundles.bundle import Bundle, open_bundle, write_bundle
from cbedge.bundles.manifest import MANIFEST, Manifest
from cbedge.errors import BundleError, OptionError
from cbedge.findings.finding_reader import FINDINGS, FindingReader
from cbedge.findings.image_findings import OTHER, ImageFindings, Measured
from cbedge.images.gate import pooled

HEAD = ("abnormal", "cardiomegaly", "effusion", "opacity")
NAMES = (*HEAD, "nodule", "pneumothorax")
POINTS = {"sensitive": (0.1,) * 6, "balanced": (0.3,) * 6, "specific": (0.6,) * 6}


def with_readers(source: Path, out: Path, make: Callable[[int, int], np.ndarray]) -> Path:
    """A copy of a bundle with readers of six findings, from a function of the numbers of features and of scores."""
    bundle = open_bundle(source)
    generator = ReportGenerator(bundle, *opened(bundle))
    pixels = np.zeros((1, 3, *(bundle.manifest.shapes.image_size,) * 2), np.float32)
    width = pooled(generator.backend.encode_image(pixels)).shape[1]
    old = bundle.manifest.image_findings
    assert old is not None and old.names == HEAD
    findings = ImageFindings(
        NAMES,
        POINTS["balanced"],
        openings=("", "The heart is enlarged.", "", "", "", ""),
        operating_points=POINTS,
        head_thresholds=old.thresholds,
    )

    def fill(folder: Path) -> Manifest:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / MANIFEST).unlink()
        FindingReader(make(width, len(HEAD))).save(folder / FINDINGS)
        return replace(bundle.manifest, image_findings=findings)

    write_bundle(out, fill)
    return out


def opened(bundle: Bundle):
    from cbedge.backends import open_backend

    return bundle.manifest.default_variant, open_backend(bundle, bundle.variant()[1], "cpu")


def constant(width: int, count: int) -> np.ndarray:
    weights = np.zeros((4, len(NAMES), 1 + width + count), np.float32)
    weights[:3, :, 0] = np.log([[9, 1, 1, 1, 1, 0.25]])  # odds
    return weights


def test_readers_with_known_weights_give_the_expected_probabilities():
    features = np.array([[1.0, 2.0, 1.0, 2.0]], np.float32)
    weights = np.zeros((4, 2, 1 + 4 + 1), np.float32)
    weights[0, 0] = [0.5, 1, 0, 0, 0, 2]
    weights[1, 0, 0] = 7
    weights[2, 1], weights[3, 1] = [1, 0, 1, 0, 0, 0], [-4, 0, 0, 0, 0, 1]
    reader = FindingReader(weights)
    assert reader.logits([features], [np.array([0.25])], "frontal").tolist() == [0.5 + 1 + 0.5, 0]
    assert reader.logits([features], [np.array([0.25])], "lateral").tolist() == [7, 0]
    both = reader.logits([features, features], [np.array([0.25]), np.array([3.0])], "frontal")
    assert both.tolist() == [0, 1 + 2 - 4 + 3]


@pytest.mark.parametrize("damage", [b"", b"not an array", np.zeros((4, 6, 9))])
def test_damaged_readers_are_named(damage: bytes | np.ndarray, tmp_path: Path):
    path = tmp_path / FINDINGS
    path.write_bytes(damage) if isinstance(damage, bytes) else np.save(path.open("wb"), damage)
    with pytest.raises(BundleError, match=r"findings.npy in .* does not read the model's 6 findings"):
        FindingReader.load(path, ImageFindings(NAMES, (0.5,) * 6))


def test_a_bundle_with_readers_drafts_with_calibrated_probabilities(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    generator = ReportGenerator.from_pretrained(with_readers(tiny_bundle, tmp_path / "bundle", constant), device="cpu")
    report = generator.generate(chest_png, max_new_tokens=40)
    told = json.loads(report.to_json())
    assert told["finding_scores"] == dict(zip(NAMES, (0.9, 0.5, 0.5, 0.5, 0.5, 0.2), strict=True))
    assert (told["finding_scores_calibrated"], told["operating_point"]) == (True, "balanced")
    assert told["image_findings"] == [*NAMES[1:5]]
    assert (
        "(calibrated probabilities), check first: cardiomegaly (probability 0.50, threshold 0.30)" in report.to_text()
    )


def test_a_bundle_without_readers_says_that_scores_are_no_probabilities(tiny_bundle: Path, chest_png: Path):
    told = json.loads(ReportGenerator.from_pretrained(tiny_bundle, device="cpu").generate(chest_png).to_json())
    assert (told["finding_scores_calibrated"], told["operating_point"]) == (False, None)


def test_a_reader_that_repeats_the_qformer_changes_no_score(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    def repeat(width: int, count: int) -> np.ndarray:
        weights = np.zeros((4, len(NAMES), 1 + width + count), np.float32)
        weights[0, :count, 1 + width :] = np.eye(count)
        return weights

    before = ReportGenerator.from_pretrained(tiny_bundle, device="cpu").generate(chest_png, max_new_tokens=2)
    generator = ReportGenerator.from_pretrained(with_readers(tiny_bundle, tmp_path / "bundle", repeat), device="cpu")
    after = generator.generate(chest_png, max_new_tokens=2)
    assert {name: after.finding_scores[name] for name in HEAD} == pytest.approx(before.finding_scores, abs=1e-6)


@pytest.mark.parametrize(
    ("present", "listed"),
    [
        ((), ()),
        (("effusion", "nodule"), ("effusion",)),
        (("nodule", "pneumothorax"), (OTHER,)),
        ((OTHER,), (OTHER,)),
    ],
)
def test_the_prompt_lists_only_findings_that_the_language_model_was_trained_with(
    present: tuple[str, ...], listed: tuple[str, ...]
):
    findings = ImageFindings(NAMES, (0.5,) * 6, head_thresholds=(0.1,) * 4)
    assert findings.prompted(present) == listed
    assert findings.head.names == HEAD and findings.head.thresholds == (0.1,) * 4


def test_an_operating_point_changes_the_thresholds_of_every_draft(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    folder = with_readers(tiny_bundle, tmp_path / "bundle", constant)
    found = {}
    for point in POINTS:
        generator = ReportGenerator.from_pretrained(folder, device="cpu", operating_point=point)
        report = generator.generate(chest_png, max_new_tokens=2)
        assert report.operating_point == point
        assert report.finding_thresholds == dict(zip(NAMES, POINTS[point], strict=True))
        found[point] = report.image_findings
    assert found == {"sensitive": NAMES[1:], "balanced": NAMES[1:5], "specific": (OTHER,)}


def test_an_unknown_operating_point_is_named(tiny_bundle: Path, tmp_path: Path):
    folder = with_readers(tiny_bundle, tmp_path / "bundle", constant)
    with pytest.raises(OptionError, match="'keen'; known: sensitive, balanced, specific"):
        ReportGenerator.from_pretrained(folder, device="cpu", operating_point="keen")
    with pytest.raises(OptionError, match="known: none; this model has one threshold for each finding"):
        ReportGenerator.from_pretrained(tiny_bundle, device="cpu", operating_point="balanced")


def test_the_manifest_keeps_readers_points_and_thresholds_of_the_qformer(tiny_bundle: Path, tmp_path: Path):
    findings = open_bundle(with_readers(tiny_bundle, tmp_path / "bundle", constant)).manifest.image_findings
    assert findings is not None and findings.operating_points == POINTS and len(findings.head_thresholds) == 4
    assert findings.operating_point == "balanced"
    with pytest.raises(ValueError, match="2 findings with 3 thresholds of the Q-Former"):
        ImageFindings(("abnormal", "effusion"), (0.5, 0.5), head_thresholds=(0.1, 0.2, 0.3))


@needs_default_model
def test_figures_of_the_embedded_model_are_those_of_the_record():
    findings = open_bundle().manifest.image_findings
    record = json.loads((ROOT / "benchmarks" / "results" / "findings.json").read_text(encoding="utf-8"))
    assert findings is not None and findings.operating_points == {
        point: tuple(values[name] for name in findings.names) for point, values in record["operating_points"].items()
    }
    for name, standing in zip(findings.names, findings.standings, strict=True):
        for place, measured in (("home", standing.home), ("away", standing.away)):
            row = record[place].get(name)
            expected = None if row is None else Measured(*row["auc"], row["films"], row["positives"])
            assert measured == expected, name
    for low, middle, high in zip(*findings.operating_points.values(), strict=True):
        assert 0 < low <= middle <= high < 1
    assert findings.head.names == findings.names[:12] and "pneumothorax" not in findings.prompted(("pneumothorax",))


@needs_default_model
def test_the_command_shows_thresholds_areas_and_standing_of_each_finding():
    shown = run_cli("cbedge", "model").stdout
    findings = open_bundle().manifest.image_findings
    assert findings is not None
    for i, (name, standing) in enumerate(zip(findings.names, findings.standings, strict=True)):
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert " / ".join(f"{values[i]:.2f}" for values in findings.operating_points.values()) in line
        assert line.rstrip().endswith(standing.assessed)
        for measured in (standing.home, standing.away):
            assert measured is None or f"{measured.auc:.2f} ({measured.low:.2f}-{measured.high:.2f})" in line


@needs_default_model
def test_every_command_takes_the_operating_point_and_names_an_unknown_one(tmp_path: Path):
    refused = run_cli("cbedge", "generate", EXAMPLES / "chest_pa.png", "--operating-point", "keen")
    assert refused.returncode == OptionError.exit_code
    assert "unknown operating point 'keen'; known: sensitive, balanced, specific" in refused.stderr
    out, film = tmp_path / "drafts.jsonl", EXAMPLES / "chest_pa.png"
    done = run_cli("cbedge", "batch", film, "--out", out, "--operating-point", "specific")
    assert done.returncode == 0 and json.loads(out.read_text())["operating_point"] == "specific"
    other = run_cli("cbedge", "batch", film, "--out", out, "--operating-point", "sensitive")
    assert other.returncode != 0 and "operating point sensitive: use the same options, or another --out" in other.stderr
    for command in ("serve", "listen"):
        assert "--operating-point" in run_cli("cbedge", command, "--help").stdout
