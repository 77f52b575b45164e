import json
from pathlib import Path

import pytest
from conftest import REPORTS, call_cli

from training.browser import write_browser


@pytest.fixture
def drafts(tmp_path: Path) -> Path:
    path = tmp_path / "drafts.jsonl"
    rows = [
        {
            "study_id": "S1",
            "indication": "<b>cough</b>",
            "findings": REPORTS[1][0],
            "impression": REPORTS[1][1],
            "tags": ["abnormal", "cardiomegaly"],
            "drafts": {
                "own": "FINDINGS: The heart is enlarged. There is an opacity. No pneumothorax. IMPRESSION: Bad."
            },
        },
        {
            "study_id": "S0",
            "indication": None,
            "findings": REPORTS[0][0],
            "impression": REPORTS[0][1],
            "tags": [],
            "drafts": {"own": "FINDINGS: The lungs are clear."},
        },
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_page_shows_what_is_matched_missed_invented_and_denied(drafts: Path, tiny_data: Path, tmp_path: Path):
    out = tmp_path / "page.html"
    assert write_browser(drafts, tiny_data, None, out) == 2
    page = out.read_text()
    assert '<mark class="matched">heart is enlarged</mark>' in page
    assert '<mark class="missed">pleural effusion</mark>' in page
    assert '<mark class="invented">opacity</mark>' in page and '<mark class="denied">pneumothorax</mark>' in page
    assert "data:image/jpeg;base64," in page and "http" not in page
    assert "<b>cough</b>" not in page, "what a report says is never markup"


def test_a_row_that_is_not_there_is_named(drafts: Path, tiny_data: Path, tmp_path: Path):
    done = call_cli(
        "training", "browse", drafts, "--data", tiny_data, "--row", "other", "--out", tmp_path / "page.html"
    )
    assert done.returncode == 1 and "'other'" in done.stderr and not (tmp_path / "page.html").exists()
