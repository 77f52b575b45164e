"""``cbedge serve`` against rude and clumsy clients: every answer is readable, none is 5xx unless meant to be."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import EXAMPLES, free_port, served, wait_for
from fastapi.testclient import TestClient

from cbedge import ReportGenerator
from cbedge.services import http_guard
from cbedge.services.http import create_app
from cbedge.services.http_guard import RequestGuard, patient_protocol
from cbedge.services.http_queue import ServeSettings

FILM = (EXAMPLES / "chest_pa.png").read_bytes()


def form(*fields: tuple[bytes, bytes]) -> bytes:
    """A multipart body with a film."""
    parts = [b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % field for field in fields]
    film = b'--b\r\nContent-Disposition: form-data; name="image"; filename="\xff\xfe.png"\r\n\r\n' + FILM + b"\r\n"
    return b"".join(parts) + film + b"--b--\r\n"


def post(body: bytes = b"", length: bytes | None = None, more: bytes = b"", path: bytes = b"/v1/reports") -> bytes:
    """A request with a form, by default with its length."""
    length = b"Content-Length: %d\r\n" % len(body) if length is None else length
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n" % path
    return head + length + more + b"\r\n" + body


def get(path: bytes = b"/healthz", more: bytes = b"", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%s %s HTTP/%s\r\nHost: localhost\r\nConnection: close\r\n%s\r\n" % (method, path, version, more)


def chunked(body: bytes, size: int = 5000) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def ask(port: int, request: bytes, seconds: float = 20, first: bool = False) -> bytes:
    """What is answered until the connection ends, or until the first answer is complete."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(seconds)
        with suppress(ConnectionError):
            connection.sendall(request)
        with suppress(ConnectionError):
            while not (first and is_complete(answer)) and (part := connection.recv(65536)):
                answer += part
    return answer


def is_complete(answer: bytes) -> bool:
    head, end, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.I)
    return bool(end) and (len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n"))


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    with served(tiny_bundle, subprocess.PIPE, "--idle", "2", "--deadline", "20") as (address, process):
        yield int(address.rpartition(":")[2]), process
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert all(line.startswith("{") for line in log.splitlines()), log
        assert "Traceback" not in log and '"event": "error"' not in log


TE = b"Transfer-Encoding: chunked\r\n"
BODY = form()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get(version=b"1.0"), 200),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz\r\n\r\n", 400),
        (post(chunked(BODY), TE, b"Connection: close\r\n"), 200),
        (post(chunked(BODY, 7), TE), 200),
        (post(b"zz\r\nabc\r\n0\r\n\r\n", TE), 400),
        (post(b"-5\r\nabc\r\n", TE), 400),
        (post(b"f" * 17 + b"\r\nabc", TE), 400),
        (post(b"5\r\nabcdeXX0\r\n\r\n", TE), 400),
        (post(b"5\r\nab", TE), 400),
        (post(b"5;" + b"x" * 100_000 + b"\r\nabcde\r\n0\r\n\r\n", TE), 400),
        (post(b"0\r\n" + b"A: b\r\n" * 200_000, TE), 400),
        (post(b"1\r\na\r\n" * 20_000, TE), 400),
        (post(chunked(BODY), TE + b"Content-Length: 5\r\n"), 400),
        (post(BODY, b"Transfer-Encoding: gzip\r\n"), 400),
        (post(BODY, more=b"Content-Length: 3\r\n"), 400),
        (post(BODY, more=b"Content-Length: %d\r\n" % len(BODY)), 200),
        *((post(b"12345", b"Content-Length: %s\r\n" % length), 400) for length in (b"+5", b"-5", b"\xb2", b"9" * 50)),
        (post(length=b"Content-Length: 900000000\r\n", more=b"Expect: 100-continue\r\n"), 413),
        (post(BODY, more=b"Expect: 100-continue\r\n"), 100),
        (post(BODY, more=b"Expect: tea\r\n"), 200),
        (get(b"http://localhost/healthz"), 200),
        (get(b"http://localhost"), 200),
        (get(b"http://evil.example/"), 421),
        (post(BODY, path=b"http://LOCALHOST:80/v1/reports"), 200),
        (get(b"http://[evil"), 421),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (get(more=b"Host: evil.example\r\n"), 400),
        (b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        *(
            (b"GET /healthz HTTP/1.1\r\nHost: %s\r\n\r\n" % host, status)
            for status, hosts in (
                (200, (b"LOCALHOST", b"localhost:8642", b"localhost:", b"[::1]:8642")),
                (
                    421,
                    (b"", b":80", b"localhost:80, evil.example", b"localhost:abc", b"localhost:80:80", b"::1", b"[::1"),
                ),
                (421, (b"a@localhost", b"localhost/", b"localhost, localhost", b"[::1]x", b"localhost:999999")),
            )
            for host in hosts
        ),
        (get(b"http://evil@localhost/healthz"), 421),
        (
            post(BODY, more=b"Origin: http://localhost\r\n")
            .replace(b"Host: localhost\r\n", b"")
            .replace(b"1.1", b"1.0"),
            403,
        ),
        (post(BODY).replace(b"Host: localhost\r\n", b"").replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
        (get(more=b"X: " + b"y" * 1_000_000), 400),
        (get(more=b"".join(b"X-%d: y\r\n" % number for number in range(100_000))), 400),
        (get(b"/" + b"y" * 1_000_000), 400),
        (get(b"/" + b"y" * 60_000), 404),
        (get(b"/%ff%fe?%zz=%00"), 404),
        (get(b"/%00/../..//etc/passwd"), 404),
        (get(b"*", method=b"OPTIONS"), 404),
        (get(more=b"X Y: z\r\n"), 400),
        (get(b"localhost:80", method=b"CONNECT"), 404),
        (get(more=b"Upgrade: h2c\r\n"), 200),
        (get(b"/v1/reports", b"Upgrade: websocket\r\n"), 405),
        (b"\x16\x03\x01\0\xa5\x01\0\0\xa1\x03\x03" * 9, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
        (b"\r\n" * 100 + get(), 400),
        (bytes(300), 400),
        (post(BODY, more=b"Origin: http://[evil\r\n"), 403),
        (post(BODY, more=b"Origin: null\r\n"), 403),
    ],
)
def test_an_odd_request_has_a_readable_answer(server: tuple[int, subprocess.Popen], request_: bytes, status: int):
    answer = ask(server[0], request_, first=True)
    assert statuses(answer)[0] == status and not [code for code in statuses(answer) if code >= 500]


PATHS = ("/", "/healthz", "/readyz", "/metrics", "/v1/model", "/openapi.json", "/v1/reports", "/nothing")


@pytest.mark.parametrize("path", PATHS)
def test_every_method_on_every_path(server: tuple[int, subprocess.Popen], path: str):
    found = {
        method: ask(server[0], get(path.encode(), method=method.encode()))
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "FOO")
    }
    expected = {"/nothing": 404, "/v1/reports": 405}.get(path, 200)
    assert statuses(found["GET"]) == statuses(found["HEAD"]) == [expected]
    assert found["HEAD"].endswith(b"\r\n\r\n") and found["HEAD"].count(b"\r\n\r\n") == 1
    body = found["GET"].split(b"\r\n\r\n", 1)[1]
    assert b"content-length: %d\r\n" % len(body) in found["HEAD"] + b"\r\n" and body
    others = {statuses(answer)[0] for method, answer in found.items() if method not in ("GET", "HEAD")}
    assert others == {404 if path == "/nothing" else 405}


def test_requests_behind_each_other_are_answered_in_order(server: tuple[int, subprocess.Popen]):
    answer = ask(server[0], post(BODY) * 2 + get(b"/nothing").replace(b"Connection: close\r\n", b"") + get())
    assert statuses(answer) == [200, 200, 404, 200] and answer.endswith(b"ok")
    plain = get().replace(b"Connection: close\r\n", b"")
    assert statuses(ask(server[0], plain * 1000 + get())) == [200] * 1001


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ([(b"indication", "M\u00fcller, \u54b3".encode())], 200, "M\u00fcller, \u54b3"),
        ([(b"indication", b"\xef\xbb\xbfcough")], 200, "cough"),
        ([(b"indication", b"M\xfcller")], 422, "form field indication is not valid UTF-8"),
        ([(b"template", "Die Lunge ist frei.".encode("utf-16"))], 422, "form field template is not valid UTF-8"),
        ([(b"\xff\xfe", b"x")], 422, "unknown form field"),
        ([("s\u00fc\u00df".encode(), b"x")], 422, "s\u00fc\u00df"),
        ([(b"_charset_", b"latin-1")], 422, "unknown form field"),
        ([(b"x" * 50_000, b"y")], 400, "form is malformed"),
        ([(b"f%d" % number, b"y") for number in range(5000)], 400, "Maximum number of fields is 16"),
        ([(b"indication", b"y" * 1_500_000)], 400, "maximum size"),
    ],
)
def test_text_of_a_form_is_utf_8_or_refused_by_name(
    server: tuple[int, subprocess.Popen], fields: list, status: int, told: str
):
    content = form(*fields)
    for kind in ("multipart/form-data; boundary=b", "multipart/form-data; charset=UTF-8; boundary=b"):
        answer = httpx.post(
            f"http://127.0.0.1:{server[0]}/v1/reports", content=content, headers={"content-type": kind}, timeout=60
        )
        assert answer.status_code == status
        if status != 200:
            assert told in answer.json()["detail"]


def test_a_form_in_another_charset_is_refused_by_name(server: tuple[int, subprocess.Popen]):
    request = post(BODY).replace(b"form-data;", b"form-data; charset=utf-16;")
    answer = ask(server[0], request, first=True)
    assert statuses(answer) == [422] and b"charset 'utf-16'" in answer


@pytest.mark.parametrize("megabytes", [70, 300])
@pytest.mark.parametrize("how", ["length", "chunks"])
def test_who_sends_too_much_can_read_so(server: tuple[int, subprocess.Popen], how: str, megabytes: int):
    def parts() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        for _ in range(megabytes):
            yield bytes(2**20)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    if how == "length":
        headers["content-length"] = str(67 + megabytes * 2**20)
    answer = httpx.post(f"http://127.0.0.1:{server[0]}/v1/reports", content=parts(), headers=headers, timeout=60)
    assert answer.status_code == 413 and "larger than 67,108,864 bytes" in answer.json()["detail"]


def test_large_uploads_at_once_take_little_memory(server: tuple[int, subprocess.Popen]):
    port, process = server
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("this system tells no process's memory")
    before = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    codes = []

    def send() -> None:
        files = {"image": FILM + bytes(60 * 2**20)}  # what stands behind the picture is not looked at
        codes.append(httpx.post(f"http://127.0.0.1:{port}/v1/reports", files=files, timeout=120).status_code)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 8
    assert int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before < 350_000  # kB; 8 uploads are 480 MB


def test_slow_uploads_are_told_so_and_keep_nobody_waiting(server: tuple[int, subprocess.Popen]):
    port, _ = server
    begun = post(
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n', b"Content-Length: 999\r\n"
    )
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    for connection in slow:
        connection.sendall(begun)
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/reports", files={"image": FILM}, timeout=60)
    assert answer.status_code == 200
    for connection in slow:
        connection.settimeout(30)
        told = b""
        while part := connection.recv(65536):
            told += part
        assert statuses(told) == [408] and b"was too slow" in told
        connection.close()


def test_a_full_disk_for_temporary_files_is_told(
    tiny_bundle: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(mounted("size=3m")))
    with served(tiny_bundle, subprocess.PIPE) as (address, process):
        answer = httpx.post(f"{address}/v1/reports", files={"image": FILM + bytes(8 * 2**20)}, timeout=60)
        assert answer.status_code == 503 and "No space left" in answer.json()["detail"]
        assert int(answer.headers["Retry-After"]) > 0
        assert httpx.post(f"{address}/v1/reports", files={"image": FILM}, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert "Traceback" not in log


def test_an_unforeseen_error_is_told_without_its_text(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")

    def broken(*args: Any, **options: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(generator, "stream", broken)
    with TestClient(create_app(generator, ServeSettings()), raise_server_exceptions=False) as client:
        answer = client.post("/v1/reports", files={"image": FILM})
        assert client.get("/healthz").status_code == 200
    assert answer.status_code == 500 and "an unexpected error (KeyError)" in answer.json()["detail"]
    told = [record.msg for record in caplog.records if record.name == "cbedge.serve"]
    assert {"event": "error", "kind": "KeyError"} in told and "secret" not in json.dumps(told) + answer.text


def test_all_uploads_together_have_a_limit(monkeypatch: pytest.MonkeyPatch):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def upload(guard: RequestGuard, parts: int, ready: asyncio.Event) -> int:
        left = parts

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            if left == 0:
                await ready.wait()
            return {"type": "http.request", "body": bytes(100), "more_body": left > 0}

        try:
            await guard({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, None)  # type: ignore[arg-type]
        except Exception as error:
            return error.status_code  # type: ignore[attr-defined]
        return 200

    async def run() -> list[int]:
        guard = RequestGuard(app, 1000, 5, 5, max_together=1000)
        ready = asyncio.Event()
        first = asyncio.create_task(upload(guard, 8, ready))
        await asyncio.sleep(0)
        codes = [await upload(guard, 5, ready), await upload(guard, 2, _set())]
        ready.set()
        codes.append(await first)
        return [*codes, await upload(guard, 10, _set())]  # what was held is held no longer

    def _set() -> asyncio.Event:
        event = asyncio.Event()
        event.set()
        return event

    assert asyncio.run(run()) == [503, 200, 200, 200]


@contextmanager
def protocol(header_s: float, body_s: float) -> Iterator[int]:
    """A server in this process that answers a request before its body has come, with 1 MB."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000")]})
        await send({"type": "http.response.body", "body": bytes(1_000_000)})

    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=port,
            log_level="critical",
            lifespan="off",
            http=patient_protocol(header_s, body_s),
            ws="none",
            timeout_keep_alive=60,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


def drip(connection: socket.socket, seconds: float) -> float:
    """Send a byte now and then, and read what comes; after how many seconds the connection ended."""
    start = time.monotonic()
    connection.settimeout(0.1)
    while time.monotonic() - start < seconds:
        try:
            connection.sendall(b"X")
            while connection.recv(2**20):
                pass
            return time.monotonic() - start
        except TimeoutError:
            continue
        except ConnectionError:
            return time.monotonic() - start
    raise AssertionError("the connection is still open")


def test_a_connection_that_does_not_get_on_ends(monkeypatch: pytest.MonkeyPatch):
    with protocol(header_s=0.5, body_s=2) as port:
        for begun, least in (
            (b"GET / HT", 0.3),
            (get().replace(b"Connection: close\r\n", b""), 0.3),
            (post(length=b"Content-Length: 99999\r\n"), 1.5),
        ):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(begun)
                assert least < drip(connection, 10) < 5
        monkeypatch.setattr(http_guard, "UNREAD_S", 0.5)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.settimeout(10)
            with pytest.raises(ConnectionError):  # asks on and on and reads nothing
                for _ in range(100_000):
                    connection.sendall(get().replace(b"Connection: close\r\n", b"") * 100)


def test_connections_have_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_guard, "MAX_CONNECTIONS", 20)
    with protocol(header_s=2, body_s=2) as port:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]
        ended = 0
        for connection in held[20:]:
            connection.settimeout(1)
            with suppress(ConnectionError):
                assert connection.recv(1) == b""
            ended += 1
        assert ended == 10
        for connection in held:
            connection.close()
        wait_for(lambda: statuses(ask(port, get())) == [200])
