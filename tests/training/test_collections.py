from pathlib import Path

import pytest

from cbedge.prompt import ClinicalContext
from training.datasets import COLLECTIONS, Collection, Study, find_provenance, open_studies
from training.datasets.provenance import Provenance
from training.ontology import TAGS


def test_a_new_collection_is_one_file_and_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my.csv").write_text("a.png,Clear lungs.\n")

    def studies(folder: Path, splits: tuple[str, ...], limit: int | None, cache: Path) -> list[Study]:
        rows = [line.split(",") for line in (folder / "my.csv").read_text().splitlines()]
        tags = (0,) * len(TAGS)
        return [Study(image, "train", folder / image, ClinicalContext(), text, text, "", tags) for image, text in rows][
            :limit
        ]

    mine = Collection(
        files="my.csv",
        provenance=Provenance("My hospital", "none", "here", "nobody"),
        is_in=lambda folder: (folder / "my.csv").is_file(),
        is_recognised=lambda folder: True,
        studies=studies,
        records=lambda folder, tally, cache: iter(()),
    )
    with pytest.raises(FileNotFoundError, match=r"IU X-RAY .* or|or IU X-RAY"):
        open_studies(tmp_path, ("train",))
    monkeypatch.setattr("training.datasets.COLLECTIONS", [mine, *COLLECTIONS])
    assert [study.findings for study in open_studies(tmp_path, ("train",))] == ["Clear lungs."]
    assert find_provenance(tmp_path).name == "My hospital"
