"""Protection of the HTTP service: limits on size and time, allowed hosts, and the token."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_OPEN_REQUESTS = 256
MAX_CONNECTIONS = 512
UNREAD_S = 30.0  # timeout for a client that does not read the response
_AUTHORITY = re.compile(r"(\[[0-9a-f:.%]+\]|[^\s:/?#@,\[\]\\]+)(?::(\d{0,5}))?")  # host:port, in lower case

_LATER, _CLOSE = {"Retry-After": "5"}, {"Connection": "close"}


@dataclass
class _Body:
    """Number of bytes received of a request's body."""

    read: int = 0


class RequestGuard:
    """Rejects a request that is too large, too slow, or for another host, before it reaches the application.

    Args:
        app: the protected application.
        max_bytes: maximum size of a body, both declared and received.
        idle_s: timeout for the next part of a body, in seconds.
        body_s: timeout for the complete body, in seconds.
        max_together: maximum size of all bodies that are stored as temporary files at the same time.
        hosts: allowed host names, without ports; empty allows any. They prevent DNS rebinding, by which a page of
            another website makes a browser send requests to this machine under a name of its own.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, idle_s: float, body_s: float, max_together: int, hosts: tuple[str, ...] = ()
    ):
        self.app, self.max_bytes, self.idle_s, self.body_s = app, max_bytes, idle_s, body_s
        self.max_together, self.hosts = max_together, frozenset(host.lower() for host in hosts)
        self._open = self._together = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope, authority = _origin_form(scope)
        refusal = self._refusal(scope, authority)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # treated as GET; the server omits the body
            scope = {**scope, "method": "GET"}
        self._open += 1
        body = _Body()
        try:
            await self.app(scope, self._limited(receive, body), send)
        finally:
            self._open -= 1
            self._together -= body.read

    def _refusal(self, scope: Scope, authority: str | None) -> JSONResponse | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        own = _host_and_port(authority or "")
        if self._open >= MAX_OPEN_REQUESTS:
            return JSONResponse({"detail": "too many requests are open: retry in 5 s"}, 503, _LATER)
        if authority is not None and (own is None or (self.hosts and own[0] not in self.hosts)):
            return JSONResponse({"detail": "the Host header is not allowed: use this service's own address"}, 421)
        origin = headers.get(b"origin")
        foreign = own is None or _host_and_port((origin or "").partition("://")[2]) != own  # also another port
        if origin and foreign and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            return JSONResponse({"detail": "the request comes from a page of another website"}, 403)
        announced = headers.get(b"content-length", "0")
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # A proxy may use the other header, and take the end of the body for a new request (request smuggling).
            return JSONResponse({"detail": "send Content-Length or Transfer-Encoding, not both"}, 400, _CLOSE)
        if not announced.isdigit():
            return JSONResponse({"detail": "Content-Length is not a number"}, 400)
        if int(announced) > self.max_bytes:
            return JSONResponse({"detail": self._too_large()}, 413)
        return None

    def _limited(self, receive: Receive, body: _Body) -> Receive:
        """``receive`` with limits on size and time until the body is complete."""
        complete = False
        deadline = asyncio.get_running_loop().time() + self.body_s

        async def limited() -> Message:
            nonlocal complete
            if complete:
                return await receive()
            try:
                until = min(deadline, asyncio.get_running_loop().time() + self.idle_s)
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request was too slow: send it again", _CLOSE) from None
            size = len(message.get("body", b""))
            body.read += size
            self._together += size
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if body.read > self.max_bytes:
                raise HTTPException(413, self._too_large())
            if self._together > self.max_together:
                raise HTTPException(503, "too many requests are being sent at once: retry in 5 s", _LATER)
            return message

        return limited

    def _too_large(self) -> str:
        return f"the request is larger than {self.max_bytes:,} bytes: scale the radiograph down"


def _host_and_port(authority: str) -> tuple[str, str] | None:
    """Host name in lower case and port of ``host:port``, the port empty for HTTP's own; ``None`` if malformed."""
    match = _AUTHORITY.fullmatch(authority.strip().lower())
    if match is None:
        return None
    return match[1].strip("[]"), "" if match[2] in (None, "80", "443") else match[2]


def _origin_form(scope: Scope) -> tuple[Scope, str | None]:
    """Normalize the request target to a path; returns the scope and ``host:port``, or ``None`` if there is none.

    A client may send an absolute URL as the target (RFC 9112, 3.2.2), which then overrides the Host header. An HTTP/1.0
    client, such as the health check of a load balancer, may omit the host. A browser always sends it.
    """
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"), None)
    if scope["path"].startswith("/") or "://" not in scope["path"]:
        return scope, host
    authority, _, path = scope["path"].partition("://")[2].partition("/")
    raw = scope.get("raw_path", b"").partition(b"://")[2].partition(b"/")[2]
    return {**scope, "path": f"/{path}", "raw_path": b"/" + raw}, authority


def token_check(token: str | None) -> Callable[[Request], None]:
    """A FastAPI dependency that rejects requests without the token."""

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes that were sent
        wanted = f"Bearer {token}"
        forms = [wanted.encode()]
        if token and not token.isascii():
            forms += [wanted.encode(name, "ignore") for name in ("latin-1",) if _fits(wanted, name)]
        if token and not any([hmac.compare_digest(given, form) for form in forms]):
            raise HTTPException(401, "send the token as: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    return check


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class PatientProtocol(H11Protocol):
    """HTTP/1.1 for uvicorn, with time limits on everything except the computation of the response.

    It closes idle and slow connections: port checks, clients that send headers byte by byte, clients that continue to
    send a body after the response, and clients that do not read the response.

    Attributes:
        header_s: timeout for a request's headers, in seconds.
        body_s: time for which the rest of an unneeded body is read and discarded, in seconds. A client that reads the
            response only after sending everything would not see it on a closed connection.
    """

    header_s: float
    body_s: float

    def connection_made(self, transport: Any) -> None:
        """Start the timer."""
        super().connection_made(transport)
        self._unread: asyncio.TimerHandle | None = None
        self._due: asyncio.TimerHandle | None = self.loop.call_later(self.header_s, transport.abort)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Continue the request, or start the next one."""
        super().data_received(data)
        self._watch(True)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch(bool(self.conn.trailing_data[0]))

    def _watch(self, more: bool) -> None:
        """Stop the timer while a request is processed; start it when further data arrive."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._due is None:
            if self.conn.their_state is h11.SEND_BODY:
                self._due = self.loop.call_later(self.body_s, self.transport.abort)
            elif more:
                self._due = self.loop.call_later(self.header_s, self.transport.abort)

    def _stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def pause_writing(self) -> None:
        """The client stopped reading."""
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client continued reading."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)


def patient_protocol(header_s: float, body_s: float) -> type[PatientProtocol]:
    """:class:`PatientProtocol` with these timeouts, in seconds."""
    return type("PatientProtocol", (PatientProtocol,), {"header_s": header_s, "body_s": body_s})
