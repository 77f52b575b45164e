"""A DICOM node: radiographs are sent to it, drafts go back to the PACS as Structured Reports.

What was received is on disk before the sender is told so, and every step ends with a rename, so a process that is
killed at any moment goes on where it stopped. A draft that is made or sent again has the same identifiers, so a PACS
keeps one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedSRStorage,
    Verification,
)

from cbedge.dicom import header_view, read_header, silence_pydicom
from cbedge.dicom_header import is_uid
from cbedge.errors import CbedgeError, ContextError, OutputError, RadiographError
from cbedge.files import lock_file, write_atomically
from cbedge.formats import to_sr
from cbedge.generator import ReportGenerator
from cbedge.listen_guard import GuardedAE, ReceptionLimit

_IMAGES = (
    ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, DigitalXRayImageStorageForProcessing,
)  # fmt: skip
_SYNTAXES = [
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
]  # fmt: skip
_SUCCESS, _NO_SPACE, _OTHER_CLASS, _CANNOT_STORE = 0x0000, 0xA700, 0xA900, 0xC000
_TAKEN = (_SUCCESS, 0xB000, 0xB006, 0xB007)
_RESERVE_BYTES = 50 * 2**20
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
MAX_ATTEMPTS = 3  # at one image, also over several processes: one that needs too much memory ends its process
MAX_ASSOCIATIONS = 200  # connections that have not associated yet count too
ASSOCIATE_S, IDLE_S = 10, 60  # seconds until such a connection, or an association that says nothing, is closed
_log = logging.getLogger("cbedge.listen")


@dataclass(frozen=True)
class Peer:
    """Another DICOM node, as ``AET@host:port``."""

    aet: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Peer:
        """Read ``AET@host:port``.

        Raises:
            ContextError: it has another form.
        """
        aet, _, address = text.partition("@")
        host, _, port = address.rpartition(":")
        if not (0 < len(aet.strip()) <= 16 and host and port.isdigit() and 0 < int(port) < 65536):
            raise ContextError(f"{text!r} is no DICOM node; give it as AET@host:port, such as PACS@10.0.0.5:104")
        return cls(aet.strip(), host, int(port))


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


class Spool:
    """The queue on disk: ``incoming`` radiographs, ``outgoing`` drafts, ``failed`` radiographs with the reason beside.

    Raises:
        OutputError: the folder cannot be written, or another process works in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.incoming, self.outgoing, self.failed = (folder / n for n in ("incoming", "outgoing", "failed"))
        try:
            self.make()
            self._lock = lock_file(folder / "lock", f"another cbedge listen works in {folder}: give another --spool")
        except OSError as error:
            raise OutputError(f"cannot write the spool {folder}: {error.strerror}; give another --spool") from None
        for left in [*self.incoming.glob(".*"), *self.outgoing.glob(".*")]:
            with contextlib.suppress(OSError):  # a folder of somebody else's, say
                left.unlink()  # what was being written when a process died was acknowledged to nobody

    def make(self) -> None:
        """Make the folders that are not there, also while working: somebody may have cleared the spool."""
        for part in (self.incoming, self.outgoing, self.failed):
            part.mkdir(parents=True, exist_ok=True)

    def put(self, folder: Path, name: str, *parts: bytes | memoryview) -> None:
        """Write a file that is there wholly and durably, or not at all."""
        try:
            write_atomically(folder / name, *parts)
        except FileNotFoundError:
            self.make()
            write_atomically(folder / name, *parts)

    def waiting(self, folder: Path) -> list[Path]:
        """Its files, the oldest first."""
        found = []
        for path in folder.glob("*.dcm"):
            with contextlib.suppress(OSError):  # it was taken away meanwhile
                if path.is_file():
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def is_full(self, most: int) -> bool:
        """Whether so many radiographs wait."""
        with os.scandir(self.incoming) as entries:
            return sum(entry.name.endswith(".dcm") for entry in itertools.islice(entries, 2 * most + 2)) >= most

    def fail(self, path: Path, reason: str, name: str | None = None) -> None:
        """Move a file to ``failed``, with the reason beside it."""
        self.put(self.failed, f"{path.stem}.txt", f"{reason}\n".encode())
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, self.failed / (name or path.name))
        self.forget_attempts(path)

    def count_attempt(self, path: Path) -> int:
        """Note that a file is being drafted, durably; returns how often that was tried before."""
        count, beside = 0, path.with_suffix(".attempts")
        with contextlib.suppress(OSError, ValueError):
            count = int(beside.read_text())
        beside.write_text(str(count + 1))
        return count

    def forget_attempts(self, path: Path) -> None:
        """The file is dealt with."""
        path.with_suffix(".attempts").unlink(missing_ok=True)


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
        self._reception = ReceptionLimit(settings.max_object_bytes, settings.max_received_bytes, _tell)
        self._refusal = ""  # why the last delivery did not come about

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
                _tell("a radiograph whose SOP Instance UID is malformed was refused")
                return _CANNOT_STORE
            if request.AffectedSOPClassUID != event.context.abstract_syntax:
                _tell("an object of another SOP class than was agreed on was refused")
                return _OTHER_CLASS
            self.spool.make()
            if shutil.disk_usage(self.spool.folder).free < _RESERVE_BYTES:
                _tell("no space left in the spool: a radiograph was refused")
                return _NO_SPACE
            if self.spool.is_full(self.settings.max_waiting):
                _tell(f"{self.settings.max_waiting:,} radiographs wait already: one more was refused")
                return _NO_SPACE
            header = b"\0" * 128 + b"DICM" + encode_file_meta(event.file_meta)
            self.spool.put(self.spool.incoming, f"{uid}.dcm", header, content)
        except OSError as error:
            _tell(f"a radiograph could not be kept ({error.strerror}) and was refused")
            return _NO_SPACE
        except Exception as error:
            _tell(f"a radiograph could not be kept ({type(error).__name__}) and was refused")
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
                _tell(f"{reason or type(error).__name__}: trying again in {self.settings.first_retry_s:.0f} s")
                self._stop.wait(self.settings.first_retry_s)
                self._arrived.set()
                self._ready.set()

    def _draft_all(self) -> None:
        self._arrived.wait(self._held)
        self._arrived.clear()
        trouble: OSError | None = None
        for path, lateral in self._studies(self.spool.waiting(self.spool.incoming)):
            if self._stop.is_set():
                return
            try:
                self._draft(path, lateral)
            except OSError as error:  # the machine's, such as a full disk: the others are tried, too
                trouble = error
        if trouble is not None:
            raise trouble

    def _studies(self, waiting: list[Path]) -> list[tuple[Path, Path | None]]:
        """What is to be drafted now: a radiograph, and the lateral one of its study beside it."""
        self._held = None
        if not self._pair_wait:
            return [(path, None) for path in waiting]
        places = {path: _study_and_view(path) for path in waiting}
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
            elif study and view and left > 0:
                self._held = left if self._held is None else min(self._held, left)
            else:
                found.append((path, None))
        return found

    def _draft(self, path: Path, lateral: Path | None = None) -> None:
        start = monotonic()
        if self.spool.count_attempt(path) >= MAX_ATTEMPTS:
            self.spool.fail(path, f"no draft: given up after {MAX_ATTEMPTS} attempts that ended the process")
            _tell("no draft: given up after several attempts that ended the process")
            return
        read = {image: _version(image) for image in (path, lateral) if image is not None}
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
                self.spool.forget_attempts(path)
                return
            trouble = _machine_trouble(error)
            if trouble is not None:
                self.spool.forget_attempts(path)
                raise trouble from None  # the image stays and is tried again
            # The text of other exceptions may hold header values: only their kind is told.
            reason = str(error) if isinstance(error, CbedgeError) else f"no draft: {type(error).__name__}"
            self.spool.fail(path, reason)
            _tell(f"no draft: {type(error).__name__}")
            return
        self.spool.put(self.spool.outgoing, path.name, document)
        for done in filter(None, (path, lateral)):
            if _version(done) == read[done]:  # else it was sent again meanwhile, and is drafted again
                done.unlink(missing_ok=True)
            self.spool.forget_attempts(done)
        _tell(f"drafted in {monotonic() - start:.2f} s")
        self._ready.set()

    def _send_all(self) -> None:
        self._ready.wait()
        self._ready.clear()
        if self.settings.peer is None:
            return
        pause = self.settings.first_retry_s
        while not self._stop.is_set():
            waiting = self.spool.waiting(self.spool.outgoing)
            if not waiting:
                return
            if self._send(waiting):
                pause = self.settings.first_retry_s
                continue
            why = f" ({self._refusal})" if self._refusal else ""
            _tell(f"{len(waiting)} drafts wait for the PACS{why}: trying again in {pause:.0f} s")
            self._stop.wait(pause)
            pause = min(2 * pause, self.settings.last_retry_s)

    def _send(self, paths: list[Path]) -> bool:
        """Deliver as many as the PACS takes; whether any was dealt with."""
        import pydicom

        peer = self.settings.peer
        assert peer is not None
        self._refusal = ""
        node = AE(self.settings.aet)
        node.acse_timeout = node.dimse_timeout = node.network_timeout = node.connection_timeout = 30
        node.add_requested_context(EnhancedSRStorage)
        association = node.associate(peer.host, peer.port, ae_title=peer.aet)
        if not association.is_established:
            self._refusal = _why_not(association, peer)
            return False
        dealt_with = 0
        try:
            for path in paths:
                try:
                    dataset = pydicom.dcmread(path)
                except FileNotFoundError:  # somebody took it away
                    continue
                except Exception as error:  # damaged on disk
                    if _machine_trouble(error) is not None:
                        raise
                    self.spool.fail(path, f"the draft cannot be read: {type(error).__name__}", f"sr-{path.name}")
                    _tell("a draft in the spool cannot be read and was put aside")
                    dealt_with += 1
                    continue
                try:
                    status = association.send_c_store(dataset).get("Status")
                except Exception as error:  # a file that is no draft, such as one with another SOP class
                    if not association.is_established:
                        self._refusal = f"{peer.aet} hung up"
                        break
                    self.spool.fail(path, f"the draft cannot be sent: {type(error).__name__}", f"sr-{path.name}")
                    _tell("a file among the drafts cannot be sent and was put aside")
                    dealt_with += 1
                    continue
                if status in _TAKEN:
                    path.unlink(missing_ok=True)
                elif status is None or 0xA700 <= status <= 0xA7FF:  # gone, or out of resources: later, then
                    code = "" if status is None else f" with status {status:#06x}"
                    self._refusal = f"{peer.aet} is out of resources{code}" if code else f"{peer.aet} hung up"
                    with contextlib.suppress(OSError):
                        os.utime(path)  # the next attempt starts with another draft
                    break
                else:
                    self.spool.fail(path, f"the PACS refused it: {status:#06x}", f"sr-{path.name}")
                    _tell(f"the PACS refused a draft with status {status:#06x}")
                dealt_with += 1
        finally:
            association.release()
        if dealt_with:
            _tell(f"{dealt_with} drafts dealt with by the PACS")
        return dealt_with > 0


def _why_not(association: Any, peer: Peer) -> str:
    """Why a peer did not associate, in words."""
    if association.is_rejected:
        answer = association.acceptor.primitive
        reason = getattr(answer, "reason_str", "") or "no reason given"
        return f"{peer.aet} rejected the association: {reason.lower()}"
    if association.rejected_contexts:
        return f"{peer.aet} does not take Enhanced SR documents (SOP class {EnhancedSRStorage})"
    if association.is_aborted and association.acceptor.primitive is not None:
        return f"{peer.aet} aborted the association"
    return f"nobody answers at {peer.host}:{peer.port}"


def _machine_trouble(error: BaseException | None) -> OSError | None:
    """The error behind an error where the machine is the cause, not the file: a full disk, too many open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
            return error
        error = error.__cause__ or error.__context__
    return None


def _version(path: Path) -> tuple[int, int, int] | None:
    """Tells a file from one that replaced it."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns, state.st_size


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
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "message": %(message)s}'))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it logs what it is sent
    silence_pydicom()
    threading.excepthook = lambda ended: _tell(f"a connection was ended by a {ended.exc_type.__name__}")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    listener = Listener(generator, settings)
    listener.start()
    _tell(f"{settings.aet} listens on {settings.host}:{settings.port}")
    ended.wait()
    listener.stop()
    _tell("ended")


def _tell(text: str) -> None:
    _log.info(json.dumps(text))
