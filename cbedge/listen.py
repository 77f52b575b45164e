"""A DICOM node: radiographs are sent to it, drafts go back to the PACS as Structured Reports.

What was received is on disk before the sender is told so, and every step ends with a rename, so a process that is
killed at any moment goes on where it stopped. A draft that is made or sent again has the same identifiers, so a PACS
keeps one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
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
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedSRStorage,
    Verification,
)

from cbedge.dicom import header_view, read_header
from cbedge.errors import CbedgeError, ContextError, OutputError, RadiographError
from cbedge.formats import to_sr
from cbedge.generator import ReportGenerator

_IMAGES = (
    ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, DigitalXRayImageStorageForProcessing,
)  # fmt: skip
_SYNTAXES = [
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91",
]  # fmt: skip
_SUCCESS, _NO_SPACE, _CANNOT_STORE = 0x0000, 0xA700, 0xC000
_TAKEN = (_SUCCESS, 0xB000, 0xB006, 0xB007)
_RESERVE_BYTES = 50 * 2**20
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
_UID = re.compile(r"[0-9.]{1,64}")
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


class Spool:
    """The queue on disk: ``incoming`` radiographs, ``outgoing`` drafts, ``failed`` radiographs with the reason beside.

    Raises:
        OutputError: the folder cannot be written, or another process works in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.incoming, self.outgoing, self.failed = (folder / n for n in ("incoming", "outgoing", "failed"))
        try:
            for part in (self.incoming, self.outgoing, self.failed):
                part.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "w")  # noqa: SIM115 - held as long as the process lives
        except OSError as error:
            raise OutputError(f"cannot write the spool {folder}: {error.strerror}; give another --spool") from None
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError:
            raise OutputError(f"another cbedge listen works in {folder}: give another --spool") from None
        for left in [*self.incoming.glob(".*"), *self.outgoing.glob(".*")]:
            left.unlink()  # what was being written when a process died was acknowledged to nobody

    def put(self, folder: Path, name: str, content: bytes) -> None:
        """Write a file that is there wholly and durably, or not at all."""
        partial = folder / f".{name}"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / name)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def waiting(self, folder: Path) -> list[Path]:
        """Its files, the oldest first."""
        return sorted((p for p in folder.glob("*.dcm")), key=lambda p: p.stat().st_mtime_ns)


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

    def start(self) -> None:
        """Listen.

        Raises:
            ContextError: the address is taken.
        """
        node = AE(self.settings.aet)
        node.require_calling_aet = list(self.settings.known)
        node.require_called_aet = True
        node.add_supported_context(Verification)
        for kind in _IMAGES:
            node.add_supported_context(kind, _SYNTAXES)
        address = (self.settings.host, self.settings.port)
        try:
            self._server = node.start_server(address, block=False, evt_handlers=[(evt.EVT_C_STORE, self._receive)])
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
        try:
            if shutil.disk_usage(self.spool.folder).free < _RESERVE_BYTES:
                _tell("no space left in the spool: a radiograph was refused")
                return _NO_SPACE
            request: Any = event.request
            uid = str(request.AffectedSOPInstanceUID)
            if not _UID.fullmatch(uid):  # it becomes a file's name
                return _CANNOT_STORE
            self.spool.put(self.spool.incoming, f"{uid}.dcm", event.encoded_dataset())
        except OSError as error:
            _tell(f"a radiograph could not be kept ({error.strerror}) and was refused")
            return _NO_SPACE
        except Exception as error:
            _tell(f"a radiograph could not be kept ({type(error).__name__}) and was refused")
            return _CANNOT_STORE
        self._arrived.set()
        return _SUCCESS

    def _guarded(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Exception as error:  # a full disk, say: nothing is lost, and it is tried again
                _tell(f"{type(error).__name__}: trying again in {self.settings.first_retry_s:.0f} s")
                self._stop.wait(self.settings.first_retry_s)
                self._arrived.set()
                self._ready.set()

    def _draft_all(self) -> None:
        self._arrived.wait(self._held)
        self._arrived.clear()
        for path, lateral in self._studies(self.spool.waiting(self.spool.incoming)):
            if self._stop.is_set():
                return
            self._draft(path, lateral)

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
            left = self._pair_wait - (time() - path.stat().st_mtime)
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
        try:
            try:
                report = self.generator.generate(path, lateral=lateral)
            except RadiographError:
                if lateral is None:
                    raise
                report, lateral = self.generator.generate(path), None  # the lateral one is tried by itself, later
            document = to_sr(report, read_header(path), same_again=True)
        except Exception as error:  # this image's trouble must not hold up the others
            if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
                raise  # the machine's trouble: the image stays and is tried again
            # The text of other exceptions may hold header values: only their kind is told.
            reason = str(error) if isinstance(error, CbedgeError) else f"no draft: {type(error).__name__}"
            self.spool.put(self.spool.failed, f"{path.stem}.txt", f"{reason}\n".encode())
            path.rename(self.spool.failed / path.name)
            _tell(f"no draft: {type(error).__name__}")
            return
        self.spool.put(self.spool.outgoing, path.name, document)
        path.unlink()
        if lateral is not None:
            lateral.unlink()
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
            _tell(f"{len(waiting)} drafts wait for the PACS: trying again in {pause:.0f} s")
            self._stop.wait(pause)
            pause = min(2 * pause, self.settings.last_retry_s)

    def _send(self, paths: list[Path]) -> bool:
        """Deliver as many as the PACS takes; whether it took any."""
        import pydicom

        peer = self.settings.peer
        assert peer is not None
        node = AE(self.settings.aet)
        node.acse_timeout = node.dimse_timeout = node.network_timeout = node.connection_timeout = 30
        node.add_requested_context(EnhancedSRStorage)
        association = node.associate(peer.host, peer.port, ae_title=peer.aet)
        if not association.is_established:
            return False
        taken = 0
        try:
            for path in paths:
                status = association.send_c_store(pydicom.dcmread(path)).get("Status")
                if status in _TAKEN:
                    path.unlink()
                elif status is None or 0xA700 <= status <= 0xA7FF:  # gone, or out of resources: later, then
                    break
                else:
                    self.spool.put(
                        self.spool.failed, f"{path.stem}.txt", f"the PACS refused it: {status:#06x}\n".encode()
                    )
                    path.rename(self.spool.failed / f"sr-{path.name}")
                    _tell(f"the PACS refused a draft with status {status:#06x}")
                taken += 1
        finally:
            association.release()
        if taken:
            _tell(f"{taken} drafts dealt with by the PACS")
        return taken > 0


def _study_and_view(path: Path) -> tuple[str | None, str | None]:
    """What a radiograph's header says of both; nothing where it cannot be read, which drafting it will tell."""
    try:
        header = read_header(path)
    except CbedgeError:
        header = None
    if header is None:
        return None, None
    return str(header.get("StudyInstanceUID") or "") or None, header_view(header)


def run_listener(generator: ReportGenerator, settings: ListenSettings) -> None:
    """Listen until the process is told to end."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "message": %(message)s}'))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it logs what it is sent
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
