"""Drafts on their way to the PACS: sent again until it takes them, or put aside when it keeps refusing them.

A PACS that does not answer, or has no room, is tried again for ever, with growing pauses. One that refuses a draft for
what the draft is, such as a SOP class that it does not take, is tried a limited number of times.
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

from cbedge.errors import ContextError
from cbedge.services.dicom_log import tell
from cbedge.services.spool import Spool, Version, machine_trouble, version_of

MAX_REFUSALS = 10  # with pauses from 5 s to 600 s about half an hour
RESCAN_S = 30.0  # files that somebody put into the spool are found after so long
_TIMEOUT_S = 30
_TAKEN = (0x0000, 0x0111, 0xB000, 0xB006, 0xB007)  # 0x0111: it is there already


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


@dataclass
class _Draft:
    """What became of the attempts to send a draft.

    Attributes:
        refusals: how often the PACS refused it for what it is.
        postponed: how often the PACS had no room for it.
        due: when it may be sent again.
    """

    refusals: int = 0
    postponed: int = 0
    due: float = 0.0


class Delivery:
    """Sends the drafts of a spool to a PACS.

    Args:
        spool: with the drafts in ``outgoing``.
        aet: the sender's own application entity title.
        peer: the PACS.
        first_retry_s, last_retry_s: seconds after a failed attempt, doubled up to the last.
        is_stopped: whether to end before all is sent.
    """

    def __init__(
        self, spool: Spool, aet: str, peer: Peer, first_retry_s: float, last_retry_s: float,
        is_stopped: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        self.spool, self.aet, self.peer, self.is_stopped = spool, aet, peer, is_stopped
        self.first_retry_s, self.last_retry_s = first_retry_s, last_retry_s
        self._drafts: dict[str, _Draft] = {}
        self._failures = 0  # attempts in a row that reached nobody, or a PACS without room
        self._due = 0.0  # when the PACS may be tried again

    def run(self) -> float:
        """Send what is due.

        Returns:
            Seconds until there is something to do again, unless a new draft comes sooner.
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
        """The PACS cannot be reached, or takes nothing at present."""
        self._failures += 1
        pause = self._pause(self._failures)
        self._due = monotonic() + pause
        tell(f"{len(self._drafts)} drafts wait for the PACS ({reason}): trying again in {pause:.0f} s")

    def _refused(self, path: Path, version: Version | None, reason: str) -> None:
        """The PACS does not take this draft."""
        draft = self._drafts[path.name]
        draft.refusals += 1
        if draft.refusals < MAX_REFUSALS:
            draft.due = monotonic() + self._pause(draft.refusals)
            return
        name = _failed_name(path)
        how = f"to send it again, move {name} to the folder {self.spool.outgoing.name} of the spool"
        self.spool.fail(path, version, f"not delivered: {reason}, {MAX_REFUSALS} times; {how}", name)
        tell(f"a draft was put aside: {reason}, {MAX_REFUSALS} times")

    def _send(self, paths: list[Path]) -> None:
        """Offer drafts to the PACS over one association."""
        node = AE(self.aet)
        node.acse_timeout = node.dimse_timeout = node.network_timeout = node.connection_timeout = _TIMEOUT_S
        node.add_requested_context(EnhancedSRStorage)
        association = node.associate(self.peer.host, self.peer.port, ae_title=self.peer.aet)
        if not association.is_established:
            if association.rejected_contexts:
                reason = f"{self.peer.aet} does not take Enhanced SR documents (SOP class {EnhancedSRStorage})"
                tell(f"{len(paths)} drafts were refused: {reason}")
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
                if status in _TAKEN:
                    delivered += 1
                    self._failures = 0
                elif status is None and not association.is_established:
                    self._try_later(f"{self.peer.aet} hung up")
                    break
                elif status is not None and 0xA700 <= status <= 0xA7FF:
                    self._drafts[path.name].postponed += 1  # the next attempt starts with another draft
                    self._try_later(f"{self.peer.aet} is out of resources with status {status:#06x}")
                    break
        finally:
            association.release()
        if delivered:
            tell(f"{delivered} drafts were delivered")

    def _send_one(self, association: Any, path: Path) -> int | None:
        """Offer one draft. Returns its status; ``None`` where the PACS gave none, or there was nothing to send."""
        import pydicom

        version = version_of(path)
        try:
            dataset = pydicom.dcmread(path)
        except FileNotFoundError:  # somebody took it away
            return None
        except Exception as error:  # damaged on disk
            if machine_trouble(error) is not None:
                raise
            self._put_aside(path, version, f"the draft cannot be read: {type(error).__name__}")
            return None
        try:
            status = association.send_c_store(dataset).get("Status")
        except Exception as error:  # a file that is no draft, such as one with another SOP class
            if association.is_established:
                self._put_aside(path, version, f"the draft cannot be sent: {type(error).__name__}")
            return None
        if status in _TAKEN:
            self.spool.remove(path, version)
        elif status is not None and not 0xA700 <= status <= 0xA7FF:
            meaning = STORAGE_SERVICE_CLASS_STATUS.get(status, ("", "unknown"))[1].lower()
            reason = f"{self.peer.aet} refused it with status {status:#06x} ({meaning})"
            tell(f"a draft was refused: {reason}")
            self._refused(path, version, reason)
        return status

    def _put_aside(self, path: Path, version: Version | None, reason: str) -> None:
        self.spool.fail(path, version, reason, _failed_name(path))
        tell(f"a file among the drafts was put aside: {reason}")


def _failed_name(path: Path) -> str:
    """A draft's name among the failed radiographs."""
    return path.name if path.name.startswith("sr-") else f"sr-{path.name}"


def _why_not(association: Any, peer: Peer) -> str:
    """Why a peer did not associate, in words."""
    if association.is_rejected:
        answer = association.acceptor.primitive
        reason = getattr(answer, "reason_str", "") or "no reason given"
        return f"{peer.aet} rejected the association: {reason.lower()}"
    if association.is_aborted and association.acceptor.primitive is not None:
        return f"{peer.aet} aborted the association"
    return f"nobody answers at {peer.host}:{peer.port}"
