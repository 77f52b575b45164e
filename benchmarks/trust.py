"""Measure how often the gate is wrong, and whether the heat map points at what matters.

*gate*: the share of radiographs that it accepts, of altered ones that it tells, and of other images that it refuses.
*occlusion*: greying the image window with the most attention must change the draft more than greying a random one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from benchmarks.common import write_record
from cbedge import CbedgeError, ReportGenerator
from cbedge.images.familiarity import LIMIT
from cbedge.images.gate import CLASSES
from cbedge.images.preprocess import preprocess_radiograph
from cbedge.images.radiograph import Radiograph, load_radiograph
from cbedge.prompt import clean_context
from cbedge.provenance import provenance
from export.film_samples import ALTERATIONS, LABELS, Alteration, collect_films
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
_WINDOW = 5  # patches, of 16


@app.command("gate")
def gate_command(
    data: Data,
    output: Output,
    model: Model = None,
    films: Annotated[list[Path] | None, typer.Option(help="More folders of films, with films.jsonl.")] = None,
    other_images: Annotated[Path | None, typer.Option(help="Images to refuse, in a folder for each kind.")] = None,
    split: Annotated[str, typer.Option(help="Films: val, as the fit leaves them out, or test.")] = "test",
    variant: Annotated[str | None, typer.Option(help="Variant of the model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Films of each collection and view.")] = None,
    altered: Annotated[int, typer.Option(min=0, help="Films of each collection and view that are also altered.")] = 100,
) -> None:
    """Count radiographs that are accepted, altered ones that are refused or told, and other images that are refused."""
    generator = ReportGenerator.from_pretrained(model, variant=variant, device="cpu")
    if generator.film_check.gate is None:
        raise CbedgeError("the bundle has no gate: export it with --data")
    record = provenance(f"IU X-RAY and {len(films or ())} other collections, {split}", model)
    record |= {"variant": generator.variant, "split": split, "films": {}, "altered": {}, "others": {}}
    for collection in collect_films(data, films or (), split):
        for view, paths in collection.validation.items():
            name, chosen = f"{collection.name} {view}", paths[:limit]
            seen = [_seen(generator, load_radiograph(path), view) for path in track(chosen, name)]
            if not seen:
                continue
            record["films"][name] = {
                "accepted": _share([one.accepted for one in seen]),
                "told as another view": _share([one.view != view for one in seen]),
                "told as mirrored": _share([one.mirrored for one in seen]),
                "unfamiliar": _share([one.unfamiliarity > LIMIT for one in seen]),
            }
            for alteration, change in ALTERATIONS.items():
                if (alteration == "mirrored" and view == "lateral") or not altered:
                    continue
                changed = [_altered(generator, path, view, change) for path in track(chosen[:altered], alteration)]
                told = [not one.accepted or one.mirrored for one in changed]
                record["altered"][f"{name}, {alteration}"] = {
                    "refused or told": _share(told),
                    "named": _share([one.name == LABELS[alteration] for one in changed]),
                }
    for path in sorted(other_images.rglob("*")) if other_images is not None else ():
        if path.is_file():
            accepted = _seen(generator, load_radiograph(path), "frontal").accepted
            record["others"].setdefault(path.parent.name, {})[path.name] = not accepted
    refusals = [value for kind in record["others"].values() for value in kind.values()]
    record["others"] = {
        kind: _share([*values.values()]) | {"accepted": sorted(name for name in values if not values[name])}
        for kind, values in record["others"].items()
    }
    if refusals:
        record["others"]["all"] = _share(refusals)
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


@dataclass(frozen=True)
class _Seen:
    """What the gate makes of one image: whether it is accepted, the likeliest class, and what it says of a film."""

    accepted: bool
    name: str
    view: str
    mirrored: bool
    unfamiliarity: float


def _seen(generator: ReportGenerator, radiograph: Radiograph, view: str) -> _Seen:
    check, features = generator.film_check, _features(generator, radiograph)
    assert check.gate is not None
    logits = check.gate.logits(features)
    lateral = check.gate.is_lateral(logits)
    return _Seen(
        check.gate.reason(logits, radiograph.chroma) is None,
        CLASSES[int(np.argmax(logits))],
        "lateral" if lateral else "frontal",
        view == "frontal" and not lateral and check.gate.is_mirrored(logits),
        check.familiarity.unfamiliarity(features, view) if check.familiarity else 0.0,
    )


def _altered(generator: ReportGenerator, path: Path, view: str, change: Alteration) -> _Seen:
    radiograph = load_radiograph(path)
    pixels = np.ascontiguousarray(change(radiograph.pixels, np.random.default_rng(0)))
    return _seen(generator, replace(radiograph, pixels=pixels, stored=None), view)


def _share(values: list[bool]) -> dict[str, Any]:
    """How many of the values are true, with Wilson's 95% interval of the share."""
    count, total, z = sum(values), len(values), 1.96
    share, room = count / total, z * z / total
    middle, half = share + room / 2, z * math.sqrt(share * (1 - share) / total + room / (4 * total))
    interval = [round((middle + sign * half) / (1 + room), 4) for sign in (-1, 1)]
    return {"count": count, "of": total, "share": round(share, 4), "interval": interval}


def _features(generator: ReportGenerator, radiograph: Radiograph) -> np.ndarray:
    pixels = preprocess_radiograph(radiograph, generator.bundle.manifest.preprocessing)
    return generator.backend.encode_image(pixels)


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
