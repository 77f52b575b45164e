import dataclasses
import io
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pydicom
import pytest
from conftest import EXAMPLES, ROOT, free_port, needs_orthanc, orthanc, run_cli, wait_for
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import ComputedRadiographyImageStorage, EnhancedSRStorage, Verification

from cbedge import ContextError, ReportGenerator, listen_guard
from cbedge.dicom_header import is_uid
from cbedge.listen import Listener, ListenSettings, Peer

needs_dcmtk = pytest.mark.skipif(shutil.which("storescu") is None, reason="dcmtk is not installed")


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = pydicom.dcmread(EXAMPLES / "chest_pa.dcm")
    dataset.decompress()
    path = tmp_path_factory.mktemp("film") / "film.dcm"
    dataset.save_as(path)
    return path


def another(film: Path) -> pydicom.Dataset:
    dataset = pydicom.dcmread(film)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    return dataset


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


def send(port: int, dataset: pydicom.Dataset, aet: str = "MODALITY") -> int | None:
    node = AE(aet)
    node.add_requested_context(ComputedRadiographyImageStorage, ExplicitVRLittleEndian)
    association = node.associate("127.0.0.1", port, ae_title="CBEDGE")
    if not association.is_established:
        return None
    status = association.send_c_store(dataset).Status
    association.release()
    return status


@pytest.fixture
def listen(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[int, subprocess.Popen]]]:
    running = []

    def start(pacs: int, spool: Path = tmp_path / "spool", wait: float = 0) -> tuple[int, subprocess.Popen]:
        port = free_port()
        command = [sys.executable, "-m", "cbedge.cli", "listen", "--known", "MODALITY", "--spool", spool, "--peer",
                   f"PACS@127.0.0.1:{pacs}", "--port", port, "--model", tiny_bundle, "--device", "cpu", "--retry",
                   "0.3", "--pair-wait", wait]  # fmt: skip
        log = open(tmp_path / "log", "a")  # noqa: SIM115
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=log)
        running.append(process)

        def answers() -> bool:
            node = AE("MODALITY")
            node.add_requested_context(Verification)
            association = node.associate("127.0.0.1", port, ae_title="CBEDGE")
            answered = association.is_established
            if answered:
                association.release()
            return answered

        wait_for(answers)
        return port, process

    yield start
    for process in running:
        process.kill()
        process.wait()


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
    wait_for(lambda: len(pacs.taken) == 3)
    time.sleep(1)
    # What is complete, or says of no view, does not wait.
    assert [d.StudyInstanceUID for d in pacs.taken] == ["1.2.3", "1.2.3", "1.2.4"]
    assert not [*(tmp_path / "spool").rglob("*.dcm")]
    pacs.server.shutdown()


def test_killed_and_with_the_pacs_away_nothing_is_lost_and_nothing_comes_twice(listen: Callable, film: Path):
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
    wait_for(lambda: len({d.SOPInstanceUID for d in pacs.taken}) == len(sent))
    time.sleep(0.5)
    drafted = [
        d.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        .ReferencedSOPInstanceUID for d in pacs.taken
    ]  # fmt: skip
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


def test_connections_that_say_nothing_keep_no_sender_out(listen: Callable, film: Path, tmp_path: Path):
    port, _ = listen(free_port())
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
    node = AE("MODALITY")
    node.add_requested_context(Verification)
    held = [node.associate("127.0.0.1", port, ae_title="CBEDGE") for _ in range(10)]
    assert all(association.is_established for association in held)
    assert send(port, another(film)) == 0
    for connection in silent:
        connection.close()
    for association in held:
        association.abort()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "rror" not in log


def test_one_image_sent_by_many_at_once_is_taken_from_each_and_drafted_once(listen: Callable, film: Path):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    port, _ = listen(pacs_port)
    dataset = another(film)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda _: send(port, dataset), range(24))] == [0] * 24
    wait_for(lambda: pacs.taken)
    time.sleep(2)
    assert len({d.SOPInstanceUID for d in pacs.taken}) == 1
    pacs.server.shutdown()


def test_a_spool_heals(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    pacs = Pacs(pacs_port)
    spool = tmp_path / "spool"
    for part in ("incoming", "outgoing", "failed"):
        (spool / part / "folder.dcm").mkdir(parents=True)
        (spool / part / ".hidden").mkdir()
    (spool / "incoming" / "1.2.3.dcm").touch()
    (spool / "incoming" / "notes.txt").write_text("somebody's")
    (spool / "outgoing" / "1.2.4.dcm").write_text("no draft")
    (spool / "incoming" / "1.2.5.dcm").write_bytes(film.read_bytes())
    (spool / "incoming" / "1.2.5.attempts").write_text("3")  # it ended three processes
    port, _ = listen(pacs_port)
    assert send(port, another(film)) == 0
    wait_for(lambda: pacs.taken and {"1.2.3.txt", "1.2.4.txt", "1.2.5.txt"} <= {*names(spool / "failed")})
    assert "3 attempts" in (spool / "failed" / "1.2.5.txt").read_text()
    assert names(spool / "incoming") == {"folder.dcm", ".hidden", "notes.txt"}
    shutil.rmtree(spool)
    assert send(port, another(film)) == 0
    wait_for(lambda: len(pacs.taken) == 2)
    pacs.server.shutdown()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_log_says_why_the_pacs_takes_no_draft(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    other = AE("PACS")
    other.add_supported_context(Verification)
    server = other.start_server(("127.0.0.1", pacs_port), block=False)
    port, _ = listen(pacs_port)
    assert send(port, another(film)) == 0
    wait_for(lambda: "PACS does not take Enhanced SR documents" in (tmp_path / "log").read_text())
    server.shutdown()
    wait_for(lambda: f"nobody answers at 127.0.0.1:{pacs_port}" in (tmp_path / "log").read_text())
    strict = AE("ELSEWHERE")
    strict.require_called_aet = True
    strict.add_supported_context(EnhancedSRStorage)
    server = strict.start_server(("127.0.0.1", pacs_port), block=False)
    wait_for(lambda: "rejected the association: called ae title" in (tmp_path / "log").read_text())
    server.shutdown()


@pytest.mark.parametrize("trouble", ["another SOP class", "no UID", "no space for this one"])
def test_a_draft_that_cannot_be_sent_holds_up_no_other(tiny_bundle: Path, film: Path, tmp_path: Path, trouble: str):
    spool = tmp_path / "spool"
    settings = ListenSettings("CBEDGE", "127.0.0.1", free_port(), ("X",), None, spool, pair_wait_s=0)
    listener = Listener(ReportGenerator.from_pretrained(tiny_bundle, device="cpu"), settings)
    for uid in ("1.2.1", "1.2.2"):
        (spool / "incoming" / f"{uid}.dcm").write_bytes(another_bytes(film, uid))
        listener._draft(spool / "incoming" / f"{uid}.dcm")
    first, second = (spool / "outgoing" / f"{uid}.dcm" for uid in ("1.2.1", "1.2.2"))
    bad = pydicom.dcmread(first)
    if trouble == "another SOP class":
        shutil.copy(film, first)
    elif trouble == "no UID":
        del bad.SOPInstanceUID
        bad.save_as(first)
    os.utime(first, (1, 1))  # the oldest is sent first
    good = pydicom.dcmread(second).SOPInstanceUID
    taken = []

    def take(event: evt.Event) -> int:
        if event.request.AffectedSOPInstanceUID == bad.SOPInstanceUID:
            return 0xA700
        taken.append(event.request.AffectedSOPInstanceUID)
        return 0

    if trouble != "no space for this one":
        bad.SOPInstanceUID = "1.2.9"
    node, port = AE("PACS"), free_port()
    node.add_supported_context(EnhancedSRStorage)
    server = node.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    listener.settings = dataclasses.replace(settings, peer=Peer("PACS", "127.0.0.1", port))
    for _ in range(2):
        listener._send(listener.spool.waiting(listener.spool.outgoing))
    server.shutdown()
    assert taken == [good]
    if trouble == "no space for this one":
        assert names(spool / "outgoing") == {"1.2.1.dcm"}  # kept for later
    else:
        assert names(spool / "outgoing") == set() and "sr-1.2.1.dcm" in names(spool / "failed")


def another_bytes(film: Path, uid: str) -> bytes:
    dataset, buffer = another(film), io.BytesIO()
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.save_as(buffer)
    return buffer.getvalue()


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
    listener.spool.count_attempt(path)
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
    done = run_cli("cbedge.cli", "listen", "--known", "X", "--spool", spool, "--model", tiny_bundle, "--device", "cpu",
                   "--port", free_port())  # fmt: skip
    assert done.returncode == 7 and "Read-only" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def receiver(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    """Starts a node in this process, which sends nothing."""
    started = []

    def start(**options: object) -> Listener:
        settings = ListenSettings("CBEDGE", "127.0.0.1", free_port(), ("MODALITY",), None, tmp_path / "spool")
        settings = dataclasses.replace(settings, pair_wait_s=0, **options)
        started.append(Listener(ReportGenerator.from_pretrained(tiny_bundle, device="cpu"), settings))
        started[-1].start()
        return started[-1]

    yield start
    for listener in started:
        listener.stop()


def pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxL", kind, len(body)) + body


def pdv(control: int, data: bytes) -> bytes:
    """A P-DATA-TF PDU of one value: control 0 and 1 begin or go on with data and command, 2 and 3 end them."""
    return pdu(4, struct.pack(">LBB", len(data) + 2, 1, control) + data)


def request(calling: str = "MODALITY", called: str = "CBEDGE", contexts: int = 1, most: int = 16384) -> bytes:
    """An A-ASSOCIATE-RQ for storage of CR."""

    def item(kind: int, body: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(body)) + body

    syntaxes = item(0x30, ComputedRadiographyImageStorage.encode()) + item(0x40, ExplicitVRLittleEndian.encode())
    offered = b"".join(item(0x20, bytes([2 * n + 1, 0, 0, 0]) + syntaxes) for n in range(contexts))
    titles = f"{called:16}{calling:16}".encode()
    user = item(0x50, item(0x51, struct.pack(">L", most)) + item(0x52, b"1.2.3"))
    return pdu(1, struct.pack(">HH", 1, 0) + titles + bytes(32) + item(0x10, b"1.2.840.10008.3.1.1.1") + offered + user)


def command(kind: str = ComputedRadiographyImageStorage, uid: str = "1.2.3") -> bytes:
    """A C-STORE-RQ."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHL", 0, number, len(value)) + value

    def text(value: str) -> bytes:
        return value.encode() + b"\0" * (len(value) % 2)

    words = {0x100: 1, 0x110: 1, 0x700: 0, 0x800: 1}
    parts = {2: text(kind), **{n: struct.pack("<H", word) for n, word in words.items()}, 0x1000: text(uid)}
    body = b"".join(element(number, value) for number, value in parts.items())
    return element(0, struct.pack("<L", len(body))) + body


def answer(connection: socket.socket, seconds: float = 20) -> bytes:
    """The next PDU, or nothing where the connection ends."""
    connection.settimeout(seconds)
    received = b""
    with suppress(ConnectionError):
        while len(received) < 6 or len(received) < 6 + struct.unpack(">L", received[2:6])[0]:
            part = connection.recv(1)
            if not part:
                return b""
            received += part
    return received


def associate(port: int, **options: object) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(request(**options))
    assert answer(connection)[:1] == b"\2"
    return connection


def status_in(message: bytes) -> int:
    place = message.index(struct.pack("<HHL", 0, 0x900, 2)) + 8
    return struct.unpack("<H", message[place : place + 2])[0]


@pytest.mark.parametrize("control", [0, 1])  # of data, and of a command that does not end
def test_a_sender_of_too_many_bytes_is_cut_off_while_it_sends(receiver: Callable, film: Path, control: int):
    listener = receiver(max_object_bytes=2_000_000)
    port = listener.settings.port
    with associate(port) as connection:
        sent = 0
        connection.sendall(pdv(3, command()) if control == 0 else b"")
        with suppress(ConnectionError):
            while not select.select([connection], [], [], 0)[0] and sent < 200_000_000:
                connection.sendall(pdv(control, bytes(16_000)))
                sent += 16_000
        assert sent < 30_000_000  # what is under way in the system's buffers included
        assert answer(connection)[:1] in (b"\7", b"")
    wait_for(lambda: listener._reception.together == 0)
    assert names(listener.spool.incoming) == set()
    with associate(port) as connection:  # what is not too long is taken, again and again
        for uid in ("1.2.4", "1.2.5", "1.2.6"):
            connection.sendall(pdv(3, command(uid=uid)))
            for _ in range(120):
                connection.sendall(pdv(0, bytes(16_000)))
            connection.sendall(pdv(2, b"end"))
            assert status_in(answer(connection)) == 0
    assert listener._reception.together == 0


def test_all_senders_together_have_a_limit_too(receiver: Callable):
    listener = receiver(max_received_bytes=2_000_000)
    connections = [associate(listener.settings.port) for _ in range(3)]
    for number, connection in enumerate(connections):
        connection.sendall(pdv(3, command(uid=f"1.2.{number}")))
        for _ in range(50):
            connection.sendall(pdv(0, bytes(16_000)))
        wait_for(lambda number=number: listener._reception.together == 800_000 * min(number + 1, 2))
    assert answer(connections[2])[:1] == b"\7"
    for connection in connections[:2]:
        connection.sendall(pdv(2, b"end"))
        assert status_in(answer(connection)) == 0
        connection.close()
    connections[2].close()
    wait_for(lambda: listener._reception.together == 0)


def test_a_sender_that_does_not_wait_for_answers_is_cut_off(receiver: Callable, monkeypatch: pytest.MonkeyPatch):
    listener = receiver()
    taken = threading.Event()
    monkeypatch.setattr(listener.spool, "put", lambda *_: taken.wait(20))
    with associate(listener.settings.port) as connection:
        for _ in range(listen_guard.MAX_QUEUED_MESSAGES + 10):
            with suppress(ConnectionError):
                connection.sendall(pdv(3, command()) + pdv(2, b"whole"))
        assert answer(connection)[:1] in (b"\7", b"")
        taken.set()


def test_an_object_of_another_class_than_was_agreed_on_is_refused(receiver: Callable):
    listener = receiver()
    with associate(listener.settings.port) as connection:
        for kind, status in (("1.2.840.10008.5.1.4.1.1.2", 0xA900), (ComputedRadiographyImageStorage, 0)):
            connection.sendall(pdv(3, command(kind)) + pdv(2, b"whole"))
            assert status_in(answer(connection)) == status


def test_a_connection_with_half_a_pdu_or_one_that_is_too_long_is_closed(
    receiver: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(listen_guard, "PDU_S", 1.0)
    port = receiver().settings.port
    threads = threading.active_count()
    begun = [b"\1", b"\1\0\0\0\0\x80abc", pdu(1, b"x")[:-1], struct.pack(">BxL", 1, 2**31), pdv(0, bytes(99))[:-1]]
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in begun]
    connections += [associate(port) for _ in begun]
    for connection, part in zip(connections, 2 * begun, strict=True):
        connection.sendall(part)
    for connection in connections:
        assert answer(connection, 5)[:1] in (b"", b"\7")
        connection.close()
    slow = associate(port)
    with pytest.raises(ConnectionError):
        for _ in range(50):  # a byte at a time is too slow, too
            slow.sendall(b"\4")
            time.sleep(0.1)
    wait_for(lambda: threading.active_count() <= threads)


def test_what_is_no_message_ends_its_connection_alone_and_is_one_line_in_the_log(
    listen: Callable, film: Path, tmp_path: Path
):
    port, _ = listen(free_port())
    unknown = struct.pack("<HHLL", 0, 0, 4, 10) + struct.pack("<HHLH", 0, 0x100, 2, 0x7777)
    for message in (pdu(4, struct.pack(">L", 1) + b"\1"), pdv(3, b"junk"), pdv(3, unknown), pdu(9, b"x"), pdv(2, b"x"),
                    pdu(4, struct.pack(">L", 5000) + b"\1\3abc"), request(), b"GET / HTTP/1.1\r\n\r\n"):  # fmt: skip
        with associate(port) as connection:
            connection.sendall(message)
            assert answer(connection)[:1] in (b"\7", b"")
    for asked in (request(called="OTHER"), request(calling="STRANGER"), request()[:200].ljust(300, b"\xff"),
                  request(contexts=0)):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(asked)
            assert answer(connection)[:1] in (b"\3", b"\7", b"", b"\2")
    with associate(port, contexts=128, most=0) as connection:
        connection.sendall(pdv(3, command()) + pdv(0, b"begun"))  # and then it hangs up
    assert send(port, another(film)) == 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and all(line.startswith("{") for line in log.splitlines())


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


def test_a_second_listener_on_one_spool_and_a_wrong_peer_are_refused(
    listen: Callable, tiny_bundle: Path, tmp_path: Path
):
    listen(free_port())
    arguments = ("cbedge.cli", "listen", "--known", "X", "--spool", tmp_path / "spool", "--model", tiny_bundle,
                 "--device", "cpu", "--port", free_port())  # fmt: skip
    second = run_cli(*arguments)
    assert second.returncode == 7 and "another cbedge listen" in second.stderr and "Traceback" not in second.stderr
    wrong = run_cli(*arguments, "--peer", "nonsense")
    assert wrong.returncode == 4 and "AET@host:port" in wrong.stderr
    with pytest.raises(ContextError):
        Peer.parse("A_TITLE_OF_MORE_THAN_16@host:104")
