"""A DICOM node that receives radiographs and sends drafts to the PACS as Structured Reports.

A radiograph is on disk before its reception is acknowledged, and every step ends with an atomic rename, so a killed
process resumes where it stopped. A draft that is written or sent twice has the same identifiers, so the PACS stores
one.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Any

from pynetdicom import evt
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    Verification,
)

from cbedge.api import ReportGenerator
from cbedge.drafting.assessment import check_shown_as
from cbedge.errors import CbedgeError, RadiographError
from cbedge.file_names import safe_name
from cbedge.images.dicom import study_and_patient, study_and_view
from cbedge.images.dicom_file import read_header
from cbedge.images.dicom_header import is_uid
from cbedge.outputs.registry import rendering
from cbedge.outputs.sr import to_sr
from cbedge.report import MARKED
from cbedge.services.addresses import address_errors, check_ae_title
from cbedge.services.delivery import RESCAN_S, Delivery, Peer
from cbedge.services.dicom_guard import GuardedAE, ReceptionLimit
from cbedge.services.dicom_log import log, log_to_stderr
from cbedge.services.spool import Spool, machine_trouble, version_of

_IMAGES = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
)
_SYNTAXES = [
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
]
_SUCCESS, _NO_SPACE, _OTHER_CLASS, _CANNOT_STORE = 0x0000, 0xA700, 0xA900, 0xC000
_RESERVE_BYTES = 50 * 2**20
MAX_DEATHS = 5  # crashes while drafting a radiograph, for example because it needs too much memory
MAX_DEATHS_AS_PAIR = 2  # then the two views are drafted separately, because only one may be the cause
MAX_ASSOCIATIONS = 200  # includes connections before association
ASSOCIATE_S, IDLE_S = 10, 60  # timeouts in seconds before association, and for silence after it


@dataclass(frozen=True)
class ListenSettings:
    """Settings of the DICOM node.

    Attributes:
        aet: the node's application entity title.
        host, port: address to listen on.
        known: AE titles of the nodes that may send; others are rejected.
        peer: PACS that receives drafts; ``None`` leaves them in the spool's folder ``outgoing``.
        spool: folder of the queue.
        first_retry_s, last_retry_s: seconds until the first retry, doubled with each failure up to the last.
        pair_wait_s: seconds that a radiograph waits for the other view of its study; 0 drafts every view alone, as does
            a model that cannot read lateral radiographs.
        unassessed: how sentences that the model does not assess are shown: ``mark``, ``omit`` or ``plain``.
        max_waiting: maximum number of radiographs in the spool; more are rejected, and their sender keeps them.
        max_object_bytes: maximum size of a radiograph; the association is aborted before a larger one is in memory.
        max_received_bytes: maximum size of all radiographs that are being received.

    Raises:
        OptionError: an application entity title or ``unassessed`` is invalid.
    """

    aet: str
    host: str
    port: int
    known: tuple[str, ...]
    peer: Peer | None
    spool: Path
    first_retry_s: float = 5.0
    last_retry_s: float = 600.0
    pair_wait_s: float = 10.0
    unassessed: str = MARKED
    max_waiting: int = 10_000
    max_object_bytes: int = 512 * 2**20
    max_received_bytes: int = 1024 * 2**20

    def __post_init__(self) -> None:
        check_ae_title(self.aet, "--aet")
        for title in self.known:
            check_ae_title(title, "--known")
        check_shown_as(self.unassessed)


class Listener:
    """Receives radiographs, drafts reports and sends them, each in its own thread."""

    def __init__(self, generator: ReportGenerator, settings: ListenSettings):
        self.generator, self.settings, self.spool = generator, settings, Spool(settings.spool)
        self._stop, self._arrived, self._ready = threading.Event(), threading.Event(), threading.Event()
        self._pair_wait = settings.pair_wait_s if generator.reads_lateral else 0.0
        self._storing = threading.Lock()
        self._held: float | None = None  # seconds until a radiograph stops waiting for the other view
        self._threads: list[threading.Thread] = []
        self._server: Any = None
        self._reception = ReceptionLimit(settings.max_object_bytes, settings.max_received_bytes, log)
        self._delivery: Delivery | None = None
        self._pause: float = RESCAN_S  # seconds until the next delivery
        if settings.peer is not None:
            retries = settings.first_retry_s, settings.last_retry_s
            self._delivery = Delivery(self.spool, settings.aet, settings.peer, *retries, self._stop.is_set)

    def start(self) -> None:
        """Start to listen.

        Raises:
            OptionError: the address is invalid, in use, or not of this machine.
        """
        node = GuardedAE(self.settings.aet)
        node.require_calling_aet = list(self.settings.known)
        node.require_called_aet = True
        node.maximum_associations = MAX_ASSOCIATIONS
        node.acse_timeout, node.network_timeout, node.dimse_timeout = ASSOCIATE_S, IDLE_S, IDLE_S
        node.add_supported_context(Verification)
        for kind in _IMAGES:
            node.add_supported_context(kind, _SYNTAXES)
        address = (self.settings.host, self.settings.port)
        handlers: Any = [
            (evt.EVT_C_STORE, self._receive),
            (evt.EVT_REJECTED, self._log_rejection),
            *self._reception.handlers(),
        ]
        with address_errors(*address):
            self._server = node.start_server(address, block=False, evt_handlers=handlers)
        for work in (self._draft_all, self._send_all):
            thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)
        self._arrived.set()
        self._ready.set()

    def stop(self) -> None:
        """Stop receiving, and finish the current draft."""
        if self._server is not None:
            self._server.shutdown()
        self._stop.set()
        self._arrived.set()
        self._ready.set()
        for thread in self._threads:
            thread.join(60)

    def _log_rejection(self, event: evt.Event) -> None:
        asked: Any = event.assoc.requestor.primitive
        calling, called = asked.calling_ae_title.strip(), asked.called_ae_title.strip()
        if called != self.settings.aet.strip():
            reason = f"it calls {called!a}, but this node is {self.settings.aet.strip()!a}"
        elif calling not in map(str.strip, self.settings.known):
            reason = "its AE title is not among those of --known"
        else:
            reason = f"more than {MAX_ASSOCIATIONS} associations are open"
        log(f"an association of {calling!a} was rejected: {reason}")

    def _receive(self, event: evt.Event) -> int:
        """Store a received radiograph on disk, then acknowledge it."""
        request: Any = event.request
        content = request.DataSet.getbuffer() if request.DataSet is not None else b""
        try:
            uid = str(request.AffectedSOPInstanceUID)
            if not is_uid(uid):  # it becomes a file name
                log("a radiograph with a malformed SOP Instance UID was rejected")
                return _CANNOT_STORE
            if request.AffectedSOPClassUID != event.context.abstract_syntax:
                log("an object whose SOP class was not negotiated was rejected")
                return _OTHER_CLASS
            self.spool.make()
            if shutil.disk_usage(self.spool.folder).free < _RESERVE_BYTES:
                log("no space left in the spool: a radiograph was rejected")
                return _NO_SPACE
            if self.spool.is_full(self.settings.max_waiting):
                log(f"{self.settings.max_waiting:,} radiographs are already waiting: another one was rejected")
                return _NO_SPACE
            header = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
            if not self._store(f"{safe_name(uid)}.dcm", header, content):
                return _CANNOT_STORE
        except OSError as error:
            log(f"a radiograph could not be stored ({error.strerror}) and was rejected")
            return _NO_SPACE
        except Exception as error:
            log(f"a radiograph could not be stored ({type(error).__name__}) and was rejected")
            return _CANNOT_STORE
        finally:
            self._reception.kept(event.assoc, len(content))
        self._arrived.set()
        return _SUCCESS

    def _store(self, name: str, *parts: bytes | memoryview) -> bool:
        """Store a radiograph in ``incoming``, unless it is there already, or in ``failed`` if another one has its name.

        Returns:
            Whether it will be drafted.
        """
        place = self.spool.incoming / name
        with self._storing:  # no other image of this UID may be stored between the check and this one
            if self.spool.holds(place, *parts):
                return True
            other = self._holder(name, *parts)
            if not other:
                self.spool.put(self.spool.incoming, name, *parts)
                return True
            reason = f"its SOP Instance UID is also that of {other} that waits here"
            remedy = f"or move it to the folder {place.parent.name} of the spool once that one is delivered"
            log(f"a radiograph was moved to failed: {reason}")
            self.spool.put_aside(name, f"no draft: {reason}; correct it at its source, {remedy}", *parts)
            return False

    def _holder(self, name: str, *parts: bytes | memoryview) -> str:
        """What has this name in the spool and must not be replaced by this radiograph; empty if nothing."""
        if (self.spool.incoming / name).is_file():  # checked first: drafts move on to outgoing meanwhile
            return "another radiograph"
        draft = self.spool.outgoing / name
        known = study_and_patient(read_header(draft, needed=False)) if draft.is_file() else None
        new = study_and_patient(read_header(b"".join(parts), needed=False)) if known else None
        same = known is None or (new is not None and _is_same_study(new, known))
        return "" if same else "a radiograph of another study or patient"

    def _draft_name(self, name: str, document: bytes) -> str:
        """A draft's name in ``outgoing``; an undelivered draft of another radiograph with the same UID is kept."""
        undelivered, uid = self.spool.outgoing / name, _uid(document)
        if not undelivered.is_file() or _uid(undelivered) == uid:
            return name
        return f"{undelivered.stem}-{hashlib.sha256(uid.encode()).hexdigest()[:16]}.dcm"

    def _guarded(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception as error:  # such as a full disk: nothing is lost, and the work is retried
                reason = error.strerror if isinstance(error, OSError) else None  # without the file's name
                log(f"{reason or type(error).__name__}: retrying in {self.settings.first_retry_s:.0f} s")
                self._stop.wait(self.settings.first_retry_s)
                self._arrived.set()
                self._ready.set()

    def _draft_all(self) -> None:
        self._arrived.wait(RESCAN_S if self._held is None else self._held)
        self._arrived.clear()
        trouble: OSError | None = None
        deaths = self.spool.deaths()
        # Radiographs that were being drafted when a process crashed come last. So they do not delay others, and the one
        # that causes the crash is finally tried alone.
        waiting = sorted(self.spool.waiting(self.spool.incoming), key=lambda path: deaths.get(path, 0))
        for path, lateral in self._studies(waiting, deaths):
            if self._stop.is_set() or (path in deaths and self._arrived.is_set()):
                break
            try:
                self._draft(path, lateral, deaths.get(path, 0))
            except OSError as error:  # a machine error, such as a full disk: the others are tried as well
                trouble = error
        if trouble is not None:
            raise trouble

    def _studies(self, waiting: list[Path], deaths: dict[Path, int]) -> list[tuple[Path, Path | None]]:
        """The studies to draft now: a radiograph, and optionally the lateral one of its study."""
        self._held = None
        if not self._pair_wait:
            return [(path, None) for path in waiting]
        places = {
            path: (None, None) if deaths.get(path, 0) >= MAX_DEATHS_AS_PAIR else study_and_view(path)
            for path in waiting
        }
        found: list[tuple[Path, Path | None]] = []
        used: set[Path] = set()
        for path, (study, view) in places.items():
            if path in used:
                continue
            wanted = (study, "lateral" if view == "frontal" else "frontal")
            other = next(
                (p for p, place in places.items() if study and view and place == wanted and p not in used), None
            )
            try:
                left = self._pair_wait - (time() - path.stat().st_mtime)
            except OSError:  # removed meanwhile
                continue
            if other is not None:
                found.append((path, other) if view == "frontal" else (other, path))
                used |= {path, other}
            elif study and view and 0 < left <= self._pair_wait:  # it is larger if the clock was set back
                self._held = left if self._held is None else min(self._held, left)
            else:
                found.append((path, None))
        return found

    def _draft(self, path: Path, lateral: Path | None = None, deaths: int = 0) -> None:
        start = monotonic()
        read = {image: version_of(image) for image in (path, lateral) if image is not None}
        if deaths >= MAX_DEATHS:
            reason = f"{deaths} processes ended while they drafted it, perhaps because of too little memory;"
            remedy = f"to retry, send it again or move it to the folder {self.spool.incoming.name} of the spool"
            self.spool.fail(path, read[path], f"no draft: {reason} {remedy}")
            self.spool.end(path)
            log("no draft: given up after several crashes of the process")
            return
        for image in read:
            self.spool.begin(image, deaths)
        try:
            self._draft_now(path, lateral, start, read)
        finally:  # this process did not crash
            for image in read:
                self.spool.end(image)

    def _draft_now(
        self, path: Path, lateral: Path | None, start: float, read: dict[Path, tuple[int, int, int] | None]
    ) -> None:
        try:
            try:
                report = self.generator.generate(path, lateral=lateral, unassessed=self.settings.unassessed)
            except RadiographError:
                if lateral is None:
                    raise
                report = self.generator.generate(path, unassessed=self.settings.unassessed)
                lateral = None  # it is drafted alone, later
            with rendering("sr"):
                document = to_sr(report, read_header(path), same_again=True)
        except Exception as error:  # one bad image must not block the others
            if not path.exists():  # removed meanwhile
                return
            trouble = machine_trouble(error)
            if trouble is not None:
                raise trouble from None  # the image stays and is retried
            # The text of other exceptions may contain header values: only their type is logged.
            reason = str(error) if isinstance(error, CbedgeError) else f"no draft: {type(error).__name__}"
            self.spool.fail(path, read[path], reason)
            log(f"no draft: {type(error).__name__}")
            return
        self.spool.put(self.spool.outgoing, self._draft_name(path.name, document), document)
        for done in filter(None, (path, lateral)):
            self.spool.remove(done, read[done])  # a radiograph that was sent again is drafted again
        log(f"drafted in {monotonic() - start:.2f} s")
        self._ready.set()

    def _send_all(self) -> None:
        self._ready.wait(self._pause)
        self._ready.clear()
        if self._delivery is not None:
            self._pause = self._delivery.run()


def _is_same_study(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether study and patient are the same; a draft may lack the Patient ID, if the radiograph's was invalid."""
    return first[0] == second[0] and (first[1] == second[1] or not (first[1] and second[1]))


def _uid(document: Path | bytes) -> str:
    """The SOP Instance UID of a draft; empty if it cannot be read."""
    header = read_header(document, needed=False)
    return "" if header is None else str(header.get("SOPInstanceUID", ""))


def run_listener(generator: ReportGenerator, settings: ListenSettings) -> None:
    """Listen until the process receives SIGTERM or SIGINT."""
    log_to_stderr()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    listener = Listener(generator, settings)
    listener.start()
    log(f"{settings.aet} listens on {settings.host}:{settings.port}")
    ended.wait()
    listener.stop()
    log("ended")
