"""Protection of the DICOM node: limits on size and time for its peers, also before they associate.

pynetdicom reads a PDU of any length, waits for its end without a timeout, and keeps every object in memory until it is
complete. All three are limited here, so that no peer can exhaust the memory or block others.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.transport import ThreadedAssociationServer

from cbedge.services.dicom_log import log

MAX_PDU_BYTES = 2**20  # much more than is negotiated; a request with many presentation contexts needs 150 kB
MAX_QUEUED_MESSAGES = 64  # a correct peer waits for each answer
MAX_CONNECTIONS = 400
PDU_S = 20.0  # seconds from the first byte of a PDU to its last, and for each read
_HEADER = struct.Struct(">BxL")  # type, length of the rest
_ASSOCIATE_RQ = 1
_TITLES = slice(4, 36)  # the two AE titles in the rest of an A-ASSOCIATE-RQ


class PeerSocket(socket.socket):
    """Takes over a connection, and closes it if a PDU is too long or too slow."""

    def __init__(self, connection: socket.socket):
        super().__init__(fileno=connection.detach())
        self.settimeout(PDU_S)
        self._header = b""
        self._kind = self._length = 0  # type of the PDU and length of the rest
        self._left = 0  # remaining bytes of the PDU
        self._due = 0.0

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive at most ``size`` bytes of one PDU.

        Raises:
            TimeoutError: the PDU is not complete in time.
            ConnectionError: the PDU is too long.
        """
        if not self._left and not self._header:
            self._due = monotonic() + PDU_S
        elif monotonic() > self._due:
            raise TimeoutError("the PDU is not complete in time")
        received = super().recv(min(size, self._left or _HEADER.size - len(self._header)), flags)
        if self._left:
            start = self._length - self._left
            self._left -= len(received)
            return _padded_titles(received, start) if self._kind == _ASSOCIATE_RQ else received
        self._header += received
        if len(self._header) == _HEADER.size:
            self._kind, self._length = _HEADER.unpack(self._header)
            self._left, self._header = self._length, b""
            if self._left > MAX_PDU_BYTES:
                raise ConnectionError("the PDU is too long")
        return received


def _padded_titles(received: bytes, start: int) -> bytes:
    """Part of an A-ASSOCIATE-RQ, its AE titles padded with spaces instead of NULs, which pynetdicom refuses."""
    first, end = max(_TITLES.start - start, 0), max(_TITLES.stop - start, 0)
    return received[:first] + received[first:end].replace(b"\0", b" ") + received[end:]


class _Server(ThreadedAssociationServer):
    """Server with :class:`PeerSocket` connections, at most :data:`MAX_CONNECTIONS`."""

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        return PeerSocket(connection), address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self.active_associations) < MAX_CONNECTIONS

    def handle_error(self, request: Any, client_address: Any) -> None:
        log("a connection could not be served")


class GuardedAE(AE):
    """An application entity whose servers limit their peers."""

    def make_server(self, *args: Any, **options: Any) -> Any:
        """See :meth:`pynetdicom.AE.make_server`."""
        return super().make_server(*args, **{**options, "server_class": _Server})


@dataclass
class _Received:
    """Bytes in memory that were received over one association."""

    command: int = 0
    data: int = 0
    refused: bool = False


class ReceptionLimit:
    """Counts the bytes of objects while they are received, and aborts associations that send too many.

    Args:
        most_each: limit of bytes in memory for one association.
        most_together: limit of bytes in memory for all associations.
        on_refusal: called with the reason in words.
    """

    def __init__(self, most_each: int, most_together: int, on_refusal: Callable[[str], None]):
        self.most_each, self.most_together, self.on_refusal = most_each, most_together, on_refusal
        self.together = 0
        self._received: dict[Any, _Received] = {}
        self._lock = threading.Lock()

    def handlers(self) -> list[tuple[Any, Callable[[evt.Event], None]]]:
        """Event handlers for the server's associations."""
        return [(evt.EVT_PDU_RECV, self._add), (evt.EVT_CONN_CLOSE, self._forget)]

    def kept(self, association: Any, size: int) -> None:
        """Note that an object of this size is no longer in memory."""
        with self._lock:
            held = self._received.get(association)
            if held is not None:
                size = min(size, held.data)
                held.data -= size
                self.together -= size

    def _add(self, event: evt.Event) -> None:
        if not isinstance(event.pdu, P_DATA_TF):
            return
        with self._lock:
            held = self._received.setdefault(event.assoc, _Received())
            if held.refused:  # the rest is discarded
                return
            for item in event.pdu.presentation_data_value_items:
                value = item.presentation_data_value or b"\0"
                control, size = value[0], len(value) - 1
                if control & 1:  # a command, which is released when complete
                    held.command = 0 if control & 2 else held.command + size
                else:
                    held.data += size
                    self.together += size
            reason = self._reason(held, event.assoc.dimse.msg_queue.qsize())
            if not reason:
                return
            held.refused = True
            self.together -= held.data
            held.data = 0
        event.assoc.abort()
        self.on_refusal(reason)

    def _reason(self, held: _Received, queued: int) -> str:
        if held.command + held.data > self.most_each:
            return f"a radiograph with more than {self.most_each:,} bytes was rejected"
        if self.together > self.most_together:
            return f"more than {self.most_together:,} bytes were being received at once: one sender was rejected"
        if queued > MAX_QUEUED_MESSAGES:
            return "a sender that does not wait for responses was rejected"
        return ""

    def _forget(self, event: evt.Event) -> None:
        with self._lock:
            held = self._received.pop(event.assoc, None)
            if held is not None:
                self.together -= held.data
