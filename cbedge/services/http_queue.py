"""The queue of the HTTP service: one draft at a time, with deadlines, tickets for rejected clients, and metrics."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cbedge.api import ReportGenerator, ReportStream

MAX_TICKETS = 64
TICKET_GRACE_S = 10  # a ticket is valid this much longer than Retry-After


@dataclass(frozen=True)
class ServeSettings:
    """Settings of the HTTP service.

    Attributes:
        token: required in ``Authorization: Bearer``; ``None`` allows all local clients.
        max_bytes: maximum size of a request.
        queue: maximum number of waiting drafts; further requests get status 429.
        deadline_s: time limit from arrival to the last token, in seconds; then the status is 503.
        idle_s: timeout for the next part of a request, in seconds; then the status is 408.
        hosts: host names that clients may use; empty allows any.
        max_together: maximum size of all open requests, which are stored as temporary files; beyond it, the status is
            503.
    """

    token: str | None = None
    max_bytes: int = 64 * 2**20
    queue: int = 8
    deadline_s: float = 60.0
    idle_s: float = 10.0
    hosts: tuple[str, ...] = ()
    max_together: int = 1024 * 2**20


class Overloaded(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds until the client should retry.
        ticket: gives the client priority when it retries; ``None`` if too many tickets are issued.
    """

    def __init__(self, retry_after: int, ticket: str | None):
        self.retry_after, self.ticket = retry_after, ticket


class GivenUp(Exception):
    """The deadline passed, or the client disconnected."""


class Drafter:
    """Runs one draft at a time, with a queue of limited length.

    A rejected client gets a ticket, and half of the queue is reserved for clients with tickets. Otherwise clients that
    send requests without pause could keep the queue full and block others forever.
    """

    def __init__(self, generator: ReportGenerator, settings: ServeSettings, metrics: Metrics):
        self.generator, self.settings, self.metrics = generator, settings, metrics
        self.draining = False
        self.waiting = 0
        self._turn = asyncio.Lock()
        self._writer = ThreadPoolExecutor(1, "draft")  # one thread, because CUDA graphs are recorded per thread
        self._usual_s = 1.0
        self._tickets: dict[str, float] = {}  # ticket → expiry time

    async def draft(
        self,
        make: Callable[[], ReportStream],
        alive: Callable[[], Awaitable[bool]],
        send: Callable[[str], Awaitable[None]] | None = None,
        ticket: str | None = None,
    ) -> ReportStream:
        """Draft in a thread. ``send`` is called with every piece; ``alive`` is checked between pieces.

        ``ticket`` is the ticket of an earlier :class:`Overloaded`.

        Raises:
            Overloaded: the queue is full.
            GivenUp: the deadline passed, or the client disconnected.
            CbedgeError: the radiograph or its context is invalid.
        """
        self._admit(ticket)
        deadline = time.monotonic() + self.settings.deadline_s
        self.waiting += 1
        self.metrics.waiting.set(self.waiting)
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.settings.deadline_s):
                await self._turn.acquire()
        except TimeoutError:
            raise GivenUp("the deadline passed while waiting in the queue") from None
        finally:
            self.waiting -= 1
            self.metrics.waiting.set(self.waiting)
        try:
            start = time.monotonic()
            stream = await self._write(make, alive, send, deadline)
            self._usual_s = 0.8 * self._usual_s + 0.2 * (time.monotonic() - start)
            return stream
        finally:
            self._turn.release()

    def _admit(self, ticket: str | None) -> None:
        now, queue = time.monotonic(), self.settings.queue
        self._tickets = {held: lapses for held, lapses in self._tickets.items() if lapses > now}
        came_back = ticket is not None and self._tickets.pop(ticket, None) is not None
        kept = 0 if came_back else min(len(self._tickets), queue // 2)
        if self.waiting + kept <= queue:
            return
        self.metrics.refused.inc()
        ahead = self.waiting + min(len(self._tickets), queue) - queue // 2
        retry_after = max(1, round(ahead * self._usual_s))
        issued = uuid.uuid4().hex if len(self._tickets) < MAX_TICKETS else None
        if issued:
            self._tickets[issued] = now + retry_after + TICKET_GRACE_S
        raise Overloaded(retry_after, issued)

    async def _write(
        self,
        make: Callable[[], ReportStream],
        alive: Callable[[], Awaitable[bool]],
        send: Callable[[str], Awaitable[None]] | None,
        deadline: float,
    ) -> ReportStream:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop, stop = asyncio.get_running_loop(), threading.Event()

        def work() -> ReportStream:
            try:
                stream = make()
                for piece in stream:
                    if stop.is_set():
                        raise GivenUp("the client disconnected")
                    if time.monotonic() > deadline:
                        raise GivenUp("the deadline passed during the draft")
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
                return stream
            finally:
                loop.call_soon_threadsafe(pieces.put_nowait, None)

        task = asyncio.ensure_future(loop.run_in_executor(self._writer, work))
        try:
            while (piece := await pieces.get()) is not None:
                if not await alive():
                    stop.set()
                elif send is not None:
                    await send(piece)
        except BaseException:
            stop.set()
            raise
        finally:
            await asyncio.wait([task])  # the thread ends before the next draft starts
        return task.result()


class Metrics:
    """Metrics for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.drafts = Counter("cbedge_drafts", "Drafts by outcome.", ["outcome"], registry=self.registry)
        self.refused = Counter(
            "cbedge_refused", "Requests rejected because the queue was full.", registry=self.registry
        )
        self.seconds = Histogram(
            "cbedge_draft_seconds", "Seconds from arrival to the last token.", registry=self.registry,
            buckets=(0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60),
        )  # fmt: skip
        self.tokens = Counter("cbedge_tokens", "Tokens written.", registry=self.registry)
        self.waiting = Gauge("cbedge_waiting", "Requests in the queue.", registry=self.registry)
