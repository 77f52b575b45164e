"""Measure how often the gate is wrong, and whether the heat map points at what matters.

*gate*: the share of real test radiographs that it refuses, and of other images that it refuses.
*occlusion*: greying the image window with the most attention must change the draft more than greying a random one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydicom
import typer
from pydicom.data import get_testdata_files
from rich.progress import track

from benchmarks.common import write_record
from cbedge import CbedgeError, ReportGenerator
from cbedge.images.gate import Gate
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.prompt import clean_context
from cbedge.provenance import provenance
from training.datasets.iu_xray import read_studies
from training.datasets.studies import Study
from training.scoring import rouge_matrix

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
Data = Annotated[Path, typer.Option(help="Folder of IU X-RAY.")]
Model = Annotated[Path | None, typer.Option(help="Folder of a bundle.", show_default="embedded")]
Output = Annotated[Path, typer.Option(help="JSON to write.")]
_SKIMAGE = (
    "astronaut",
    "brick",
    "camera",
    "cat",
    "cell",
    "checkerboard",
    "clock",
    "coffee",
    "coins",
    "colorwheel",
    "grass",
    "gravel",
    "horse",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "text",
)
_WINDOW = 5  # patches, of 16


@app.command("gate")
def gate_command(data: Data, output: Output, model: Model = None) -> None:
    """Count radiographs of the test split that are refused, and other images that are accepted."""
    generator = ReportGenerator.from_pretrained(model, device="cpu")
    gate = generator.film_check.gate
    if gate is None:
        raise CbedgeError("the bundle has no gate: export it with --data")
    images = [s.image for s in read_studies(data, ("test",))]
    scores = [gate.score(_features(generator, load_radiograph(image))) for image in track(images, "radiographs")]
    others = {name: load_radiograph(pixels) for name, pixels in other_images().items()}
    refusals = {name: _refused(gate, generator, image) for name, image in others.items()}
    record = {
        **provenance("IU X-RAY, test", model),
        "limit": gate.limit,
        "radiographs": len(scores),
        "false_alarms": float(np.mean(np.array(scores) > gate.limit)),
        "others": len(refusals),
        "caught": float(np.mean(list(refusals.values()))),
        "let_pass": sorted(name for name, refused in refusals.items() if not refused),
    }
    write_record(record, output)


@app.command("occlusion")
def occlusion_command(
    data: Data,
    output: Output,
    model: Model = None,
    limit: Annotated[int, typer.Option(min=2, help="Validation studies.")] = 100,
) -> None:
    """Grey the window with the most attention, or a random one, and compare the drafts with the original one."""
    generator = ReportGenerator.from_pretrained(model, device="cpu")
    rng = np.random.default_rng(0)
    changes: dict[str, list[float]] = {"top": [], "random": []}
    scores: dict[str, list[float]] = {"top": [], "random": []}
    for study in track(read_studies(data, ("val",))[:limit], "occluding"):
        radiograph = load_radiograph(study.image)
        whole, attention = _draft(generator, radiograph, study)
        windows = {"top": _top_window(attention), "random": tuple(rng.integers(0, len(attention) - _WINDOW + 1, 2))}
        for kind, window in windows.items():
            hidden, _ = _draft(generator, _grey(radiograph, window, len(attention)), study)
            changes[kind].append(1 - rouge_matrix([hidden.text], [whole.text])[0][0])
            pairs = zip(hidden.finding_scores.values(), whole.finding_scores.values(), strict=True)
            scores[kind].append(float(np.mean([abs(a - b) for a, b in pairs])))
    difference = np.array(changes["top"]) - np.array(changes["random"])
    samples = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(2000)]
    record = {
        **provenance("IU X-RAY, val", model),
        "studies": len(difference),
        "window_patches": _WINDOW,
        "draft_changed": {kind: float(np.mean(values)) for kind, values in changes.items()},
        "difference": [float(difference.mean()), *map(float, np.percentile(samples, (2.5, 97.5)))],
        "finding_scores_changed": {kind: float(np.mean(values)) for kind, values in scores.items()},
    }
    write_record(record, output)


def other_images() -> dict[str, np.ndarray]:
    """Images that are not chest radiographs: from scikit-image, pydicom's scans of other body parts, and noise."""
    found: dict[str, np.ndarray] = {}
    rng = np.random.default_rng(0)
    for i in range(4):
        found[f"noise {i}"] = rng.integers(0, 255, (256, 256)).astype(np.uint8)
    try:
        import skimage.data as library

        for name in _SKIMAGE:
            try:
                image = getattr(library, name)()
            except Exception:  # some need a download
                continue
            found[f"skimage {name}"] = image.astype(np.uint8) * 255 if image.dtype == bool else image
            if image.ndim == 3:
                found[f"skimage {name}, grey"] = image[..., :3].mean(2).astype(np.uint8)
    except ImportError:
        typer.echo("scikit-image is not installed: its images are left out", err=True)
    for path in map(Path, get_testdata_files("*.dcm")):
        pixels = _dicom_pixels(path)
        if pixels is not None:
            found[f"pydicom {path.name}"] = pixels
    return found


def _dicom_pixels(path: Path) -> np.ndarray | None:
    """Grey pixels of a scan that is not a chest radiograph, uint8; otherwise ``None``."""
    if path.stat().st_size >= 20_000_000:
        return None
    try:
        dataset = pydicom.dcmread(path)
        chest = str(dataset.get("BodyPartExamined", "")).upper() == "CHEST" and dataset.Modality in ("CR", "DX")
        pixels = np.asarray(dataset.pixel_array, np.float32)
    except Exception:
        return None
    if chest or pixels.ndim != 2 or min(pixels.shape) < 32 or pixels.max() <= pixels.min():
        return None
    return (255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())).astype(np.uint8)


def _features(generator: ReportGenerator, radiograph: Radiograph) -> np.ndarray:
    pixels = preprocess_radiograph(radiograph, generator.bundle.manifest.preprocessing)
    return generator.backend.encode_image(pixels)


def _refused(gate: Gate, generator: ReportGenerator, radiograph: Radiograph) -> bool:
    try:
        gate.check(_features(generator, radiograph), radiograph.chroma)
    except CbedgeError:
        return True
    return False


def _draft(generator: ReportGenerator, radiograph: Radiograph, study: Study) -> tuple[Any, np.ndarray]:
    words = study.context.indication
    stream = generator.stream(radiograph, indication=words and clean_context(words), accept_any_image=True)
    for _ in stream:
        pass
    return stream.report, stream.attention


def _top_window(attention: np.ndarray) -> tuple[int, int]:
    size = len(attention) - _WINDOW + 1
    sums = {(r, c): attention[r : r + _WINDOW, c : c + _WINDOW].sum() for r in range(size) for c in range(size)}
    return max(sums, key=lambda place: sums[place])


def _grey(radiograph: Radiograph, window: tuple[int, int], patches: int) -> Radiograph:
    rows, columns = np.array(radiograph.pixels.shape) / patches
    pixels = radiograph.pixels.copy()
    top, left = int(window[0] * rows), int(window[1] * columns)
    pixels[top : int((window[0] + _WINDOW) * rows), left : int((window[1] + _WINDOW) * columns)] = pixels.mean()
    return replace(radiograph, pixels=pixels)


if __name__ == "__main__":
    app()
