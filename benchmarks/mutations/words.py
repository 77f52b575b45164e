"""Words, tables, HTTP requests and bytes on the DICOM port."""

from __future__ import annotations

import struct

import numpy as np

from benchmarks.mutations.base import MARKER, TABLES, Input, damage, number, plain_png


def _pick(rng: np.random.Generator, table: str) -> str:
    return TABLES[table][rng.integers(len(TABLES[table]))]


def _word(rng: np.random.Generator) -> str:
    text = _pick(rng, "words")
    return text if rng.random() < 0.7 else text + _pick(rng, "words")


def text(rng: np.random.Generator, made: Input) -> None:
    """Unusual indications, comparisons, views and templates."""
    made.data, made.name = plain_png(), "film.png"
    for name in ("indication", "comparison", "view"):
        if rng.random() < 0.5:
            made.options[name] = _word(rng)
    if rng.random() < 0.5:
        template = _pick(rng, "templates")
        raw = template.encode() if rng.random() < 0.5 else damage(rng, template.encode())
        made.options["template"] = raw
    made.note = "words"


def table(rng: np.random.Generator, made: Input) -> None:
    """A table for ``cbedge batch`` with wrong columns, quoting, encoding or bytes."""
    columns = ["image", "id", "indication", "comparison", "view", "lateral"]
    header = columns if rng.random() < 0.6 else list(rng.permutation(columns))[: int(rng.integers(1, 7))]
    if rng.random() < 0.3:
        header[int(rng.integers(len(header)))] = str(
            rng.choice(["Indication", "image ", "IMAGE", "", "age", "indicaton"])
        )
    rows = [header]
    for line in range(int(rng.integers(0, 4))):
        row = ["film.png", str(line), _word(rng), _word(rng), str(rng.choice(["", "PA", "frontal", "x"])), ""]
        rows.append([row[columns.index(name)] if name in columns else _word(rng) for name in header])
    separator = "," if rng.random() < 0.8 else ";"
    quoted = rng.random() < 0.7
    lines = [separator.join('"' + c.replace('"', '""') + '"' if quoted else c for c in row) for row in rows]
    text = str(rng.choice(["\n", "\r\n"])).join(lines) + str(rng.choice(["", "\n", "\n\n", "\x00\x00"]))
    encoding = str(rng.choice(["utf-8", "utf-8-sig", "utf-16", "cp1252"], p=[0.6, 0.15, 0.1, 0.15]))
    made.data = text.encode(encoding, "replace")
    if rng.random() < 0.2:
        made.data = damage(rng, made.data)
    made.name, made.note = "table.csv", "table"


_BOUNDARY = "b0undary"
_CONTENT_TYPES = [
    f"multipart/form-data; boundary={_BOUNDARY}",
    "multipart/form-data",
    "application/json",
    "text/plain; charset=\xff",
    "",
]


def http(rng: np.random.Generator, made: Input) -> None:
    """A request as raw bytes, sent on a socket."""
    body = _body(rng)
    method, path = str(rng.choice(TABLES["methods"])), str(rng.choice(TABLES["paths"]))
    lengths = [str(len(body)), "0", "-1", "99999999999", "abc", str(max(0, len(body) - 7))]
    length = lengths[int(rng.choice(6, p=[0.75, 0.05, 0.05, 0.05, 0.05, 0.05]))]
    host = str(rng.choice(TABLES["hosts"], p=[0.7, 0.1, 0.05, 0.1, 0.05]))
    kind = str(rng.choice(_CONTENT_TYPES, p=[0.8, 0.05, 0.05, 0.05, 0.05]))
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    head += "Connection: close\r\n\r\n"
    made.data = head.encode("latin-1", "replace") + (b"" if method in ("GET", "HEAD", "OPTIONS") else body)
    if rng.random() < 0.1:
        made.data = damage(rng, made.data)
    made.name, made.note = "request", f"{method[:8]} {path[:20]} length {length}"


def _body(rng: np.random.Generator) -> bytes:
    """A form with text fields and images, some of them wrong, missing, repeated or damaged."""
    parts = []
    fields = [
        ("indication", _word(rng)),
        ("view", _word(rng)),
        ("format", str(rng.choice(["json", "x", "text"]))),
        ("indicaton", "cough"),
        ("stream", str(rng.choice(["true", "1", "maybe"]))),
        ("template", _pick(rng, "templates")),
    ]
    for name, value in fields:
        if rng.random() < 0.3:
            parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode("utf-8", "replace"))
    for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
        image = plain_png() if rng.random() < 0.5 else damage(rng, plain_png())
        parts.append(f'Content-Disposition: form-data; name="image"; filename="{MARKER}.png"\r\n\r\n'.encode() + image)
    boundary = b"--" + _BOUNDARY.encode()
    body = b"".join(boundary + b"\r\n" + part + b"\r\n" for part in parts) + boundary + b"--\r\n"
    return damage(rng, body) if rng.random() < 0.2 else body


def pdu(rng: np.random.Generator, made: Input) -> None:
    """Bytes for the DICOM node's port that are no association, or a broken one."""
    kind = int(rng.integers(4))
    lead = bytes([int(rng.integers(0, 9)), 0]) + struct.pack(">I", number(rng))
    made.data = [rng.bytes(int(rng.integers(0, 300))), lead, lead + rng.bytes(80), b"GET / HTTP/1.1\r\n\r\n"][kind]
    made.name, made.note = "pdu", f"PDU {kind}"
