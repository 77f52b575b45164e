"""The examples for integrators, run as they are; ``monai_operator.py`` runs in .ci/run, in its own environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES, ROOT, free_port, needs_orthanc, orthanc, wait_for

from cbedge import ReportGenerator
from cbedge.report import DRAFT_STATEMENT


def test_the_qt_viewer_shows_the_draft_as_the_library_writes_it(
    tiny_bundle: Path, chest_png: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    widgets = pytest.importorskip("PySide6.QtWidgets", reason="PySide6 is not installed", exc_type=ImportError)
    monkeypatch.syspath_prepend(EXAMPLES)
    import qt_viewer

    app = widgets.QApplication.instance() or widgets.QApplication([])
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")
    viewer = qt_viewer.Viewer(generator, chest_png)
    viewer.show()
    viewer.indication.setText("cough")
    viewer.button.click()
    assert not viewer.button.isEnabled()

    def done() -> bool:
        app.processEvents()
        return viewer.button.isEnabled()

    wait_for(done)
    assert viewer.draft.toPlainText().strip() == generator.generate(chest_png, indication="cough").text
    assert viewer.status.text() == DRAFT_STATEMENT


@needs_orthanc
def test_the_pacs_script_drafts_a_study_that_orthanc_holds(tmp_path: Path):
    port = free_port()
    with orthanc(tmp_path / "orthanc", "PACS", port, {}) as client:
        kept = client.post("/instances", content=(EXAMPLES / "chest_pa.dcm").read_bytes()).json()
        study = client.get(f"/studies/{kept['ParentStudy']}").json()["MainDicomTags"]["StudyInstanceUID"]
        command = [sys.executable, EXAMPLES / "pacs_drafts.py", f"PACS@127.0.0.1:{port}", study]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "a draft was stored" in done.stdout, done.stderr
        instances = client.get(f"/studies/{kept['ParentStudy']}/instances").json()
        assert len(instances) == 2
        nobody = subprocess.run(
            [*command[:2], "PACS@127.0.0.1:1", study], capture_output=True, text=True, env=environment
        )
        assert nobody.returncode == 1 and "Traceback" not in nobody.stderr
