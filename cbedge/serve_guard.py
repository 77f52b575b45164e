"""What stands before the HTTP service: limits of size and time, known hosts, and the token."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_OPEN_REQUESTS = 256


class RequestGuard:
    """Refuses a request that is too large, too slow, or for another host, before it reaches the application.

    Args:
        app: the application behind.
        max_bytes: of a request's body, by what it announces and by what comes.
        idle_s: seconds in which the next part of a body has to come.
        body_s: seconds in which a whole body has to come.
        hosts: names by which the service may be addressed, without ports; empty allows any. A page of another site can
            make a browser send requests to this machine under a name of its own (DNS rebinding); this stops it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, idle_s: float, body_s: float, hosts: tuple[str, ...] = ()):
        self.app, self.max_bytes, self.idle_s, self.body_s = app, max_bytes, idle_s, body_s
        self.hosts = frozenset(host.lower() for host in hosts)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._open += 1
        try:
            await self.app(scope, self._limited(receive), send)
        finally:
            self._open -= 1

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._open >= MAX_OPEN_REQUESTS:
            return JSONResponse({"detail": "too many requests are open: come again in 5 s"}, 503, {"Retry-After": "5"})
        if self.hosts and host_name(headers.get(b"host", "")) not in self.hosts:
            return JSONResponse(
                {"detail": "the Host header names another machine: use this service's own address"}, 421
            )
        origin = headers.get(b"origin")
        if origin and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            ours = host_name(headers.get(b"host", ""))
            if urlsplit(origin).hostname != ours:
                return JSONResponse({"detail": "the request comes from a page of another site"}, 403)
        announced = headers.get(b"content-length", "0")
        if not announced.isdigit():
            return JSONResponse({"detail": "Content-Length is not a number"}, 400)
        if int(announced) > self.max_bytes:
            return JSONResponse({"detail": self._too_large()}, 413)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """``receive`` with limits on size and time until the body is complete."""
        read, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.body_s

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                until = min(deadline, asyncio.get_running_loop().time() + self.idle_s)
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "the request came too slowly: send it again", {"Connection": "close"}
                ) from None
            read += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if read > self.max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"the request is larger than {self.max_bytes:,} bytes: scale the radiograph down"


def host_name(header: str) -> str:
    """The name in a Host header, in lower case and without the port."""
    name = header.strip().lower()
    if name.startswith("["):  # IPv6
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


def token_check(token: str | None) -> Callable[[Request], None]:
    """A dependency that refuses requests without the token."""

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # as it was on the wire
        wanted = f"Bearer {token}"
        forms = [wanted.encode()]
        if token and not token.isascii():
            forms += [wanted.encode(name, "ignore") for name in ("latin-1",) if _fits(wanted, name)]
        if token and not any([hmac.compare_digest(given, form) for form in forms]):
            raise HTTPException(401, "give the token as: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    return check


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def patient_protocol(header_s: float) -> Any:
    """A uvicorn protocol that closes connections on which no request is complete after some seconds: those of port
    checks, and of clients that send their headers a byte at a time."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class HeaderTimeoutProtocol(H11Protocol):
        """HTTP/1.1 with a limit on the time that the first request's headers take."""

        def connection_made(self, transport: Any) -> None:
            """Start the clock."""
            super().connection_made(transport)
            self._headers_due = self.loop.call_later(header_s, self._close_if_silent)

        def _close_if_silent(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            """Stop the clock."""
            self._headers_due.cancel()
            super().connection_lost(exc)

    return HeaderTimeoutProtocol
