import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import EXAMPLES, ROOT, call_cli, draw_chest, served
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image

from cbedge import OptionError, ReportGenerator, errors
from cbedge.services.http import _invalid_input, check_exposure, create_app
from cbedge.services.http_queue import ServeSettings

TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path) -> ReportGenerator:
    generator = ReportGenerator.from_pretrained(tiny_bundle, device="cpu")
    generator.bundle.manifest.decoding["max_new_tokens"] = 24
    return generator


@pytest.fixture(scope="module")
def client(generator: ReportGenerator) -> Iterator[TestClient]:
    with TestClient(create_app(generator, ServeSettings(max_bytes=2_000_000))) as client:
        yield client


def post(client: TestClient, image: bytes, **data: str) -> httpx.Response:
    return client.post("/v1/reports", files={"image": ("x", image)}, data=data)


def test_a_radiograph_comes_back_as_the_draft_that_the_library_writes(
    client: TestClient, generator: ReportGenerator, chest_png: Path
):
    answer = post(client, chest_png.read_bytes(), indication="cough")
    assert answer.status_code == 200, answer.text
    assert answer.json()["text"] == generator.generate(chest_png, indication="cough").text
    corrected = post(client, chest_png.read_bytes(), indication="fever").json()
    assert corrected["image_reused"] and corrected["reused_tokens"] > 0
    both = {"image": ("x", chest_png.read_bytes()), "lateral": ("y", (EXAMPLES / "chest_pa.png").read_bytes())}
    told = client.post("/v1/reports", files=both, data={"indication": "cough"}).json()
    wanted = generator.generate(chest_png, indication="cough", lateral=EXAMPLES / "chest_pa.png")
    assert told["text"] == wanted.text and told["lateral_sha256"] == wanted.lateral_sha256
    own = "The spleen is tiny. IMPRESSION: Normal."
    kept = post(client, chest_png.read_bytes(), template=own).json()
    assert (kept["template"], kept["template_source"]) == (f"FINDINGS: {own}", "given")
    assert post(client, chest_png.read_bytes(), template="IMPRESSION: Normal.").status_code == 422


@pytest.mark.parametrize(("form", "kind"), [("fhir", "application/fhir+json"), ("sr", "application/dicom")])
def test_a_dicom_file_comes_back_in_the_hospitals_formats(client: TestClient, form: str, kind: str):
    answer = post(client, (EXAMPLES / "chest_pa.dcm").read_bytes(), format=form)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    assert b"DICM" in answer.content[:140] if form == "sr" else answer.json()["status"] == "preliminary"


def test_a_structured_report_of_a_png_is_refused_and_not_drafted(client: TestClient, chest_png: Path):
    written = 'cbedge_drafts_total{outcome="written"}'
    before = client.get("/metrics").text.partition(written)[2].partition("\n")[0]
    answer = post(client, chest_png.read_bytes(), format="sr")
    assert answer.status_code == 422 and "needs a study" in answer.json()["detail"]
    assert client.get("/metrics").text.partition(written)[2].partition("\n")[0] == before


def events(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n", 1)
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_events_are_pieces_and_then_the_report_with_its_map(client: TestClient, chest_png: Path):
    answer = post(client, chest_png.read_bytes(), stream="true", heatmap="true")
    told = events(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert {name for name, _ in told[:-1]} == {"piece"} and told[-1][0] == "report"
    report = told[-1][1]
    assert "".join(data["text"] for _, data in told[:-1]).strip() == report["text"]
    assert report["heatmap_png"].startswith("iVBOR")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_what_cannot_be_used_is_told_with_the_status(client: TestClient, chest_png: Path, stream: str):
    bad = post(client, b"hello", stream=stream)
    assert bad.status_code == 422 and "not a supported image" in bad.json()["detail"]
    view = post(client, chest_png.read_bytes(), view="sideways", stream=stream)
    assert view.status_code == 422 and "unknown view" in view.json()["detail"]
    assert client.post("/v1/reports", data={}).status_code == 422


def test_a_request_that_is_too_large_is_not_read(client: TestClient):
    assert post(client, b"\0" * 2_100_000).status_code == 413

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        for _ in range(40):
            yield b"\0" * 100_000

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/reports", content=endless(), headers=headers).status_code == 413


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.text(max_size=40), st.text(max_size=10), st.text(max_size=10), st.booleans())
def test_no_input_breaks_it(client: TestClient, image: bytes, indication: str, view: str, form: str, png: bool):
    whole = (EXAMPLES / "chest_pa.png").read_bytes()
    content = whole[: len(image) * 50] + image if png else image
    answer = post(client, content, indication=indication, view=view, format=form)
    assert answer.status_code in (400, 413, 422) or (answer.status_code == 200 and answer.json()["text"] is not None)


@pytest.mark.parametrize(
    ("files", "data", "told"),
    [
        ([], {"indicaton": "cough"}, "unknown form field 'indicaton'; the fields are: image"),
        ([("image", ("y", b"more"))], {}, "image occurs twice"),
        ([], {"stream": "perhaps"}, "give true or false"),
        ([], {"format": "pdf"}, "unknown format 'pdf'"),
        ([], {"lateral": "as text"}, "lateral was sent as text"),
        ([("template", ("t", b"\xff\xfe bad"))], {}, "not valid UTF-8"),
        ([], {"max_new_tokens": "5"}, "unknown"),
        ([("indication", ("t", b"x" * 16001))], {}, "more than 16,000 bytes"),
        ([("template", ("t", "ä".encode() * 4000))], {}, "a single word"),  # 4,000 characters
        ([], {"stream": "true", "format": "sr"}, "format sr cannot be combined"),
        ([], {"heatmap": "true"}, "give stream=true"),
        ([("indication", (None, b"c", "text/plain; charset=UTF-16"))], {}, "'indication' has the charset 'UTF-16'"),
        ([("view", ("v", b"PA", "text/plain; charset=latin-1"))], {}, "'view' has the charset 'latin-1'"),
        ([("indication", (None, b"Yw==", "text/plain", {"Content-Transfer-Encoding": "Base64"}))], {}, "'base64'"),
        ([("lateral", ("l", b"x", "image/png", {"Content-Transfer-Encoding": "x"}))], {}, "Content-Transfer-Encoding"),
    ],
)
def test_a_form_that_is_not_understood_is_refused_by_name(
    client: TestClient, chest_png: Path, files: list, data: dict, told: str
):
    sent = [("image", ("x", chest_png.read_bytes())), *files]
    answer = client.post("/v1/reports", files=sent, data=data)
    assert answer.status_code == 422 and told in answer.json()["detail"]


def test_encodings_that_change_nothing_are_taken(client: TestClient, chest_png: Path):
    plain = {"Content-Transfer-Encoding": "8bit"}
    files = [
        ("image", ("x", chest_png.read_bytes(), "image/png; charset=utf-16", {**plain})),
        ("indication", (None, b"cough", 'text/plain; charset="UTF-8"', {**plain})),
    ]
    answer = client.post("/v1/reports", files=files, data={"stream": "true", "format": "json"})
    assert answer.status_code == 200, answer.text
    assert events(answer.text)[-1][1]["indication_source"] == "given"


@pytest.mark.parametrize("path", ["/v1/reports", "/v1/model", "/metrics"])
def test_what_no_route_reads_is_refused_by_name(client: TestClient, chest_png: Path, path: str):
    def ask(**options: Any) -> httpx.Response:
        image = {"files": {"image": chest_png.read_bytes()}} if path == "/v1/reports" else {}
        return client.request("POST" if image else "GET", path, **image, **options)

    for query, told in (("format=sr&b", "'format', 'b'"), ("view=PA&view=LL", "'view'"), ("a", "'a'")):
        answer = ask(params=query)
        assert answer.status_code == 422 and told in answer.json()["detail"], answer.text
    answer = ask(headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 422 and "Content-Encoding 'gzip'" in answer.json()["detail"]
    assert ask(headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"{}", "application/json", 422),
        (b"", "multipart/form-data; boundary=b", 400),
        (b"--b\r\nnothing", "multipart/form-data; boundary=b", 400),
        (b"x", "multipart/form-data", 400),
        (b"image=text", "application/x-www-form-urlencoded", 422),
    ],
)
def test_a_body_that_is_no_form_is_one_sentence(client: TestClient, content: bytes, kind: str, code: int):
    answer = client.post("/v1/reports", content=content, headers={"content-type": kind})
    assert answer.status_code == code and isinstance(answer.json()["detail"], str)


def test_a_form_is_taken_whole_or_refused_as_incomplete(client: TestClient, chest_png: Path):
    image = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + chest_png.read_bytes() + b"\r\n"
    )
    text = b'--b\r\nContent-Disposition: form-data; name="indication"\r\n\r\ncough\r\n'
    whole = image + text + b"--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for size in (1, 7, len(whole)):  # the closing boundary may come in any number of pieces

        def ask(body: bytes, size: int = size) -> httpx.Response:
            start = max(0, len(image) - 5)  # only the end in small pieces
            pieces = [body[:start], *(body[place : place + size] for place in range(start, len(body), size))]
            return client.post("/v1/reports", content=iter(pieces), headers=headers)

        for body in (whole, whole[:-2], whole + b"\r\n \t\n"):
            answer = ask(body)
            assert answer.status_code == 200 and answer.json()["indication_source"] == "given", answer.text
        for body in (
            whole[:-3],
            whole[:-7],
            image + text,
            whole + b"junk",
            whole[:-2] + text + b"--b--\r\n",
            image + b"--b--\r\n" + text + b"--b--\r\n",
        ):
            answer = ask(body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["detail"].startswith(
                "the form is incomplete: it does not end with its closing boundary"
            )


@pytest.mark.parametrize(
    "name", ["filename*=UTF-8''a%20b.png", "FileName*=utf-8'en'%c3%a4", "filename=a; filename*=UTF-8''a"]
)
def test_a_file_may_have_an_extended_name(client: TestClient, chest_png: Path, name: str):
    head = f'--b\r\nContent-Disposition: form-data; name="image"; {name}\r\n\r\n'.encode()
    content = head + chest_png.read_bytes() + b"\r\n--b--\r\n"
    answer = client.post("/v1/reports", content=content, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200 and answer.json()["text"] == post(client, chest_png.read_bytes()).json()["text"]


def test_text_fields_may_be_files(client: TestClient, chest_png: Path):
    own = "\ufeffThe spleen is tiny. IMPRESSION: Normal."
    files = {
        "image": ("x", chest_png.read_bytes()),
        "template": ("t.txt", own.encode()),
        "indication": ("i.txt", b"cough"),
    }
    answer = client.post("/v1/reports", files=files)
    assert answer.status_code == 200, answer.text
    wanted = post(client, chest_png.read_bytes(), template=own.lstrip("\ufeff"), indication="cough").json()
    assert answer.json()["text"] == wanted["text"] and answer.json()["indication_source"] == "given"


def test_another_host_or_a_page_of_another_site_is_refused(generator: ReportGenerator, chest_png: Path):
    known = ServeSettings(hosts=("localhost", "127.0.0.1", "::1"))
    for host, code in (("localhost:8642", 200), ("127.0.0.1", 200), ("[::1]:8642", 200), ("evil.example", 421)):
        with TestClient(create_app(generator, known), base_url="http://localhost") as client:
            answer = client.get("/healthz", headers={"Host": host})
            assert answer.status_code == code, host
    with TestClient(create_app(generator, known), base_url="http://localhost:8642") as client:
        for origin, code in (
            ("http://localhost:8642", 200),
            ("http://LOCALHOST:8642", 200),
            ("http://localhost:9999", 403),
            ("http://localhost", 403),
            ("http://127.0.0.1:8642", 403),
            ("http://evil.example", 403),
            ("null", 403),
        ):
            files = {"image": ("x", chest_png.read_bytes())}
            assert client.post("/v1/reports", files=files, headers={"Origin": origin}).status_code == code, origin
    with TestClient(create_app(generator, ServeSettings()), base_url="https://cbedge.example") as client:
        for origin, code in (("https://cbedge.example", 422), ("https://cbedge.example:8443", 403)):
            assert client.post("/v1/reports", headers={"Origin": origin}).status_code == code, origin


def test_a_token_of_any_letters_works(generator: ReportGenerator):
    token = "schl\u00fcssel-\u03b1\u03b2\u03b3-\u5bc6\u94a5-long"
    with TestClient(create_app(generator, ServeSettings(token=token))) as client:
        right, wrong = (
            client.get("/metrics", headers={"Authorization": f"Bearer {t}".encode()}).status_code
            for t in (token, token + "x")
        )
    assert (right, wrong) == (200, 401)


def test_images_are_decoded_only_when_it_is_their_turn(generator: ReportGenerator, monkeypatch: pytest.MonkeyPatch):
    from cbedge.services import http as serve

    most, now, lock = 0, 0, threading.Lock()
    real = serve.load_radiograph

    def counted(content: bytes) -> Any:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        try:
            time.sleep(0.02)
            return real(content)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(serve, "load_radiograph", counted)
    image = (EXAMPLES / "chest_pa.png").read_bytes()

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(create_app(generator, ServeSettings(queue=8)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            asked = [client.post("/v1/reports", files={"image": ("x", image)}) for _ in range(6)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [200] * 6 and most == 1


def test_too_little_memory_is_a_reason_to_retry_later(
    generator: ReportGenerator, chest_png: Path, monkeypatch: pytest.MonkeyPatch
):
    def exhausted(content: bytes) -> Any:
        raise MemoryError

    monkeypatch.setattr("cbedge.services.http.load_radiograph", exhausted)
    with TestClient(create_app(generator, ServeSettings())) as client:
        answer = post(client, chest_png.read_bytes())
    assert (
        answer.status_code == 503 and answer.headers["Retry-After"] and "not enough memory" in answer.json()["detail"]
    )


def test_a_token_is_asked_for_where_one_is_set(generator: ReportGenerator, chest_png: Path):
    with TestClient(create_app(generator, ServeSettings(token=TOKEN))) as client:
        assert post(client, chest_png.read_bytes()).status_code == 401
        assert client.get("/metrics").status_code == 401 and client.get("/healthz").status_code == 200
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert post(client, chest_png.read_bytes()).status_code == 200


def test_other_machines_need_a_token():
    check_exposure("127.0.0.1", None)
    check_exposure("0.0.0.0", TOKEN)
    for host, token in (
        ("0.0.0.0", None),
        ("workstation", None),
        ("127.0.0.1", "short"),
        ("127.0.0.1", " " * 20),
        ("0.0.0.0", ""),
        ("127.0.0.1", "a-token-with-a-line\n"),
    ):
        with pytest.raises(OptionError, match="token"):
            check_exposure(host, token)


def test_many_clients_get_the_right_report_each_or_are_told_when_to_come_again(generator: ReportGenerator):
    images = {}
    for seed in range(12):
        path = Path(f"/tmp/{os.getpid()}-{seed}.png")
        Image.fromarray(draw_chest(seed, 96, 96)).save(path)
        images[seed] = path.read_bytes()
        path.unlink()
    alone = {seed: generator.generate(image).text for seed, image in images.items()}

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(generator, ServeSettings(queue=5)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            asked = [client.post("/v1/reports", files={"image": ("x", image)}) for image in images.values()]
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 5
    for seed, answer in zip(images, answers, strict=True):
        if answer.status_code == 200:
            assert answer.json()["text"] == alone[seed]
        else:
            assert int(answer.headers["Retry-After"]) >= 1


def test_who_was_turned_away_gets_in_though_others_ask_without_pause(generator: ReportGenerator, chest_png: Path):
    image = chest_png.read_bytes()

    async def late() -> int:
        """How many of the greedy clients' drafts one that came late had to wait for."""
        transport = httpx.ASGITransport(create_app(generator, ServeSettings(queue=2)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            served, over = 0, asyncio.Event()

            async def ask(ticket: str | None) -> httpx.Response:
                headers = {"Queue-Ticket": ticket} if ticket else {}
                return await client.post("/v1/reports", files={"image": ("x", image)}, headers=headers)

            async def greedy() -> None:
                nonlocal served
                while not over.is_set():
                    if (await ask(None)).status_code == 200:
                        served += 1
                    else:
                        await asyncio.sleep(0.01)  # does not wait as it is told to

            crowd = [asyncio.create_task(greedy()) for _ in range(6)]
            while (answer := await ask(None)).status_code == 200:
                pass
            before, ticket = served, answer.headers["Queue-Ticket"]
            assert int(answer.headers["Retry-After"]) >= 1
            while (answer := await ask(ticket)).status_code == 429:
                ticket = answer.headers["Queue-Ticket"]
                await asyncio.sleep(0.01)
            waited = served - before
            over.set()
            await asyncio.gather(*crowd)
        assert answer.status_code == 200
        return waited

    assert asyncio.run(late()) <= 8


def test_a_deadline_ends_a_draft(generator: ReportGenerator, chest_png: Path):
    with TestClient(create_app(generator, ServeSettings(deadline_s=1e-4))) as client:
        answer = post(client, chest_png.read_bytes())
        assert answer.status_code == 503 and "deadline" in answer.json()["detail"]
        assert client.get("/readyz").status_code == 200


def test_metrics_and_health(client: TestClient, chest_png: Path):
    post(client, chest_png.read_bytes())
    assert client.get("/healthz").text == "ok" and client.get("/readyz").text == "ready"
    told = client.get("/metrics").text
    assert 'cbedge_drafts_total{outcome="written"}' in told and "cbedge_draft_seconds_bucket" in told
    assert client.get("/v1/model").json()["name"] == "tiny"


def test_every_status_is_documented_with_the_errors_that_give_it(client: TestClient):
    rows = (ROOT / "docs" / "integrating.md").read_text(encoding="utf-8").splitlines()
    table = {int(row[2:5]): row for row in rows if re.match(r"\| [45]\d\d \|", row)}
    described = client.get("/openapi.json").json()["paths"]["/v1/reports"]["post"]["responses"]
    assert {*table} == {404, 405, *map(int, described)} - {200}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cbedge" / "services").glob("http*.py"))
    numbers = {*map(int, re.findall(r"\b[45]\d\d\b", code))}
    assert numbers & {*HTTPStatus} <= {*table}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CbedgeError)]
    for kind in kinds[1:]:
        answer = asyncio.run(_invalid_input(None, kind("why")))
        assert f"`{kind.__name__}`" in table[answer.status_code], kind
        assert ("retry-after" in answer.headers) == (answer.status_code == 503)


def test_the_page_needs_nothing_from_outside(client: TestClient):
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text and "src=" not in page.text


def test_the_api_is_described(client: TestClient):
    described = client.get("/openapi.json").json()
    content = described["paths"]["/v1/reports"]["post"]["responses"]["200"]["content"]
    assert "findings" in content["application/json"]["schema"]["properties"]
    form = described["paths"]["/v1/reports"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    limits = {name: field["maxLength"] for name, field in form["properties"].items() if "maxLength" in field}
    assert limits == {"indication": 1000, "comparison": 1000, "template": 4000}
    assert all(name in form["properties"]["view"]["description"] for name in ("frontal", "PA", "AP", "lateral", "LL"))


@pytest.fixture
def server(tiny_bundle: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    with served(tiny_bundle, subprocess.PIPE) as found:
        yield found


def test_a_real_server_drafts_survives_rude_clients_and_ends_gracefully(server: tuple[str, subprocess.Popen]):
    address, process = server
    image = (EXAMPLES / "chest_pa.dcm").read_bytes()
    host, port = address.removeprefix("http://").split(":")
    for rude in (b"POST /v1/reports HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc", b"nonsense\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:  # says a little, then hangs up
            connection.sendall(rude)
    slow = socket.create_connection((host, int(port)))  # one byte, and no more
    slow.sendall(b"P")
    answer = httpx.post(
        f"{address}/v1/reports",
        files={"image": ("secret-name.dcm", image)},
        data={"indication": "secret words"},
        timeout=60,
    )
    assert answer.status_code == 200
    slow.close()
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM), log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any(isinstance(line["message"], dict) and line["message"]["outcome"] == "written" for line in lines)
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert all(time.tzinfo == UTC and abs(datetime.now(UTC) - time).seconds < 600 for time in times)
    for secret in ("secret", "CompressedSamples", "9RG1", "Traceback"):
        assert secret not in log


def test_connections_that_say_too_little_are_closed_and_keep_nobody_waiting(tiny_bundle: Path):
    with served(tiny_bundle, subprocess.PIPE, "--idle", "1") as (address, process):
        host, port = address.removeprefix("http://").split(":")
        head = b"POST /v1/reports HTTP/1.1\r\nHost: localhost\r\n"
        body = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 90000\r\n\r\n--b"
        slow = [socket.create_connection((host, int(port))) for _ in range(60)]
        for number, connection in enumerate(slow):
            connection.sendall((b"", head, head + body)[number % 3])
        answer = httpx.post(
            f"{address}/v1/reports", files={"image": (EXAMPLES / "chest_pa.png").read_bytes()}, timeout=60
        )
        assert answer.status_code == 200
        said = []
        for connection in slow:
            connection.settimeout(30)
            said.append(connection.recv(1000))  # returns when the other end closes
            connection.close()
        assert all(b" 408 " in text for text in said[2::3]) and not any(said[0::3] + said[1::3])
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert "Traceback" not in log


def test_a_port_that_is_taken_is_told_in_one_line(
    server: tuple[str, subprocess.Popen], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CBEDGE_TOKEN", TOKEN)
    port = server[0].rpartition(":")[2]
    for host, reason in (("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign"), ("a..b", "invalid")):
        arguments = ("--host", host, "--port", port, "--model", tiny_bundle, "--device", "cpu")
        done = call_cli("cbedge.cli", "serve", *arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"cbedge: cannot listen on {host}:{port}: {reason}"), done.stderr


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_every_request_that_the_description_allows_or_forbids_is_answered_as_described(
    generator: ReportGenerator, mode: str
):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    # A description cannot say which bytes are a radiograph.
    from schemathesis.specs.openapi.checks import positive_data_acceptance as radiographs_only

    app = create_app(generator, ServeSettings(max_bytes=100_000))
    tried = 0
    for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():

        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=found.ok().as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def answered(case: Any) -> None:
            nonlocal tried
            tried += 1
            case.call_and_validate(excluded_checks=[radiographs_only])

        with suppress(Unsatisfiable):  # of a request without parameters nothing can be wrong
            answered()
    assert tried >= 10
