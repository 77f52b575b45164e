"""A DICOM node: radiographs are sent to it, drafts go back to the PACS as Structured Reports.

What was received is on disk before the sender is told so, and every step ends with a rename, so a process that is
killed at any moment goes on where it stopped. A draft that is made or sent again has the same identifiers, so a PACS
keeps one.
"""

from __future__ import annotations

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
from cbedge.errors import CbedgeError, ContextError, RadiographError
from cbedge.file_names import safe_name
from cbedge.images.dicom import header_view
from cbedge.images.dicom_file import read_header
from cbedge.images.dicom_header import is_uid
from cbedge.outputs.sr import to_sr
from cbedge.services.delivery import RESCAN_S, Delivery, Peer
from cbedge.services.dicom_guard import GuardedAE, ReceptionLimit
from cbedge.services.dicom_log import log_to_stderr, tell
from cbedge.services.spool import Spool, machine_trouble, version_of

_IMAGES = (
    ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, DigitalXRayImageStorageForProcessing,
)  # fmt: skip
_SYNTAXES = [
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
]  # fmt: skip
_SUCCESS, _NO_SPACE, _OTHER_CLASS, _CANNOT_STORE = 0x0000, 0xA700, 0xA900, 0xC000
_RESERVE_BYTES = 50 * 2**20
MAX_DEATHS = 5  # processes that end while they draft a radiograph, as one that needs too much memory makes them
MAX_DEATHS_AS_PAIR = 2  # then its two views are drafted each by itself: only one of them may be the cause
MAX_ASSOCIATIONS = 200  # connections that have not associated yet count too
ASSOCIATE_S, IDLE_S = 10, 60  # seconds until such a connection, or an association that says nothing, is closed


@dataclass(frozen=True)
class ListenSettings:
    """How the node behaves.

    Attributes:
        aet: its own application entity title.
        host, port: where it listens.
        known: titles of the nodes that may send; no other is let in.
        peer: where drafts go; ``None`` leaves them in the spool's folder ``outgoing``.
        spool: folder of the queue.
        first_retry_s, last_retry_s: seconds after a failed delivery, doubled up to the last.
        pair_wait_s: how long a frontal or lateral radiograph waits for its study's other one, to be drafted with it; 0
            drafts each by itself, as a model that reads no lateral one always does.
        max_waiting: radiographs that may wait in the spool; one more is refused, and its sender keeps it.
        max_object_bytes: largest radiograph; a sender of a larger one is cut off before it is in memory.
        max_received_bytes: of all radiographs that are being received at a time.
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
    max_waiting: int = 10_000
    max_object_bytes: int = 512 * 2**20
    max_received_bytes: int = 1024 * 2**20


class Listener:
    """Receives, drafts and sends, each in a thread of its own.

    Args:
        generator: writes the drafts.
        settings: see there.
    """

    def __init__(self, generator: ReportGenerator, settings: ListenSettings):
        self.generator, self.settings, self.spool = generator, settings, Spool(settings.spool)
        self._stop, self._arrived, self._ready = threading.Event(), threading.Event(), threading.Event()
        self._pair_wait = settings.pair_wait_s if generator.reads_lateral else 0.0
        self._held: float | None = None  # seconds until a radiograph has waited long enough for another
        self._threads: list[threading.Thread] = []
        self._server: Any = None
        self._reception = ReceptionLimit(settings.max_object_bytes, settings.max_received_bytes, tell)
        self._delivery: Delivery | None = None
        self._pause: float = RESCAN_S  # seconds until a draft may be sent again
        if settings.peer is not None:
            retries = settings.first_retry_s, settings.last_retry_s
            self._delivery = Delivery(self.spool, settings.aet, settings.peer, *retries, self._stop.is_set)

    def start(self) -> None:
        """Listen.

        Raises:
            ContextError: the address is taken.
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
        try:
            handlers: Any = [(evt.EVT_C_STORE, self._receive), *self._reception.handlers()]
            self._server = node.start_server(address, block=False, evt_handlers=handlers)
        except OSError as error:
            reason = f"cannot listen on {address[0]}:{address[1]}: {error.strerror}; give another --port"
            raise ContextError(reason) from None
        for work in (self._draft_all, self._send_all):
            thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)
        self._arrived.set()
        self._ready.set()

    def stop(self) -> None:
        """Take nothing more, finish the draft in the making."""
        if self._server is not None:
            self._server.shutdown()
        self._stop.set()
        self._arrived.set()
        self._ready.set()
        for thread in self._threads:
            thread.join(60)

    def _receive(self, event: evt.Event) -> int:
        """A radiograph has come: on disk first, acknowledged then."""
        request: Any = event.request
        content = request.DataSet.getbuffer() if request.DataSet is not None else b""
        try:
            uid = str(request.AffectedSOPInstanceUID)
            if not is_uid(uid):  # it becomes a file's name
                tell("a radiograph whose SOP Instance UID is malformed was refused")
                return _CANNOT_STORE
            if request.AffectedSOPClassUID != event.context.abstract_syntax:
                tell("an object of another SOP class than was agreed on was refused")
                return _OTHER_CLASS
            self.spool.make()
            if shutil.disk_usage(self.spool.folder).free < _RESERVE_BYTES:
                tell("no space left in the spool: a radiograph was refused")
                return _NO_SPACE
            if self.spool.is_full(self.settings.max_waiting):
                tell(f"{self.settings.max_waiting:,} radiographs wait already: one more was refused")
                return _NO_SPACE
            header = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
            self.spool.put(self.spool.incoming, f"{safe_name(uid)}.dcm", header, content)
        except OSError as error:
            tell(f"a radiograph could not be kept ({error.strerror}) and was refused")
            return _NO_SPACE
        except Exception as error:
            tell(f"a radiograph could not be kept ({type(error).__name__}) and was refused")
            return _CANNOT_STORE
        finally:
            self._reception.kept(event.assoc, len(content))
        self._arrived.set()
        return _SUCCESS

    def _guarded(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception as error:  # a full disk, say: nothing is lost, and it is tried again
                reason = error.strerror if isinstance(error, OSError) else None  # without the file's name
                tell(f"{reason or type(error).__name__}: trying again in {self.settings.first_retry_s:.0f} s")
                self._stop.wait(self.settings.first_retry_s)
                self._arrived.set()
                self._ready.set()

    def _draft_all(self) -> None:
        self._arrived.wait(RESCAN_S if self._held is None else self._held)
        self._arrived.clear()
        trouble: OSError | None = None
        deaths = self.spool.deaths()
        # Radiographs at which a process ended come last: others are not held up, and one that is always being drafted
        # when the process ends is tried alone at last, which tells it from one that happened to be in turn.
        waiting = sorted(self.spool.waiting(self.spool.incoming), key=lambda path: deaths.get(path, 0))
        for path, lateral in self._studies(waiting, deaths):
            if self._stop.is_set() or (path in deaths and self._arrived.is_set()):
                break
            try:
                self._draft(path, lateral, deaths.get(path, 0))
            except OSError as error:  # the machine's, such as a full disk: the others are tried, too
                trouble = error
        if trouble is not None:
            raise trouble

    def _studies(self, waiting: list[Path], deaths: dict[Path, int]) -> list[tuple[Path, Path | None]]:
        """What is to be drafted now: a radiograph, and the lateral one of its study beside it."""
        self._held = None
        if not self._pair_wait:
            return [(path, None) for path in waiting]
        places = {
            path: (None, None) if deaths.get(path, 0) >= MAX_DEATHS_AS_PAIR else _study_and_view(path)
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
            except OSError:  # it was taken away
                continue
            if other is not None:
                found.append((path, other) if view == "frontal" else (other, path))
                used |= {path, other}
            elif study and view and 0 < left <= self._pair_wait:  # more, if the clock was set back
                self._held = left if self._held is None else min(self._held, left)
            else:
                found.append((path, None))
        return found

    def _draft(self, path: Path, lateral: Path | None = None, deaths: int = 0) -> None:
        start = monotonic()
        read = {image: version_of(image) for image in (path, lateral) if image is not None}
        if deaths >= MAX_DEATHS:
            reason = f"{deaths} processes ended while they drafted it; does it need more memory than there is?"
            how = f"to try again, send it again or move it to the folder {self.spool.incoming.name} of the spool"
            self.spool.fail(path, read[path], f"no draft: {reason} {how}")
            self.spool.end(path)
            tell("no draft: given up after several attempts that ended the process")
            return
        for image in read:
            self.spool.begin(image, deaths)
        try:
            self._draft_begun(path, lateral, start, read)
        finally:  # whatever came of it, this process lives
            for image in read:
                self.spool.end(image)

    def _draft_begun(
        self, path: Path, lateral: Path | None, start: float, read: dict[Path, tuple[int, int, int] | None]
    ) -> None:
        try:
            try:
                report = self.generator.generate(path, lateral=lateral)
            except RadiographError:
                if lateral is None:
                    raise
                report, lateral = self.generator.generate(path), None  # the lateral one is tried by itself, later
            document = to_sr(report, read_header(path), same_again=True)
        except Exception as error:  # this image's trouble must not hold up the others
            if not path.exists():  # somebody took it away
                return
            trouble = machine_trouble(error)
            if trouble is not None:
                raise trouble from None  # the image stays and is tried again
            # The text of other exceptions may hold header values: only their kind is told.
            reason = str(error) if isinstance(error, CbedgeError) else f"no draft: {type(error).__name__}"
            self.spool.fail(path, read[path], reason)
            tell(f"no draft: {type(error).__name__}")
            return
        self.spool.put(self.spool.outgoing, path.name, document)
        for done in filter(None, (path, lateral)):
            self.spool.remove(done, read[done])  # one that was sent again meanwhile is drafted again
        tell(f"drafted in {monotonic() - start:.2f} s")
        self._ready.set()

    def _send_all(self) -> None:
        self._ready.wait(self._pause)
        self._ready.clear()
        if self._delivery is not None:
            self._pause = self._delivery.run()


def _study_and_view(path: Path) -> tuple[str | None, str | None]:
    """What a radiograph's header says of both; nothing where it cannot be read, which drafting it will tell."""
    try:
        header = read_header(path)
        if header is None:
            return None, None
        return str(header.get("StudyInstanceUID") or "") or None, header_view(header)
    except Exception:  # whatever a damaged header raises
        return None, None


def run_listener(generator: ReportGenerator, settings: ListenSettings) -> None:
    """Listen until the process is told to end."""
    log_to_stderr()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    listener = Listener(generator, settings)
    listener.start()
    tell(f"{settings.aet} listens on {settings.host}:{settings.port}")
    ended.wait()
    listener.stop()
    tell("ended")
