import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from conftest import ROOT
from dicom_node import another_bytes, names

from cbedge.services.dicom_node import MAX_DEATHS
from cbedge.services.spool import Spool

DYING = """
import os, sys
from pathlib import Path
from cbedge import ReportGenerator
from cbedge.services.dicom_node import Listener, ListenSettings

class Dying(ReportGenerator):
    def generate(self, image, lateral=None, **options):
        deadly = sys.argv[3:]
        if "any" in deadly or {image.stem, lateral and lateral.stem} & {*deadly}:
            os.kill(os.getpid(), 9)
        return super().generate(image, lateral=lateral, **options)

settings = ListenSettings("CBEDGE", "127.0.0.1", 1, ("X",), None, Path(sys.argv[2]), pair_wait_s=0.01)
listener = Listener(Dying.from_pretrained(sys.argv[1], device="cpu"), settings)
while listener.spool.waiting(listener.spool.incoming):
    listener._arrived.set()
    listener._draft_all()
"""


@pytest.fixture
def drafting(tiny_bundle: Path, film: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs a process that drafts what waits and dies at some radiographs; its exit code."""
    spool = Spool(tmp_path / "spool")
    for number, view in enumerate(("PA", "PA", "LL", "PA")):
        dataset = pydicom.dcmread(io.BytesIO(another_bytes(film, f"1.2.{number}")))
        dataset.ViewPosition, dataset.StudyInstanceUID = view, "1.3.4" if number in (1, 2) else f"1.3.{number}"
        dataset.PatientOrientation = None
        dataset.save_as(spool.incoming / f"1.2.{number}.dcm")
        os.utime(spool.incoming / f"1.2.{number}.dcm", (100 + number, 100 + number))
    spool._lock.release()

    def run(*deadly: str) -> int:
        command = [sys.executable, "-c", DYING, tiny_bundle, tmp_path / "spool", *deadly]
        return subprocess.run([*map(str, command)], cwd=ROOT, timeout=120).returncode

    return run


def test_an_image_at_which_processes_die_comes_last_then_alone_and_is_given_up_at_last(
    drafting: Callable, tmp_path: Path
):
    spool = tmp_path / "spool"
    assert drafting("1.2.0", "1.2.2") == -signal.SIGKILL  # at the oldest
    assert names(spool / "outgoing") == set()
    assert drafting("1.2.0", "1.2.2") == -signal.SIGKILL  # at the pair, as the others come first
    assert drafting("1.2.0", "1.2.2") == -signal.SIGKILL
    assert names(spool / "outgoing") == {"1.2.3.dcm"}
    for _ in range(7):
        assert drafting("1.2.0", "1.2.2") == -signal.SIGKILL
    assert drafting("1.2.0", "1.2.2") == 0
    assert names(spool / "outgoing") == {"1.2.1.dcm", "1.2.3.dcm"} and names(spool / "incoming") == set()
    assert names(spool / "failed") == {"1.2.0.dcm", "1.2.0.txt", "1.2.2.dcm", "1.2.2.txt"}
    told = (spool / "failed" / "1.2.0.txt").read_text()
    assert f"{MAX_DEATHS} processes ended" in told and "send it again or move it to the folder incoming" in told


def test_images_that_happen_to_be_in_turn_when_processes_are_killed_are_all_drafted(drafting: Callable, tmp_path: Path):
    for _ in range(7):
        assert drafting("any") == -signal.SIGKILL
    assert drafting() == 0
    assert names(tmp_path / "spool" / "failed") == set() and names(tmp_path / "spool" / "incoming") == set()
    assert {"1.2.0.dcm", "1.2.1.dcm", "1.2.3.dcm"} <= names(tmp_path / "spool" / "outgoing")


def test_an_attempt_is_on_disk_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spool = Spool(tmp_path / "spool")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.stat(number).st_ino))
    spool.begin(spool.incoming / "1.2.3.dcm", 2)
    assert synced == [(spool.incoming / "1.2.3.attempts").stat().st_ino, spool.incoming.stat().st_ino]
    assert spool.deaths() == {spool.incoming / "1.2.3.dcm": 3}
    spool.end(spool.incoming / "1.2.3.dcm")
    assert spool.deaths() == {}
