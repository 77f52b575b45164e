"""Collections in the layouts that users have them in, generated small; and what ``data check`` says of them."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call_cli, draw_chest
from PIL import Image

from training.datasets import Tally, open_records, open_studies
from training.datasets.iu_xray import hashed_split
from training.datasets.mimic_cxr import build_index, chexpert_tags, parse_report
from training.ontology import TAGS

XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{n}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="COMPARISON">None.</AbstractText>
<AbstractText Label="INDICATION">XXXX-year-old with cough</AbstractText>
<AbstractText Label="FINDINGS">The heart is enlarged. No XXXX of effusion.</AbstractText>
<AbstractText Label="IMPRESSION">Cardiomegaly.</AbstractText></Abstract></Article></MedlineCitation>
<MeSH><major>Cardiomegaly/mild</major></MeSH>
<parentImage id="CXR{n}_IM-000{n}-1001"/><parentImage id="CXR{n}_IM-000{n}-2001"/></eCitation>"""
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with shortness of breath  // ?pneumonia

 COMPARISON:  None.

 FINDINGS:

 The heart is mildly enlarged.  There is no pleural
 effusion: the sulci are sharp.  Catheter placed by Dr. ___ ends in the SVC.

 IMPRESSION:

 Mild cardiomegaly.
"""

MEASURE = """
import sys, tracemalloc
from pathlib import Path
from training.datasets.mimic_cxr import build_index
tracemalloc.start()
build_index(Path(sys.argv[1]), Path(sys.argv[2]))
print(tracemalloc.get_traced_memory()[1])
"""


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_chest(seed, 60, 50)).save(path)


def write_projections(folder: Path) -> None:
    rows = ["uid,filename,projection"]
    for n in (1, 2):
        rows += [f"{n},{n}_IM-000{n}-1001.dcm.png,Frontal", f"{n},{n}_IM-000{n}-2001.dcm.png,Lateral"]
    (folder / "indiana_projections.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def open_i(tmp_path: Path) -> Path:
    for n in (1, 2):
        (tmp_path / "ecgen-radiology").mkdir(exist_ok=True)
        (tmp_path / "ecgen-radiology" / f"{n}.xml").write_text(XML.format(n=n))
        save(tmp_path / "NLMCXR_png" / f"CXR{n}_IM-000{n}-1001.png", n)
    return tmp_path


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """Four studies: whole, without report sections, without frontal view, without labels."""
    return write_mimic(tmp_path, 4, pixels=True)


def write_mimic(folder: Path, studies: int, pixels: bool) -> Path:
    header = {
        "split": ["dicom_id", "study_id", "subject_id", "split"],
        "metadata": ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"],
        "chexpert": ["subject_id", "study_id", "Cardiomegaly", "Pleural Effusion", "No Finding"],
    }
    rows: dict[str, list[list]] = {name: [columns] for name, columns in header.items()}
    for i in range(studies):
        study, subject = 50_000_000 + i, 10_000_000 + i // 2
        place = folder / "files" / f"p{subject // 1_000_000}" / f"p{subject}" / f"s{study}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".txt").write_text("WET READ: nothing.\n" if i == 1 else REPORT)
        for position in ("LATERAL",) if i == 2 else ("AP", "PA", "LATERAL", ""):
            dicom = f"{i:08x}-{position or 'none'}"
            rows["split"].append([dicom, study, subject, ("train", "train", "test", "validate")[i % 4]])
            rows["metadata"].append([dicom, subject, study, position, 2544, 3056])
            if pixels:
                save(place / f"{dicom}.jpg", i)
        if i != 3:
            rows["chexpert"].append([subject, study, "1.0", "-1.0", ""])
    for name, table in rows.items():
        with gzip.open(folder / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows(table)
    return folder


def test_the_open_i_release_is_read_once_the_views_are_known(open_i: Path):
    tally = Tally()
    _, records = open_records(open_i, tally)
    assert [image.view for record in records for image in record.images] == [None, None]
    assert any("indiana_projections.csv" in note for note in tally.notes)
    write_projections(open_i)
    studies = open_studies(open_i, ("train", "val", "test"))
    assert [s.study_id for s in studies] == ["CXR1", "CXR2"]
    assert studies[0].image.name == "CXR1_IM-0001-1001.png"
    assert studies[0].target == "FINDINGS: The heart is enlarged. IMPRESSION: Cardiomegaly."
    assert "cough" in studies[0].context.indication and "XXX" not in studies[0].context.indication
    assert studies[0].split == hashed_split("CXR1")


def test_r2gens_annotation_beside_the_release_gives_its_splits(open_i: Path):
    write_projections(open_i)
    row = {"id": "CXR2_IM-0002", "report": "x", "image_path": []}
    (open_i / "annotation.json").write_text(json.dumps({"train": [], "val": [], "test": [row]}))
    assert [(s.study_id, s.split) for s in open_studies(open_i, ("test", "extra"))] == [
        ("CXR1", "extra"),
        ("CXR2", "test"),
    ]


def test_the_kaggle_pair_is_read(tmp_path: Path):
    write_projections(tmp_path)
    (tmp_path / "indiana_reports.csv").write_text(
        "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"
        '1,Cardiomegaly/mild,Cardiomegaly,Xray,"cough, fever",None.,The heart is enlarged.,Cardiomegaly.\n'
        "2,normal,normal,Xray,,,,\n"
    )
    save(tmp_path / "images" / "images_normalized" / "1_IM-0001-1001.dcm.png")
    tally = Tally()
    _, records = open_records(tmp_path, tally)
    first, second = records
    assert first.images[0].view == "frontal" and first.indication == "cough, fever"
    assert first.tags[TAGS.index("cardiomegaly")] == 1 and second.tags[0] == 0
    assert tally.dropped["image: in a report, but not on disk"] == 3


def test_r2gens_annotation_alone_is_read_and_its_gaps_are_said(tmp_path: Path):
    row = {"id": "CXR1_IM-0001", "report": "The heart is enlarged.", "image_path": ["CXR1_IM-0001/0.png"]}
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [row], "val": [], "test": []}))
    save(tmp_path / "images" / "CXR1_IM-0001" / "0.png")
    tally = Tally()
    _, records = open_records(tmp_path, tally)
    (record,) = records
    assert record.findings == "The heart is enlarged." and record.tags[0] == -1
    assert any("frontal" in note for note in tally.notes)


def test_a_mimic_report_is_taken_apart_by_its_headings():
    sections = parse_report(REPORT)
    assert sections["indication"] == "___F with shortness of breath // ?pneumonia"
    assert sections["findings"].endswith("Catheter placed by Dr. ___ ends in the SVC.")
    assert "sulci are sharp" in sections["findings"] and sections["impression"] == "Mild cardiomegaly."
    assert parse_report("REASON FOR EXAM: pain\nFINDINGS AND IMPRESSION: Clear lungs.") == {
        "indication": "pain",
        "findings": "Clear lungs.",
    }
    assert parse_report("WET READ: nothing.") == {}


def test_mimic_is_joined_and_what_is_dropped_is_counted(mimic: Path, tmp_path: Path):
    tally = build_index(mimic, tmp_path / "index" / "mimic.sqlite")
    assert tally.found["study"] == 4
    assert tally.dropped["study: no frontal radiograph on disk"] == 1
    assert tally.dropped["study: report without findings and impression"] == 1
    assert tally.dropped["image: view not given"] == 3
    studies = open_studies(mimic, ("train", "val"), cache=tmp_path / "index")
    assert [(s.study_id, s.split) for s in studies] == [("s50000000", "train"), ("s50000003", "val")]
    study = studies[0]
    assert study.image.name == "00000000-PA.jpg", "a PA film goes before an AP one"
    assert "___" not in study.target and "SVC" not in study.target and "shortness of breath" in study.context.indication
    assert (study.tags[0], study.tags[TAGS.index("cardiomegaly")], study.tags[TAGS.index("effusion")]) == (1, 1, -1)
    assert set(studies[1].tags) == {-1}, "a study without labels is known to be nothing"


@pytest.mark.slow
def test_the_index_of_a_large_tree_is_built_in_little_memory(tmp_path: Path):
    peaks = []
    for count in (1000, 8000):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_mimic(folder, count, pixels=False)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, folder, tmp_path / f"{count}.sqlite"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        peaks.append(int(done.stdout))
    # 7,000 rows of some 1 KB would be 7 MB; Python's table of interned strings grows in steps of up to 2 MB.
    assert peaks[1] - peaks[0] < 4_000_000


@pytest.mark.parametrize(
    "damage", [("split", b"dicom_id,study_id\n", "subject_id"), ("metadata", b"no gzip", "damaged")]
)
def test_a_damaged_table_is_named(mimic: Path, tmp_path: Path, damage: tuple[str, bytes, str]):
    name, content, said = damage
    path = mimic / f"mimic-cxr-2.0.0-{name}.csv.gz"
    path.write_bytes(content if said == "damaged" else gzip.compress(content))
    with pytest.raises(ValueError, match=said):
        build_index(mimic, tmp_path / "index.sqlite")
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "index.sqlite").exists()


def test_labels_that_are_uncertain_or_not_told_are_not_known():
    tags = dict(zip(TAGS, chexpert_tags({"Cardiomegaly": "1.0", "Edema": "-1.0", "No Finding": ""}), strict=True))
    assert (tags["abnormal"], tags["cardiomegaly"], tags["congestion"], tags["hernia"]) == (1, 1, -1, -1)
    assert tags["pneumothorax"] == 0
    assert chexpert_tags({"No Finding": "1.0"})[0] == 0


def test_data_check_tells_and_plots(tiny_data: Path, tmp_path: Path):
    plot = tmp_path / "plot.png"
    done = call_cli("training", "data", "check", tiny_data, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "unnamed data at" in done.stdout and "20" in done.stdout and "cardiomegaly" in done.stdout
    with Image.open(plot) as image:
        assert image.format == "PNG"
    again = call_cli("training", "data", "check", tiny_data, "--plot", plot)
    assert again.returncode == 1 and "--force" in again.stderr


def test_data_check_of_nothing_known_is_one_line(tmp_path: Path):
    done = call_cli("training", "data", "check", tmp_path)
    assert done.returncode == 1 and "no known collection" in done.stderr and "Traceback" not in done.stderr
