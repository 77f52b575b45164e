import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from conftest import free_port, wait_for
from dicom_node import another, another_bytes, names, send
from pynetdicom import AE, evt
from pynetdicom.sop_class import EnhancedSRStorage, Verification

from cbedge import ReportGenerator
from cbedge.images.dicom_file import read_header
from cbedge.outputs.sr import to_sr
from cbedge.report import Report, Timings
from cbedge.services import delivery
from cbedge.services.delivery import MAX_REFUSALS, Delivery
from cbedge.services.dicom_node import Listener, ListenSettings, Peer
from cbedge.services.spool import Spool

REPORT = Report(
    findings="Clear.",
    impression="Normal.",
    complete=True,
    text="FINDINGS: Clear. IMPRESSION: Normal.",
    model="m",
    model_version="1",
    variant="int4",
    device="cpu",
    view="frontal",
    indication_source=None,
    image_findings=(),
    finding_scores={},
    image_sha256="a" * 64,
    prompt_tokens=1,
    sentences=(),
    new_tokens=1,
    opening_tokens=0,
    guessed_tokens=0,
    accepted_tokens=0,
    passes=0,
    timings=Timings(1, 1, 1, 1, 1, 1),
)


class Refusing:
    """A PACS that answers with the next status of a list, the last one for ever."""

    def __init__(self, *statuses: int, classes: tuple[str, ...] = (EnhancedSRStorage,)):
        self.statuses, self.asked = list(statuses), []
        node, self.port = AE("PACS"), free_port()
        for kind in classes:
            node.add_supported_context(kind)
        handlers = [(evt.EVT_C_STORE, self.take), (evt.EVT_REQUESTED, self.note)]
        self.associations = 0
        self.server = node.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)

    def note(self, event: evt.Event) -> None:
        self.associations += 1

    def take(self, event: evt.Event) -> int:
        self.asked.append(event.dataset)
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def sender(self, spool: Spool, first_retry_s: float = 0.01) -> Delivery:
        return Delivery(spool, "CBEDGE", Peer("PACS", "127.0.0.1", self.port), first_retry_s, 0.02)


@pytest.fixture
def drafts(film: Path, tmp_path: Path) -> Spool:
    """A spool with two drafts."""
    spool = Spool(tmp_path / "spool")
    for uid in ("1.2.1", "1.2.2"):
        header = read_header(another_bytes(film, uid))
        spool.put(spool.outgoing, f"{uid}.dcm", to_sr(REPORT, header, same_again=True))
    return spool


def run_until(sender: Delivery, condition: Callable[[], object]) -> None:
    end = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(min(sender.run(), 0.1))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (0xA900, "rejected it with status 0xa900 (data set does not match sop class)"),
        (0xC123, "cannot understand"),
        (0x0122, "sop class not supported"),
        (0x0110, "processing failure"),
        (0x1234, "0x1234 (unknown)"),
        (None, f"PACS does not accept Enhanced SR documents (SOP class {EnhancedSRStorage})"),
    ],
)
def test_a_draft_that_the_pacs_keeps_refusing_is_put_aside_and_can_be_sent_again(
    drafts: Spool, status: int | None, reason: str
):
    pacs = Refusing(status or 0, classes=(EnhancedSRStorage,) if status else (Verification,))
    sender = pacs.sender(drafts)
    run_until(sender, lambda: not drafts.waiting(drafts.outgoing))
    assert len(pacs.asked) == (2 * MAX_REFUSALS if status else 0) and pacs.associations >= MAX_REFUSALS
    assert names(drafts.failed) == {"sr-1.2.1.dcm", "sr-1.2.1.txt", "sr-1.2.2.dcm", "sr-1.2.2.txt"}
    told = (drafts.failed / "sr-1.2.1.txt").read_text()
    assert reason in told and f"{MAX_REFUSALS} times" in told and "move sr-1.2.1.dcm to the folder outgoing" in told
    pacs.server.shutdown()
    os.replace(drafts.failed / "sr-1.2.1.dcm", drafts.outgoing / "sr-1.2.1.dcm")
    mended = Refusing(0)
    run_until(mended.sender(drafts), lambda: not drafts.waiting(drafts.outgoing))
    assert len(mended.asked) == 1
    mended.server.shutdown()


def test_a_pacs_that_is_away_or_full_is_tried_for_ever(drafts: Spool, monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr(delivery, "log", said.append)
    pacs = Refusing(0xA700)
    sender = pacs.sender(drafts)
    run_until(sender, lambda: len(pacs.asked) > 2 * MAX_REFUSALS)
    pacs.server.shutdown()
    before = len(said)
    run_until(sender, lambda: len(said) > before + 2 * MAX_REFUSALS)
    assert len(drafts.waiting(drafts.outgoing)) == 2 and names(drafts.failed) == set()
    assert "out of resources with status 0xa700" in said[0] and "no answer from" in said[-1]
    away = Delivery(drafts, "CBEDGE", Peer("PACS", "127.0.0.1", free_port()), 5, 15)
    assert 4 < away.run() <= 5 and 3 < away.run() <= 5  # it was not tried again at once
    away._due = 0
    assert 8 < away.run() <= 10
    away._due = 0
    assert 13 < away.run() <= 15


def test_a_draft_that_is_refused_holds_up_no_other_and_one_that_is_there_already_is_delivered(drafts: Spool):
    pacs = Refusing(0xC000, 0x0111, 0xC000, 0)
    run_until(pacs.sender(drafts), lambda: not drafts.waiting(drafts.outgoing))
    asked = [str(document.SOPInstanceUID) for document in pacs.asked]
    assert len(asked) == 4 and asked[0] == asked[2] == asked[3] != asked[1] and names(drafts.failed) == set()
    pacs.server.shutdown()


def test_a_draft_that_is_replaced_while_it_is_sent_is_sent_too(drafts: Spool, film: Path):
    class Replacing(Refusing):
        def take(self, event: evt.Event) -> int:
            if not self.asked:
                header = read_header(another_bytes(film, "1.2.1"))
                document = to_sr(dataclasses.replace(REPORT, findings="Other."), header, same_again=True)
                drafts.put(drafts.outgoing, "1.2.1.dcm", document)
            return super().take(event)

    os.utime(drafts.outgoing / "1.2.1.dcm", (1, 1))
    pacs = Replacing(0)
    run_until(pacs.sender(drafts), lambda: not drafts.waiting(drafts.outgoing))
    assert len({document.SOPInstanceUID for document in pacs.asked}) == 3
    pacs.server.shutdown()


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
    sender = Delivery(listener.spool, "CBEDGE", Peer("PACS", "127.0.0.1", port), 0.1, 0.1)
    for _ in range(2):
        sender.run()
        time.sleep(0.2)
    server.shutdown()
    assert taken == [good]
    if trouble == "no space for this one":
        assert names(spool / "outgoing") == {"1.2.1.dcm"}  # kept for later
    else:
        assert names(spool / "outgoing") == set() and "sr-1.2.1.dcm" in names(spool / "failed")


def test_the_log_says_why_the_pacs_takes_no_draft(listen: Callable, film: Path, tmp_path: Path):
    pacs_port = free_port()
    other = AE("PACS")
    other.add_supported_context(Verification)
    server = other.start_server(("127.0.0.1", pacs_port), block=False)
    port, _ = listen(pacs_port)
    assert send(port, another(film)) == 0
    wait_for(lambda: "PACS does not accept Enhanced SR documents" in (tmp_path / "log").read_text())
    server.shutdown()
    wait_for(lambda: f"no answer from 127.0.0.1:{pacs_port}" in (tmp_path / "log").read_text())
    strict = AE("ELSEWHERE")
    strict.require_called_aet = True
    strict.add_supported_context(EnhancedSRStorage)
    server = strict.start_server(("127.0.0.1", pacs_port), block=False)
    wait_for(lambda: "rejected the association: called ae title" in (tmp_path / "log").read_text())
    server.shutdown()
