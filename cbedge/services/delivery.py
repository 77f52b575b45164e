"""Delivery of drafts to the PACS, with retries.

If the PACS does not answer or has no space, delivery is retried without limit, at growing intervals. If the PACS
rejects a draft itself, for example because it does not accept the SOP class, the number of retries is limited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from pynetdicom import AE
from pynetdicom.sop_class import EnhancedSRStorage  # type: ignore[attr-defined]
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS

from cbedge.errors import OptionError
from cbedge.services.addresses import check_ae_title
from cbedge.services.dicom_log import log
from cbedge.services.spool import Spool, Version, machine_trouble, version_of

MAX_REFUSALS = 10  # about half an hour with intervals from 5 s to 600 s
RESCAN_S = 30.0  # interval for finding files that a user put into the spool
_TIMEOUT_S = 30
_ACCEPTED = (0x0000, 0x0111, 0xB000, 0xB006, 0xB007)  # 0x0111: duplicate, already stored


@dataclass(frozen=True)
class Peer:
    """Another DICOM node, as ``AET@host:port``."""

    aet: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Peer:
        """Parse ``AET@host:port``.

        Raises:
            OptionError: the text has another form.
        """
        aet, _, address = text.partition("@")
        host, _, port = address.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise OptionError(f"{text!a} is not a DICOM node; give AET@host:port, such as PACS@10.0.0.5:104")
        check_ae_title(aet, "--peer")
        return cls(aet.strip(), host, int(port))


@dataclass
class _Draft:
    """History of the attempts to send a draft.

    Attributes:
        refusals: how often the PACS rejected the draft itself.
        postponed: how often the PACS was out of resources.
        due: time of the next attempt.
    """

    refusals: int = 0
    postponed: int = 0
    due: float = 0.0


class Delivery:
    """Sends the drafts of a spool to a PACS.

    Args:
        spool: its folder ``outgoing`` has the drafts.
        aet: the sender's own application entity title.
        peer: the PACS.
        first_retry_s, last_retry_s: seconds until the first retry, doubled with each failure up to the last.
        is_stopped: whether to stop before all drafts are sent.
    """

    def __init__(
        self,
        spool: Spool,
        aet: str,
        peer: Peer,
        first_retry_s: float,
        last_retry_s: float,
        is_stopped: Callable[[], bool] = lambda: False,
    ):
        self.spool, self.aet, self.peer, self.is_stopped = spool, aet, peer, is_stopped
        self.first_retry_s, self.last_retry_s = first_retry_s, last_retry_s
        self._drafts: dict[str, _Draft] = {}
        self._failures = 0  # consecutive attempts without a connection or without resources at the PACS
        self._due = 0.0  # time of the next attempt

    def run(self) -> float:
        """Send the drafts that are due.

        Returns:
            Seconds until the next attempt, unless a new draft arrives first.
        """
        while not self.is_stopped():
            waiting = self.spool.waiting(self.spool.outgoing)
            self._drafts = {path.name: self._drafts.get(path.name, _Draft()) for path in waiting}
            now = monotonic()
            soonest = max(self._due, min((draft.due for draft in self._drafts.values()), default=now + RESCAN_S))
            if soonest > now:
                return min(soonest - now, RESCAN_S)
            due = [path for path in waiting if self._drafts[path.name].due <= now]
            self._send(sorted(due, key=lambda path: self._drafts[path.name].postponed))
        return 0

    def _pause(self, times: int) -> float:
        return min(self.first_retry_s * 2.0 ** min(times - 1, 30), self.last_retry_s)

    def _try_later(self, reason: str) -> None:
        """The PACS cannot be reached, or is out of resources."""
        self._failures += 1
        pause = self._pause(self._failures)
        self._due = monotonic() + pause
        log(f"{len(self._drafts)} drafts are waiting for the PACS ({reason}): retrying in {pause:.0f} s")

    def _refused(self, path: Path, version: Version | None, reason: str) -> None:
        """The PACS rejected this draft."""
        draft = self._drafts[path.name]
        draft.refusals += 1
        if draft.refusals < MAX_REFUSALS:
            draft.due = monotonic() + self._pause(draft.refusals)
            return
        name = _failed_name(path)
        remedy = f"to send it again, move {name} to the folder {self.spool.outgoing.name} of the spool"
        self.spool.fail(path, version, f"not delivered: {reason}, {MAX_REFUSALS} times; {remedy}", name)
        log(f"a draft was moved to failed: {reason}, {MAX_REFUSALS} times")

    def _send(self, paths: list[Path]) -> None:
        """Send drafts to the PACS over one association."""
        node = AE(self.aet)
        node.acse_timeout = node.dimse_timeout = node.network_timeout = node.connection_timeout = _TIMEOUT_S
        node.add_requested_context(EnhancedSRStorage)
        association = node.associate(self.peer.host, self.peer.port, ae_title=self.peer.aet)
        if not association.is_established:
            if association.rejected_contexts:
                reason = f"{self.peer.aet} does not accept Enhanced SR documents (SOP class {EnhancedSRStorage})"
                log(f"{len(paths)} drafts were rejected: {reason}")
                for path in paths:
                    self._refused(path, version_of(path), reason)
            else:
                self._try_later(_why_not(association, self.peer))
            return
        try:
            delivered = 0
            for path in paths:
                if self.is_stopped():
                    break
                status = self._send_one(association, path)
                if status in _ACCEPTED:
                    delivered += 1
                    self._failures = 0
                elif status is None and not association.is_established:
                    self._try_later(f"{self.peer.aet} closed the connection")
                    break
                elif status is not None and 0xA700 <= status <= 0xA7FF:
                    self._drafts[path.name].postponed += 1  # the next attempt starts with another draft
                    self._try_later(f"{self.peer.aet} is out of resources with status {status:#06x}")
                    break
        finally:
            association.release()
        if delivered:
            log(f"{delivered} drafts were delivered")

    def _send_one(self, association: Any, path: Path) -> int | None:
        """Send one draft. Returns the status; ``None`` if the PACS gave none, or there was nothing to send."""
        import pydicom

        version = version_of(path)
        try:
            dataset = pydicom.dcmread(path)
        except FileNotFoundError:  # removed meanwhile
            return None
        except Exception as error:  # damaged on disk
            if machine_trouble(error) is not None:
                raise
            self._put_aside(path, version, f"the draft cannot be read: {type(error).__name__}")
            return None
        try:
            status = association.send_c_store(dataset).get("Status")
        except Exception as error:  # not a draft, for example another SOP class
            if association.is_established:
                self._put_aside(path, version, f"the draft cannot be sent: {type(error).__name__}")
            return None
        if status in _ACCEPTED:
            self.spool.remove(path, version)
        elif status is not None and not 0xA700 <= status <= 0xA7FF:
            meaning = STORAGE_SERVICE_CLASS_STATUS.get(status, ("", "unknown"))[1].lower()
            reason = f"{self.peer.aet} rejected it with status {status:#06x} ({meaning})"
            log(f"a draft was rejected: {reason}")
            self._refused(path, version, reason)
        return status

    def _put_aside(self, path: Path, version: Version | None, reason: str) -> None:
        self.spool.fail(path, version, reason, _failed_name(path))
        log(f"a file was moved from outgoing to failed: {reason}")


def _failed_name(path: Path) -> str:
    """A draft's file name in the folder ``failed``, which also has radiographs."""
    return path.name if path.name.startswith("sr-") else f"sr-{path.name}"


def _why_not(association: Any, peer: Peer) -> str:
    """The reason why an association failed, in words."""
    if association.is_rejected:
        answer = association.acceptor.primitive
        reason = getattr(answer, "reason_str", "") or "no reason given"
        return f"{peer.aet} rejected the association: {reason.lower()}"
    if association.is_aborted and association.acceptor.primitive is not None:
        return f"{peer.aet} aborted the association"
    return f"no answer from {peer.host}:{peer.port}"
