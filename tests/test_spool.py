import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from dicom_node import another_bytes, names

from cbedge import ReportGenerator
from cbedge.services.dicom_node import MAX_DEATHS, Listener, ListenSettings
from cbedge.services.spool import Spool

# Each process is a fork of one that has the imports behind it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cbedge.services.dicom_node"])


class Dying(ReportGenerator):
    deadly: tuple[str, ...] = ()

    def generate(self, image, lateral=None, **options):
        if "any" in self.deadly or {image.stem, lateral and lateral.stem} & {*self.deadly}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(image, lateral=lateral, **options)


def draft_all(bundle: Path, spool: Path, deadly: tuple[str, ...]) -> None:
    Dying.deadly = deadly
    settings = ListenSettings("CBEDGE", "127.0.0.1", 1, ("X",), None, spool, pair_wait_s=0.01)
    listener = Listener(Dying.from_pretrained(bundle, device="cpu"), settings)
    while listener.spool.waiting(listener.spool.incoming):
        listener._arrived.set()
        listener._draft_all()


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
        process = FORKS.Process(target=draft_all, args=(tiny_bundle, tmp_path / "spool", deadly))
        process.start()
        process.join(120)
        return process.exitcode

    return run


@pytest.mark.slow
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
