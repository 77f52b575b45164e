import io
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
import pytest
from conftest import free_port, needs_orthanc, needs_program, orthanc, run_cli, wait_for
from dicom_node import another, another_bytes, is_done, names, send
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import EnhancedSRStorage

from cbedge import ContextError, ReportGenerator
from cbedge.images.dicom_header import is_uid
from cbedge.services.dicom_node import Listener, ListenSettings, Peer

needs_dcmtk = needs_program("storescu", "dcmtk")


class Pacs:
    """A store of Structured Reports, by pynetdicom."""

    def __init__(self, port: int):
        self.taken: list[pydicom.Dataset] = []
        node = AE("PACS")
        node.add_supported_context(EnhancedSRStorage, ExplicitVRLittleEndian)
        self.server = node.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self.take)])

    def take(self, event: evt.Event) -> int:
        self.taken.append(event.dataset)
        return 0x0000


def test_a_radiograph_sent_comes_back_as_a_structured_report(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    port, process = listen(pacs_port)
    dataset = pydicom.dcmread(film)
    assert send(port, dataset) == 0
    wait_for(lambda: pacs.taken)
    document = pacs.taken[0]
    assert document.StudyInstanceUID == dataset.StudyInstanceUID and document.PreliminaryFlag == "PRELIMINARY"
    assert send(port, dataset, "STRANGER") is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert "drafted" in log and "CompressedSamples" not in log and "Traceback" not in log
    pacs.server.shutdown()


@pytest.mark.slow
def test_two_views_of_a_study_make_one_draft_and_the_rest_one_each(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    port, _ = listen(pacs_port, wait=4)
    sent = [another(film) for _ in range(4)]
    views = ("LL", "PA", "PA", None)
    studies = ("1.2.3", "1.2.3", "1.2.4", "1.2.3")  # a pair, a frontal one alone, and one of an unknown view
    for dataset, view, study in zip(sent, views, studies, strict=True):
        dataset.ViewPosition, dataset.StudyInstanceUID, dataset.PatientOrientation = view, study, None
        dataset.PixelData = dataset.PixelData[1:] + dataset.PixelData[:1] if view == "LL" else dataset.PixelData
        assert send(port, dataset) == 0
    wait_for(lambda: is_done(tmp_path / "spool"))
    # What is complete, or says of no view, does not wait.
    assert [d.StudyInstanceUID for d in pacs.taken] == ["1.2.3", "1.2.3", "1.2.4"]
    assert not [*(tmp_path / "spool").rglob("*.dcm")]
    pacs.server.shutdown()


@pytest.mark.slow
def test_killed_and_with_the_pacs_away_nothing_is_lost_and_nothing_comes_twice(
    listen: Callable, film: Path, tmp_path: Path
):
    pacs_port = free_port()
    sent = []
    for _ in range(3):  # nobody is there to take the drafts, and the listener dies each time
        port, process = listen(pacs_port)
        for _ in range(3):
            dataset = another(film)
            assert send(port, dataset) == 0
            sent.append(dataset.SOPInstanceUID)
        process.kill()
        process.wait()
    pacs = Pacs(pacs_port)
    listen(pacs_port)
    wait_for(lambda: is_done(tmp_path / "spool"))
    drafted = [
        d.CurrentRequestedProcedureEvidenceSequence[0]
        .ReferencedSeriesSequence[0]
        .ReferencedSOPSequence[0]
        .ReferencedSOPInstanceUID
        for d in pacs.taken
    ]
    assert sorted(drafted) == sorted(sent)
    pacs.server.shutdown()


def test_what_cannot_be_drafted_is_kept_with_the_reason(listen: Callable, film: Path, tmp_path: Path):
    port, _ = listen(free_port())
    dataset = another(film)
    dataset.Modality = "CT"
    assert send(port, dataset) == 0
    wait_for(lambda: list((tmp_path / "spool" / "failed").glob("*.dcm")))
    assert "modality CT" in next((tmp_path / "spool" / "failed").glob("*.txt")).read_text()


def test_an_image_that_raises_an_unforeseen_error_fails_alone_and_the_next_one_is_drafted(
    listen: Callable, film: Path, tmp_path: Path
):
    away = free_port()
    port, _ = listen(away)
    odd, good = another(film), another(film)
    odd.StudyInstanceUID = "abc"
    assert send(port, odd) == 0x0000
    assert send(port, good) == 0x0000
    spool = tmp_path / "spool"
    wait_for(lambda: (spool / "outgoing" / f"{good.SOPInstanceUID}.dcm").exists())
    assert (spool / "failed" / f"{odd.SOPInstanceUID}.dcm").exists()
    reason = (spool / "failed" / f"{odd.SOPInstanceUID}.txt").read_text()
    assert "StudyInstanceUID" in reason and "abc" not in reason
    wait_for(lambda: not list((spool / "incoming").iterdir()))


def test_an_odd_header_gives_a_draft_without_what_is_odd(listen: Callable, film: Path):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    port, _ = listen(pacs_port)
    odd = another(film)
    odd.PatientBirthDate, odd.PatientSex, odd.StudyTime = "1940", "U", "12:30:11"
    assert send(port, odd) == 0
    wait_for(lambda: pacs.taken)
    document = pacs.taken[0]
    assert document.PatientID == odd.PatientID and not document.PatientBirthDate and not document.PatientSex
    told = " ".join(str(item.TextValue) for item in document.ContentSequence if "TextValue" in item)
    assert "PatientBirthDate, PatientSex, StudyTime" in told
    pacs.server.shutdown()


def test_one_image_sent_by_many_at_once_is_taken_from_each_and_drafted_once(
    listen: Callable, film: Path, tmp_path: Path
):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    port, _ = listen(pacs_port)
    dataset = another(film)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda _: send(port, dataset), range(24))] == [0] * 24
    wait_for(lambda: is_done(tmp_path / "spool"))
    assert len({d.SOPInstanceUID for d in pacs.taken}) == 1
    pacs.server.shutdown()


def test_an_image_with_the_uid_of_another_study_is_not_taken_for_it(listen: Callable, film: Path, tmp_path: Path):
    spool = tmp_path / "spool"
    port, _ = listen(free_port())  # nobody takes the drafts
    first, second, third = another(film), another(film), another(film)
    uid = second.SOPInstanceUID = third.SOPInstanceUID = first.SOPInstanceUID
    second.StudyInstanceUID, third.PatientID = "1.2.3", "SOMEBODY_ELSE"
    assert send(port, first) == 0
    wait_for(lambda: (spool / "outgoing" / f"{uid}.dcm").exists() and not list((spool / "incoming").iterdir()))
    for other in (second, third, second):  # the last one is sent again
        assert send(port, other) == 0xC000
    assert send(port, first) == 0
    wait_for(lambda: not list((spool / "incoming").iterdir()))
    draft = pydicom.dcmread(spool / "outgoing" / f"{uid}.dcm")
    assert (draft.StudyInstanceUID, draft.PatientID) == (first.StudyInstanceUID, first.PatientID)
    kept = [pydicom.dcmread(path) for path in (spool / "failed").glob("*.dcm")]
    assert {(d.StudyInstanceUID, d.PatientID) for d in kept} == {
        (d.StudyInstanceUID, d.PatientID) for d in (second, third)
    }
    assert len(kept) == 2
    for path in (spool / "failed").glob("*.txt"):
        assert "also that of a radiograph of another study or patient" in path.read_text()
    log = (tmp_path / "log").read_text()
    assert log.count("moved to failed") == 3 and "SOMEBODY" not in log
    (spool / "outgoing" / f"{uid}.dcm").unlink()  # delivered
    assert send(port, second) == 0
    wait_for(lambda: (spool / "outgoing" / f"{uid}.dcm").exists())
    assert pydicom.dcmread(spool / "outgoing" / f"{uid}.dcm").StudyInstanceUID == "1.2.3"


@pytest.mark.slow
def test_another_film_of_a_uid_replaces_neither_the_waiting_one_nor_its_draft(
    listen: Callable, film: Path, tmp_path: Path
):
    spool = tmp_path / "spool"
    pacs_port = free_port()  # nobody takes the drafts yet
    port, _ = listen(pacs_port, wait=4)
    first, second = another(film), another(film)
    uid = second.SOPInstanceUID = first.SOPInstanceUID
    second.PixelData = second.PixelData[::-1]
    for dataset in (first, second):
        dataset.ViewPosition, dataset.PatientOrientation = "PA", None  # waits for the lateral view
    assert [send(port, dataset) for dataset in (first, second, first, second)] == [0, 0xC000, 0, 0xC000]
    wait_for(lambda: names(spool / "outgoing") == {f"{uid}.dcm"} and not list((spool / "incoming").iterdir()))
    draft = (spool / "outgoing" / f"{uid}.dcm").read_bytes()
    assert names(spool / "failed") == {f"{uid}.dcm", f"{uid}.txt"}
    assert pydicom.dcmread(spool / "failed" / f"{uid}.dcm").PixelData == second.PixelData
    reason = "its SOP Instance UID is also that of another radiograph that waits here"
    assert reason in (spool / "failed" / f"{uid}.txt").read_text()
    log = (tmp_path / "log").read_text()
    assert log.count(f"moved to failed: {reason}") == 2 and log.count("drafted in") == 1
    assert send(port, second) == 0  # the draft of the first one is not delivered, and is kept beside the second one
    wait_for(lambda: len(names(spool / "outgoing")) == 2 and not list((spool / "incoming").iterdir()))
    assert (spool / "outgoing" / f"{uid}.dcm").read_bytes() == draft
    pacs = Pacs(pacs_port)
    wait_for(lambda: not names(spool / "outgoing"))
    assert len({document.SOPInstanceUID for document in pacs.taken}) == 2
    pacs.server.shutdown()


def test_a_failed_image_is_not_replaced_by_another_of_its_uid(listen: Callable, film: Path, tmp_path: Path):
    failed = tmp_path / "spool" / "failed"
    port, _ = listen(free_port())
    for patient, count in (("A", 1), ("B", 2), ("A", 2), ("B", 2)):
        dataset = pydicom.dcmread(film)
        dataset.Modality, dataset.PatientID = "CT", patient
        assert send(port, dataset) == 0
        wait_for(lambda: not list((tmp_path / "spool" / "incoming").iterdir()))
        assert len(list(failed.glob("*.dcm"))) == len(list(failed.glob("*.txt"))) == count
    assert {pydicom.dcmread(path).PatientID for path in failed.glob("*.dcm")} == {"A", "B"}


def test_a_spool_heals(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    spool = tmp_path / "spool"
    for part in ("incoming", "outgoing", "failed"):
        (spool / part / "folder.dcm").mkdir(parents=True)
        (spool / part / ".hidden").mkdir()
    (spool / "incoming" / "1.2.3.dcm").touch()
    (spool / "incoming" / "notes.txt").write_text("somebody's")
    (spool / "incoming" / "dead.dcm").symlink_to(tmp_path / "nothing")
    for pipe in ("pipe.dcm", "1.2.5.7.attempts"):
        os.mkfifo(spool / "incoming" / pipe)
    (spool / "incoming" / "1.2.5.7.dcm").write_bytes(another_bytes(film, "1.2.5.7"))
    (spool / "outgoing" / "1.2.4.dcm").write_text("no draft")
    (spool / "incoming" / "1.2.5.dcm").write_bytes(film.read_bytes())
    (spool / "incoming" / "1.2.5.attempts").write_text("5")  # it ended five processes
    (spool / "incoming" / "1.2.6.attempts").write_text("1")  # of a radiograph that is gone
    port, _ = listen(pacs_port)
    assert send(port, another(film)) == 0
    wait_for(lambda: pacs.taken and {"1.2.3.txt", "sr-1.2.4.txt", "1.2.5.txt"} <= {*names(spool / "failed")})
    assert "5 processes ended while they drafted it" in (spool / "failed" / "1.2.5.txt").read_text()
    ignored = {"folder.dcm", ".hidden", "notes.txt", "dead.dcm", "pipe.dcm"}
    wait_for(lambda: names(spool / "incoming") == ignored)
    os.replace(spool / "failed" / "1.2.5.dcm", spool / "incoming" / "1.2.5.dcm")  # as the reason tells to
    assert send(port, another(film)) == 0
    wait_for(lambda: len(pacs.taken) == 4)
    log = (tmp_path / "log").read_text()
    for fault in (
        "it is a folder",
        "it is a link to nothing",
        "it is not a regular file",
        "its name does not end with",
    ):
        count = 2 if fault == "it is not a regular file" else 1
        assert log.count(f"an entry of the folder incoming is ignored because {fault}") == count
    shutil.rmtree(spool)
    assert send(port, another(film)) == 0
    wait_for(lambda: len(pacs.taken) == 5)
    pacs.server.shutdown()


def test_a_clock_that_was_set_back_keeps_no_image_waiting(receiver: Callable, film: Path):
    listener = receiver()
    listener._pair_wait = 10.0
    path = listener.spool.failed / "1.2.3.dcm"  # a folder that nobody works in
    dataset = pydicom.dcmread(io.BytesIO(another_bytes(film, "1.2.3")))
    dataset.ViewPosition, dataset.PatientOrientation = "PA", None
    dataset.save_as(path)
    assert listener._studies([path], {}) == [] and 5 < listener._held <= 10
    os.utime(path, (time.time() + 3600, time.time() + 3600))
    assert listener._studies([path], {}) == [(path, None)]


def test_an_image_that_is_sent_again_while_it_is_drafted_is_drafted_again(
    tiny_bundle: Path, film: Path, tmp_path: Path
):
    class SentMeanwhile(ReportGenerator):
        def generate(self, *args, **kwargs):
            report = super().generate(*args, **kwargs)
            listener.spool.put(path.parent, path.name, another_bytes(film, "1.2.3"))
            return report

    settings = ListenSettings("CBEDGE", "127.0.0.1", free_port(), ("X",), None, tmp_path / "spool")
    listener = Listener(SentMeanwhile.from_pretrained(tiny_bundle, device="cpu"), settings)
    path = listener.spool.incoming / "1.2.3.dcm"
    path.write_bytes(another_bytes(film, "1.2.3"))
    listener._draft(path)
    assert path.exists() and names(listener.spool.outgoing) == {"1.2.3.dcm"}


def test_too_many_open_files_keep_the_image(tiny_bundle: Path, film: Path, tmp_path: Path):
    resource = pytest.importorskip("resource")
    settings = ListenSettings("CBEDGE", "127.0.0.1", free_port(), ("X",), None, tmp_path / "spool")
    listener = Listener(ReportGenerator.from_pretrained(tiny_bundle, device="cpu"), settings)
    path = listener.spool.incoming / "1.2.3.dcm"
    path.write_bytes(another_bytes(film, "1.2.3"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(open(film, "rb"))  # noqa: SIM115
        with pytest.raises(OSError, match="Too many open files"):
            listener._draft(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in held:
            file.close()
    assert path.exists() and names(listener.spool.failed) == set()
    listener._draft(path)
    assert names(listener.spool.outgoing) == {"1.2.3.dcm"} and names(listener.spool.incoming) == set()


@pytest.mark.parametrize("uid", ["..", "1..2", "1.02", "abc", "1." + "2" * 70])
def test_a_malformed_uid_is_no_file_name(uid: str):
    assert not is_uid(uid) and is_uid("1.2.840.0")


def test_on_a_full_disk_radiographs_are_refused_and_a_read_only_one_is_told(
    listen: Callable, tiny_bundle: Path, film: Path, tmp_path: Path, mounted: Callable
):
    port, process = listen(free_port(), mounted("size=4m") / "spool")
    assert send(port, another(film)) == 0xA700  # out of resources: the sender keeps it and comes again
    assert process.poll() is None and "no space left" in (tmp_path / "log").read_text()
    spool = mounted("ro") / "spool"
    done = run_cli(
        "cbedge.cli",
        "listen",
        "--known",
        "X",
        "--spool",
        spool,
        "--model",
        tiny_bundle,
        "--device",
        "cpu",
        "--port",
        free_port(),
    )
    assert done.returncode == 7 and "Read-only" in done.stderr and "Traceback" not in done.stderr


@needs_dcmtk
def test_dcmtk_sends_and_receives(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    store = tmp_path / "store"
    store.mkdir()
    pacs = subprocess.Popen(["storescp", "-aet", "PACS", "-od", store, str(pacs_port)])
    try:
        port, _ = listen(pacs_port)
        command = ["storescu", "-aet", "MODALITY", "-aec", "CBEDGE", "127.0.0.1", str(port), film]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: list(store.iterdir()))
        time.sleep(0.3)
        document = pydicom.dcmread(next(store.iterdir()))
        assert document.Modality == "SR" and document.PatientID == "9RG1"
        assert subprocess.run(["storescu", "-aet", "STRANGER", *command[3:]], capture_output=True).returncode != 0
    finally:
        pacs.kill()
        pacs.wait()


@needs_orthanc
def test_a_round_trip_through_orthanc(listen: Callable, film: Path, tmp_path: Path):
    dicom = free_port()
    port, _ = listen(dicom)
    with orthanc(tmp_path / "orthanc", "MODALITY", dicom, {"drafts": ["CBEDGE", "127.0.0.1", port]}) as client:
        kept = client.post("/instances", content=film.read_bytes()).json()
        assert client.post("/modalities/drafts/store", content=kept["ID"]).json()["FailedInstancesCount"] == 0
        instances = f"/studies/{kept['ParentStudy']}/instances"
        wait_for(lambda: len(client.get(instances).json()) == 2)
        tags = [client.get(f"/instances/{i['ID']}/simplified-tags").json() for i in client.get(instances).json()]
        document = next(t for t in tags if t["Modality"] == "SR")
        assert document["PreliminaryFlag"] == "PRELIMINARY" and document["PatientID"] == "9RG1"


@pytest.mark.slow
def test_a_second_listener_on_one_spool_and_a_wrong_peer_are_refused(
    listen: Callable, tiny_bundle: Path, tmp_path: Path
):
    port, _ = listen(free_port())
    arguments = (
        "cbedge.cli",
        "listen",
        "--known",
        "X",
        "--spool",
        tmp_path / "spool",
        "--model",
        tiny_bundle,
        "--device",
        "cpu",
        "--port",
        free_port(),
    )
    second = run_cli(*arguments)
    assert second.returncode == 7 and "another cbedge listen" in second.stderr and "Traceback" not in second.stderr
    for host, reason in (("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign"), ("a..b", "invalid")):
        done = run_cli(*arguments, "--spool", tmp_path / "other", "--host", host, "--port", port)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"cbedge: cannot listen on {host}:{port}: {reason}"), done.stderr
    wrong = run_cli(*arguments, "--peer", "nonsense")
    assert wrong.returncode == 2 and "AET@host:port" in wrong.stderr
    with pytest.raises(ContextError):
        Peer.parse("A_TITLE_OF_MORE_THAN_16@host:104")
