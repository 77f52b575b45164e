"""The keys of all JSON that cbedge writes, and what its HTTP service takes and answers."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import call_cli, needs_default_model
from fastapi.testclient import TestClient
from golden.drafts import FOLDER
from syrupy.assertion import SnapshotAssertion

from cbedge import ReportGenerator
from cbedge.services.http import create_app

FILM = FOLDER / "films" / "00003523_013.jpg"
MODEL = ("--variant", "int4", "--device", "cpu")
NAMED = ("finding_scores", "files", "variants", "versions")  # objects whose keys are names of what they hold
FIGURES = "quality"  # the record of an evaluation


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Every key of a JSON value with the keys above it, as in ``sentences[].text``."""
    if isinstance(value, list):
        for item in value:
            yield from keys(item, f"{path}[]")
    elif isinstance(value, dict):
        named = path.rpartition(".")[2] in NAMED
        for key, inner in value.items():
            inside = f"{path}.<name>" if named else f"{path}.{key}" if path else key
            yield inside
            if key != FIGURES:
                yield from keys(inner, inside)


def as_lines(*values: Any) -> str:
    """The keys of some values, each once, in the order in which they come."""
    return "".join(f"{key}\n" for key in dict.fromkeys(key for value in values for key in keys(value)))


def schema_lines(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The properties of a JSON Schema, with their types and whether they are required."""
    for name, inner in schema.get("properties", {}).items():
        needed = ", required" if name in schema.get("required", ()) else ""
        kind = f"one of {inner['enum']}" if "enum" in inner else inner.get("type", "anything")
        yield f"{path}{name}: {kind}{needed}"
        yield from schema_lines(inner, f"{path}{name}.")
        yield from schema_lines(inner.get("items", {}), f"{path}{name}[].")


def test_report_schema(snapshot: SnapshotAssertion):
    done = call_cli("cbedge.cli.main", "schema")
    assert "".join(f"{line}\n" for line in schema_lines(json.loads(done.stdout))) == snapshot


def test_doctor(snapshot: SnapshotAssertion):
    done = call_cli("cbedge.cli.main", "doctor", "--json", "--model", "nothing")
    assert as_lines(*json.loads(done.stdout)) == snapshot


@needs_default_model
def test_manifest(snapshot: SnapshotAssertion):
    done = call_cli("cbedge.cli.main", "model", "--json")
    assert as_lines(json.loads(done.stdout)) == snapshot


@needs_default_model
def test_batch_lines(tmp_path: Path, snapshot: SnapshotAssertion):
    shutil.copy(FILM, tmp_path)
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
    done = call_cli("cbedge.cli.main", "batch", tmp_path, "--out", tmp_path / "drafts.jsonl", *MODEL)
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "drafts.jsonl").read_text(encoding="utf-8").splitlines()]
    schema = json.loads(call_cli("cbedge.cli.main", "schema", "--batch").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for line in lines:
        jsonschema.validate(line, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**line, "unknown": 1}, schema)
    assert "".join(f"status {line['status']}\n{as_lines(line)}\n" for line in lines) == snapshot


@needs_default_model
def test_bench_record(snapshot: SnapshotAssertion):
    short = ("--repeat", 1, "--warm-up", 0, "--tokens", 30, "--variants", "int4", "--device", "cpu")
    done = call_cli("cbedge.cli.main", "bench", "--image", FILM, *short, "--format", "json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert as_lines({**record, "variants": {one["variant"]: one for one in record["variants"]}}) == snapshot


@needs_default_model
def test_http_service(snapshot: SnapshotAssertion):
    generator = ReportGenerator.from_pretrained(variant="int4", device="cpu")
    with TestClient(create_app(generator)) as client:
        lines = [*routes(client.get("/openapi.json").json())]
        lines += ["", "GET /v1/model", *as_lines(client.get("/v1/model").json()).splitlines()]
        files, wanted = {"image": FILM.read_bytes()}, {"stream": "true", "heatmap": "true"}
        answer = client.post("/v1/reports", files=files, data=wanted)
        events = re.findall(r"event: (\w+)\ndata: (.+)\n", answer.text)
        for name in dict.fromkeys(name for name, _ in events):
            lines += [
                "",
                f"event {name}",
                *as_lines(*(json.loads(data) for one, data in events if one == name)).splitlines(),
            ]
        lines += ["", "GET /metrics", *re.findall(r"# TYPE (.+)", client.get("/metrics").text)]
    assert "\n".join(lines) + "\n" == snapshot


def routes(api: dict[str, Any]) -> Iterator[str]:
    """What each address takes, and the statuses that it answers with."""
    for path, methods in api["paths"].items():
        for method, about in methods.items():
            yield f"{method.upper()} {path}"
            for parameter in about.get("parameters", ()):
                yield f"    {parameter['in']} {parameter['name']}"
            for kind, body in about.get("requestBody", {}).get("content", {}).items():
                yield f"    {kind}"
                yield from (f"        {line}" for line in schema_lines(body["schema"]))
            for status, answer in sorted(about["responses"].items()):
                yield f"    {status} {', '.join(answer.get('content', {}))}".rstrip()
