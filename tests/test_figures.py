import json
from pathlib import Path

import pytest
import yaml

from benchmarks.common import ROOT
from benchmarks.figures import RESULTS, Records, filled, pages
from cbedge.bundles.bundle import DEFAULT_BUNDLE
from cbedge.provenance import describe_bundle

OURS = {"name": "m", "version": "2", "sha256": "a" * 64}
PLACES = "F1 <!-- figure: new a/b c/0 .3 -->?<!-- /figure -->, <!-- figure: new n d -->?<!-- /figure --> studies.\n"
RECORDS = "<!-- records --><!-- /records -->\n"
TABLE = {
    "record": "new",
    "columns": {"F1": "{a/ROW/0|.2} ({a/ROW/1|.0%})"},
    "rows": {"ours": "b c", "old": ["old", "x"]},
}


@pytest.fixture
def records(tmp_path: Path) -> Records:
    date = {"machine": {"date": "2026-11-28"}}
    new = date | {
        "commit": "0123456789abcdef",
        "bundle": OURS,
        "a": {"b c": [0.7315, 0.5]},
        "n": 567,
        "none": float("nan"),
        "nothing": None,
    }
    other = date | {"commit": "c0", "bundle": OURS | {"version": "1", "sha256": "b" * 64}, "s": 1.25, "t": -0.5}
    for name, record in {"new": new, "other": other, "old": {"date": "2026-11-01", "a": {"x": [1.0, 0.25]}}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return Records(tmp_path, OURS)


def test_figures_are_those_of_the_record_and_stay_when_written_again(records: Records):
    text = filled(PLACES + RECORDS, records, {})
    assert "F1 <!-- figure: new a/b c/0 .3 -->.732<!-- /figure -->, <!-- figure: new n d -->567<!-- /figure -->" in text
    assert "`new` (2026-11-28, commit 0123456789ab; the embedded bundle)." in text
    assert filled(text, records, {}) == text


def test_a_score_is_written_without_the_zero_before_its_point(records: Records):
    assert records.value("other", "s", ".2") == "1.25" and records.value("other", "t", ".2") == "-.50"
    assert records.value("other", "t", ".1f") == "-0.5" and records.value("new", "none", ".3") == ""


def test_a_table_takes_rows_of_several_records_and_older_ones_are_named(records: Records):
    text = filled("<!-- table: t --><!-- /table -->\n" + RECORDS, records, {"t": TABLE})
    assert "| | F1 |\n| --- | --- |\n| ours | .73 (50%) |\n| old | 1.00 (25%) |\n\n<!-- /table -->" in text
    assert "`old` (2026-11-01; an older record of a model that it does not name)" in text


def test_a_cell_of_what_was_not_measured_is_empty(records: Records):
    assert records.fill("new", "{nothing/auc/0|.2} ({nothing/auc/1|.2})") == ""
    assert records.fill("new", "{a/b c/0|.2} ({nothing/auc|.2})") == ".73 ()"


def test_a_figure_of_another_bundle_says_so(records: Records):
    text = filled("<!-- figure: other s .2 --><!-- /figure -->" + RECORDS, records, {})
    assert "`other` (2026-11-28, commit c0; another bundle than the embedded one, 1 bbbbbbbb)" in text


def test_a_page_that_quotes_figures_and_does_not_say_of_what_is_refused(records: Records):
    with pytest.raises(ValueError, match="does not say of which bundle"):
        filled(PLACES, records, {})
    with pytest.raises(ValueError, match=r"new\.json has no 'a/z' \(at 'z'\)"):
        filled("<!-- figure: new a/z .3 --><!-- /figure -->", records, {})


def test_the_pages_have_the_figures_of_the_records():
    embedded = Records(RESULTS, describe_bundle(DEFAULT_BUNDLE))
    tables = yaml.safe_load((ROOT / "benchmarks" / "figures.yaml").read_text(encoding="utf-8"))
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert filled(text, embedded, tables) == text, f"{page.name}: type python -m benchmarks.figures"
