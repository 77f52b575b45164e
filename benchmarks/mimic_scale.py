"""Index and read a generated tree of the size of MIMIC-CXR, and measure time and memory.

The tree has the tables and folders of MIMIC-CXR-JPG, invented reports, and empty image files (none is opened).
"""

import csv
import gzip
import random
import resource
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from benchmarks.common import conditions, typed, write_record
from training.datasets import open_studies
from training.datasets.mimic_cxr import PREFIX, build_index, index_path

IMAGES = 377_110  # of MIMIC-CXR-JPG 2.0.0
HEADERS = {
    "split": ["dicom_id", "study_id", "subject_id", "split"],
    "metadata": ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"],
    "chexpert": ["subject_id", "study_id", "Cardiomegaly", "Edema", "Pleural Effusion", "No Finding"],
}
REPORT = """                                 FINAL REPORT
 INDICATION:  ___ year old with {indication}.

 COMPARISON:  None.

 FINDINGS:

 The heart is {heart}. {lungs} There is no pneumothorax.

 IMPRESSION:

 {impression}
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def write_tree(folder: Path, images: int, seed: int = 0) -> None:
    """Write tables, reports and empty image files for ``images`` images in PhysioNet's layout."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        tables = {}
        for name, header in HEADERS.items():
            path = folder / f"{PREFIX}{name}.csv.gz"
            tables[name] = csv.writer(stack.enter_context(gzip.open(path, "wt", newline="", compresslevel=1)))
            tables[name].writerow(header)
        _write_studies(folder, images, rng, tables)


def _write_studies(folder: Path, images: int, rng: random.Random, tables: dict[str, Any]) -> None:
    count = study = 0
    while count < images:
        study += 1
        number, subject = 50_000_000 + study, 10_000_000 + study // 3 * 40
        place = folder / "files" / f"p{subject // 1_000_000}" / f"p{subject}" / f"s{number}"
        place.mkdir(parents=True)
        large, wet = rng.random() < 0.3, rng.random() < 0.2
        text = REPORT.format(
            indication=rng.choice(("cough", "fever", "chest pain", "dyspnea")),
            heart="enlarged" if large else "normal in size",
            lungs="There is a small effusion." if wet else "The lungs are clear.",
            impression="Cardiomegaly." if large else "No acute disease.",
        )
        if rng.random() < 0.02:
            text = "WET READ: nothing to add.\n"
        place.with_suffix(".txt").write_text(text, encoding="utf-8")
        split = "test" if study % 60 == 0 else "validate" if study % 61 == 0 else "train"
        for position in rng.choice((("PA", "LATERAL"), ("AP",), ("PA", "LL"), ("AP", "AP"), ("LATERAL",), ("",))):
            if count == images:
                break
            dicom = f"{rng.getrandbits(128):032x}"
            (place / f"{dicom}.jpg").touch()
            tables["split"].writerow([dicom, number, subject, split])
            tables["metadata"].writerow([dicom, subject, number, position, 3056, 2544])
            count += 1
        labels = ["1.0" if large else "", "-1.0" if wet else "", "1.0" if wet else "", "" if large or wet else "1.0"]
        tables["chexpert"].writerow([subject, number, *labels])


@app.command(help=__doc__)
def main(
    images: Annotated[int, typer.Option(min=1, help="Rows of the split table.")] = IMAGES,
    output: Annotated[Path | None, typer.Option(help="JSON record to write.")] = None,
) -> None:
    """Generate, index and open a tree, and read studies at random."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "mimic", Path(scratch) / "index"
        folder.mkdir()
        write_tree(folder, images)
        before = _peak()
        start = perf_counter()
        tally = build_index(folder, index_path(folder, cache))
        built, peak = perf_counter() - start, _peak()
        start = perf_counter()
        studies = open_studies(folder, ("train",), cache=cache)
        opened = perf_counter() - start
        start = perf_counter()
        for row in random.Random(0).sample(range(len(studies)), min(10_000, len(studies))):
            _ = studies[row].target
        record = {
            "images": images,
            "studies": tally.found["study"],
            "train_studies": len(studies),
            "dropped": dict(tally.dropped),
            "index_mb": index_path(folder, cache).stat().st_size / 1e6,
            "build_s": built,
            "open_s": opened,
            "read_10000_s": perf_counter() - start,
            "memory_before_mb": before,
            "memory_after_index_mb": peak,
            "memory_after_all_mb": _peak(),
        }
    write_record(conditions(typed("mimic_scale")) | record, output)


def _peak() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    app()
