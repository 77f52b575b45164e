"""An HTTP service for workstation tools: receives a radiograph, returns a draft, complete or streamed.

There is one draft at a time, because a draft uses all cores. Other requests wait in a queue of limited length; when it
is full, clients are told when to retry. Logs contain no patient data: no text, no file names, no addresses.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect

from cbedge import __version__
from cbedge.api import ReportGenerator, ReportStream
from cbedge.bundles.bundle import CARD
from cbedge.errors import (
    CbedgeError,
    ContextError,
    DeviceError,
    DraftError,
    OptionError,
    RadiographError,
    memory_errors,
)
from cbedge.images.heatmap import overlay, png
from cbedge.images.radiograph import load_radiograph
from cbedge.outputs import FORMATS, SCHEMA, check_source, render
from cbedge.report import Report
from cbedge.services.addresses import open_socket
from cbedge.services.http_form import DraftForm, check_nothing_ignored, form_schema, open_form, read_form
from cbedge.services.http_guard import LOOPBACK, RequestGuard, patient_protocol, token_check
from cbedge.services.http_queue import Drafter, GivenUp, Metrics, Overloaded, ServeSettings
from cbedge.services.json_log import log_to_stderr

_STATUS = {RadiographError: 422, ContextError: 422, DraftError: 422, DeviceError: 503}  # other errors: 500
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' blob: data:; "
    "connect-src 'self'"
)
_log = logging.getLogger("cbedge.serve")


def check_exposure(host: str, token: str | None) -> None:
    """Check that a service that other machines can reach requires a token.

    Raises:
        OptionError: it has no token, or the token is invalid.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local and token is None:
        raise OptionError(f"{host} can be reached from other machines: give --token, or --host 127.0.0.1")
    if token is not None and not token.strip():
        raise OptionError("the token is blank: give a secret of at least 16 characters, or no token")
    if token is not None and (token != token.strip() or not token.isprintable()):
        raise OptionError("the token starts or ends with a space, or has a control character: give another one")
    if token is not None and len(token) < 16:
        raise OptionError("the token has fewer than 16 characters: give a longer one")


def create_app(generator: ReportGenerator, settings: ServeSettings | None = None) -> FastAPI:
    """The service as an ASGI application."""
    settings = settings or ServeSettings()
    metrics = Metrics()
    drafter = Drafter(generator, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        drafter.draining = True

    app = FastAPI(
        title="cbedge",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        description="Drafts chest radiograph reports. Research software, not a medical device.",
    )
    app.state.drafter = drafter
    app.add_middleware(
        RequestGuard,
        max_bytes=settings.max_bytes,
        idle_s=settings.idle_s,
        body_s=settings.deadline_s,
        max_together=settings.max_together,
        hosts=settings.hosts,
    )
    app.add_exception_handler(CbedgeError, _invalid_input)
    app.add_exception_handler(Overloaded, _queue_full)
    app.add_exception_handler(GivenUp, _deadline_passed)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(Exception, _unexpected_error)
    allowed = [Depends(token_check(settings.token)), Depends(check_nothing_ignored)]
    app.include_router(_draft_routes(generator, drafter, metrics, allowed))
    app.include_router(_info_routes(generator, drafter, metrics, settings, allowed))
    return app


async def _invalid_input(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
    return JSONResponse({"detail": str(error)}, status, {"Retry-After": "30"} if status == 503 else None)


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    where = ", ".join(str(found["loc"][-1]) for found in error.errors()[:3])
    return JSONResponse({"detail": f"the request is invalid: check {where}"}, 422)


async def _queue_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, Overloaded)
    text = f"too many drafts are waiting: retry in {error.retry_after} s"
    ticket = {"Queue-Ticket": error.ticket} if error.ticket else {}
    return JSONResponse({"detail": text}, 429, {"Retry-After": str(error.retry_after)} | ticket)


async def _deadline_passed(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": f"no draft: {error}; retry later"}, 503, {"Retry-After": "5"})


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # the client is gone


async def _unexpected_error(request: Request, error: Exception) -> Response:
    kind = type(error).__name__
    _log.error({"event": "error", "kind": kind})  # the text of an error may contain patient data
    return JSONResponse({"detail": f"an unexpected error ({kind}): please report it"}, 500)


async def _is_connected(request: Request) -> bool:
    return not await request.is_disconnected()


_OUTCOMES = (
    (Overloaded, "turned away"),
    (GivenUp, "given up"),
    (asyncio.CancelledError, "given up"),
    (CbedgeError, "refused"),
)


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/json": {"schema": json.loads(SCHEMA.read_text(encoding="utf-8"))},
            "text/event-stream": {},
        },
        "description": "The draft; with `stream`, events `piece` with text, and finally `report`.",
    },
    400: {"description": "The request or its multipart form is malformed."},
    401: {"description": "The token is missing or wrong."},
    413: {"description": "The request is too large."},
    403: {"description": "The request comes from a page of another website."},
    408: {"description": "The request was too slow."},
    421: {"description": "The Host header is not allowed."},
    422: {"description": "The radiograph, its context or the form is invalid, or the draft failed its last check."},
    429: {
        "description": "The queue is full: retry after Retry-After, with the response's Queue-Ticket as a "
        "header to get priority."
    },
    500: {"description": "The service is not installed correctly, or an unexpected error."},
    503: {
        "description": "The deadline passed, the service is shutting down, or it has no memory or space for the "
        "request: retry after Retry-After."
    },
}


def _draft_routes(generator: ReportGenerator, drafter: Drafter, metrics: Metrics, allowed: list[Any]) -> APIRouter:
    """Routes that draft reports."""
    router = APIRouter(dependencies=allowed)

    @router.post(
        "/v1/reports",
        summary="Draft the report of one study",
        responses=_RESPONSES,
        openapi_extra={"requestBody": form_schema()},
    )
    async def reports(
        request: Request,
        queue_ticket: Annotated[str | None, Header(description="Queue-Ticket of an earlier response 429.")] = None,
    ) -> Response:
        if drafter.draining:
            raise HTTPException(503, "the service is shutting down", {"Retry-After": "10"})
        async with open_form(request) as sent:
            return await answer(request, await read_form(sent), queue_ticket)

    async def answer(request: Request, form: DraftForm, queue_ticket: str | None) -> Response:
        arrived, number = time.monotonic(), uuid.uuid4().hex[:12]
        held: dict[str, Any] = {}

        @memory_errors()
        def make() -> ReportStream:
            # Files are read only when it is this request's turn, so waiting requests use no memory.
            held["content"] = form.image.file.read()
            held["radiograph"] = load_radiograph(held["content"])
            check_source(form.format, held["content"])
            if form.lateral is not None:
                form.options["lateral"] = form.lateral.file.read()
            return generator.stream(held["radiograph"], **form.options)

        async def run(send: Callable[[str], Awaitable[None]] | None = None) -> ReportStream:
            outcome, report = "written", None
            try:
                done = await drafter.draft(make, partial(_is_connected, request), send, queue_ticket)
                report = done.report
                return done
            except BaseException as error:
                outcome = next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "failed")
                raise
            finally:
                _note(metrics, number, outcome, time.monotonic() - arrived, report)

        if not form.stream:
            report = (await run()).report
            document = await asyncio.to_thread(render, report, form.format, held["content"])
            return Response(document, media_type=FORMATS[form.format].media_type, headers={"X-Request-Id": number})
        events = _events(run, held, form.heatmap)
        first = await anext(events)  # errors of the input set the status, before the stream starts
        return StreamingResponse(
            _chain(first, events),
            media_type="text/event-stream",
            headers={"X-Request-Id": number, "Cache-Control": "no-store"},
        )

    return router


def _info_routes(
    generator: ReportGenerator, drafter: Drafter, metrics: Metrics, settings: ServeSettings, allowed: list[Any]
) -> APIRouter:
    """Routes with information on the service and the model, and the web page."""
    router = APIRouter()

    @router.get("/healthz", response_class=PlainTextResponse, summary="Whether the process is alive")
    async def healthz() -> str:
        return "ok"

    @router.get("/readyz", response_class=PlainTextResponse, summary="Whether the service accepts requests")
    async def readyz() -> Response:
        full = drafter.waiting > settings.queue
        state = "shutting down" if drafter.draining else "the queue is full" if full else "ready"
        return PlainTextResponse(state, 200 if state == "ready" else 503)

    @router.get("/metrics", response_class=PlainTextResponse, dependencies=allowed, summary="Metrics for Prometheus")
    async def metrics_text() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @router.get("/v1/model", dependencies=allowed, summary="The model, with its card")
    async def model() -> dict[str, Any]:
        manifest = generator.bundle.manifest
        card = (generator.bundle.folder / CARD).read_text(encoding="utf-8")
        return {
            "name": manifest.name,
            "version": manifest.version,
            "variant": generator.variant,
            "device": generator.backend.device,
            "license": manifest.license,
            "reads_lateral": manifest.reads_lateral,
            "takes_template": manifest.image_findings is not None,
            "operating_point": manifest.image_findings.operating_point if manifest.image_findings else None,
            "card": card,
        }

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        text = (files("cbedge.services") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"})

    return router


async def _events(
    run: Callable[..., Awaitable[ReportStream]], held: dict[str, Any], heatmap: bool
) -> AsyncIterator[bytes]:
    """Server-sent events of one draft."""
    ready: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send(piece: str) -> None:
        ready.put_nowait(_event("piece", {"text": piece}))

    async def work() -> None:
        try:
            done = await run(send)
            values = json.loads(done.report.to_json())
            if heatmap:
                picture = await asyncio.to_thread(lambda: png(overlay(held["radiograph"], done.attention)))
                values["heatmap_png"] = base64.b64encode(picture).decode()
            ready.put_nowait(_event("report", values))
        finally:
            ready.put_nowait(None)

    task = asyncio.ensure_future(work())
    begun = False
    try:
        while (event := await ready.get()) is not None:
            begun = True
            yield event
        await task
    except (CbedgeError, GivenUp, Overloaded) as error:
        if not begun:
            raise
        yield _event("error", {"detail": str(error)})
    finally:
        task.cancel()


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def _event(name: str, values: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(values, ensure_ascii=False)}\n\n".encode()


def _note(metrics: Metrics, number: str, outcome: str, seconds: float, report: Report | None) -> None:
    metrics.drafts.labels(outcome).inc()
    entry: dict[str, Any] = {"event": "draft", "request": number, "outcome": outcome, "seconds": round(seconds, 3)}
    if report is not None:
        metrics.seconds.observe(seconds)
        metrics.tokens.inc(report.new_tokens)
        entry |= {"tokens": report.new_tokens, "ms": {k: round(v, 1) for k, v in asdict(report.timings).items()}}
    _log.info(entry)


def run_server(generator: ReportGenerator, host: str, port: int, settings: ServeSettings) -> None:
    """Serve until the process is asked to end; the current draft is finished first.

    Raises:
        OptionError: see :func:`check_exposure` and :func:`~cbedge.services.addresses.open_socket`.
    """
    import uvicorn

    check_exposure(host, settings.token)
    log_to_stderr(_log, "python_multipart", "asyncio")
    if not settings.hosts and settings.token is None:  # with a token, other websites have no access anyway
        settings = replace(settings, hosts=(*LOOPBACK, host))
    app = create_app(generator, settings)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="critical",
            access_log=False,
            timeout_keep_alive=20,
            http=patient_protocol(settings.idle_s, settings.deadline_s),
            ws="none",
            timeout_graceful_shutdown=int(settings.deadline_s),
            h11_max_incomplete_event_size=64 * 1024,
        )
    )
    with open_socket(host, port) as bound:
        name = f"[{host}]" if ":" in host else host  # IPv6
        _log.info(f"serving on http://{name}:{port}")
        server.run(sockets=[bound])
