"""The embedded model writes what it wrote: see golden/README.md."""

import json

import pytest
from conftest import IN_INT8, needs_default_model
from golden.drafts import FOLDER, VARIANTS, described, drafts

from cbedge import ReportGenerator

# Sums in another order, as on another processor, may tip a draft though the films were chosen not to be near that.
TIPPED = 2


@needs_default_model
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_are_what_they_were(variant: str):
    if variant == "q4a8" and not IN_INT8:
        pytest.skip("q4a8 is for x86 processors")
    golden = json.loads((FOLDER / "drafts.json").read_text(encoding="utf-8"))
    changed = {}
    for name, report in drafts(ReportGenerator.from_pretrained(variant=variant, device="cpu")):
        wanted = golden[f"{variant} {name}"]
        scores = wanted.pop("scores")
        assert report.finding_scores == pytest.approx(scores, abs=0.03), name
        if described(report) != wanted:
            changed[name] = (described(report), wanted)
    assert len(changed) <= TIPPED, changed
