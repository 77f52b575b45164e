"""Parse the form that a client of the HTTP service sends."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cbedge.drafting.assessment import SHOWN_AS, check_shown_as
from cbedge.drafting.request import DraftOptions
from cbedge.drafting.template_parser import MAX_TEMPLATE_CHARACTERS
from cbedge.errors import ContextError, RadiographError
from cbedge.outputs import FORMATS, check_format
from cbedge.prompt import MAX_CONTEXT_CHARACTERS, VIEW_NAMES
from cbedge.report import MARKED

TEXTS = ("indication", "comparison", "view", "template")
FILES = ("image", "lateral")
SWITCHES = ("stream", "heatmap", "accept_any_image")
_FIELDS = (*FILES, *TEXTS, "format", "unassessed", *SWITCHES)
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")
_MAX_FILES, _MAX_FIELDS = 8, 16
_UTF_8, _PLAIN = ("utf-8", "utf8", "us-ascii", "ascii"), ("7bit", "8bit", "binary")
_EXTENDED_NAME = re.compile(rb";\s*filename\*=", re.IGNORECASE)  # RFC 5987, which the parser ignores
MAX_TEXT_BYTES = 4 * MAX_TEMPLATE_CHARACTERS  # of the longest text field, in UTF-8


@dataclass(frozen=True)
class DraftForm:
    """A parsed request for a draft.

    Attributes:
        image, lateral: uploaded files, not read yet.
        options: the other fields of :class:`cbedge.DraftRequest` that a form has; ``None`` for texts not given.
        format: a name in :data:`FORMATS`.
        stream, heatmap: switches.
    """

    image: UploadFile
    lateral: UploadFile | None
    options: DraftOptions
    format: str
    stream: bool
    heatmap: bool


class _Parser(MultiPartParser):
    """Refuses what the parser would ignore: parts in an encoding, and everything after the last whole part."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None]):
        super().__init__(headers, self._whole(stream), max_files=_MAX_FILES, max_fields=_MAX_FIELDS)
        self._ended = False

    def on_end(self) -> None:
        """See :class:`MultiPartParser`."""
        self._ended = True

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The body; it must end with its closing boundary and white space."""
        boundary = parse_options_header(self.headers["content-type"])[1].get(b"boundary", b"")
        closing = b"\r\n--" + boundary + b"--"
        last, after = b"\r\n", b""
        async for chunk in stream:
            begun = self._ended
            yield chunk  # parsed before the next line
            if self._ended:
                after = chunk if begun else (last + chunk).partition(closing)[2]
            if after.strip():
                break
            last = (last + chunk[-len(closing) :])[-len(closing) :]
        if not self._ended or after.strip():
            raise HTTPException(400, "the form is incomplete: it does not end with its closing boundary; send it again")

    def on_headers_finished(self) -> None:
        """See :class:`MultiPartParser`."""
        part = self._current_part
        disposition = part.content_disposition or b""
        if _EXTENDED_NAME.search(disposition) and b"filename" not in parse_options_header(disposition)[1]:
            part.content_disposition = disposition + b'; filename=""'  # a file; its name is not used
        super().on_headers_finished()
        name, headers = part.field_name, dict(part.item_headers)
        if name not in FILES:
            _check_charset(f"the form field {_shown(name)}", headers.get(b"content-type", b""))
        encoding = headers.get(b"content-transfer-encoding", b"binary").decode("latin-1").strip().lower()
        if encoding not in _PLAIN:
            raise ContextError(
                f"the form field {_shown(name)} has the Content-Transfer-Encoding {_shown(encoding)}: send it without"
            )


def _check_charset(what: str, content_type: bytes | str) -> None:
    charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _UTF_8:
        raise ContextError(f"{what} has the charset {_shown(charset)}: send UTF-8")


def check_nothing_ignored(request: Request) -> None:
    """A FastAPI dependency that refuses parts of a request that no route reads.

    Raises:
        ContextError: the request has query parameters, or its body is compressed.
    """
    if request.query_params:
        names = ", ".join(dict.fromkeys(_shown(name) for name, _ in request.query_params.multi_items()))
        raise ContextError(f"there are no query parameters, but the address has {names[:100]}: send form fields")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ContextError(f"the body has the Content-Encoding {_shown(coding)}: send it uncompressed")


@asynccontextmanager
async def open_form(request: Request) -> AsyncIterator[FormData]:
    """Open the multipart form of a request. Names and texts are decoded as Latin-1, one character per byte, so that
    bytes that are not UTF-8 are preserved.

    Raises:
        ContextError: the request is not a multipart form, or is not in UTF-8.
        HTTPException: the form is malformed or incomplete (400), or there is no space for its files (503).
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise ContextError("the body is not a multipart form: send one, such as curl -F image=@study.dcm")
    _check_charset("the form", kind)
    parts = [part for part in kind.split(";") if not part.strip().lower().startswith("charset=")]
    headers = Headers({"content-type": ";".join([*parts, " charset=latin-1"])})
    parser = _Parser(headers, request.stream())
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the multipart form is malformed: {error.message}") from None
    except OSError as error:
        reason = f"no space for the files of the form ({error.strerror}): retry later"
        raise HTTPException(503, reason, {"Retry-After": "30"}) from None
    try:
        yield form
    finally:
        await form.close()


async def read_form(form: FormData) -> DraftForm:
    """Parse a form of :func:`open_form`.

    Raises:
        ContextError: a field is unknown, occurs twice, has an invalid value, or cannot be combined with another.
        RadiographError: the file ``image`` is missing.
    """
    fields: dict[str, Any] = {}
    for raw_name, value in form.multi_items():
        name = raw_name.encode("latin-1").decode("utf-8", "backslashreplace")
        if name not in _FIELDS:
            raise ContextError(f"unknown form field {_shown(name)}; the fields are: {', '.join(_FIELDS)}")
        if name in fields:
            raise ContextError(f"the form field {name} occurs twice: send it once")
        fields[name] = value
    for name in FILES:
        if isinstance(fields.get(name), str):
            if name == "image" or fields[name]:
                raise RadiographError(f"{name} was sent as text: send it as a file, such as -F {name}=@study.dcm")
            del fields[name]
    if "image" not in fields:
        raise RadiographError("the form has no file image: send one, such as -F image=@study.dcm")
    texts = {name: await _text(name, fields.get(name)) for name in (*TEXTS, "format", "unassessed", *SWITCHES)}
    chosen, unassessed = texts["format"] or "json", texts["unassessed"] or MARKED
    check_format(chosen)
    check_shown_as(unassessed)
    stream, heatmap, anything = (_switch(name, texts[name]) for name in SWITCHES)
    if stream and chosen != "json":
        raise ContextError(f"stream sends the report as JSON, so format {chosen} cannot be combined with it: omit one")
    if heatmap and not stream:
        raise ContextError("heatmap is sent with stream only: give stream=true as well")
    options = DraftOptions(unassessed=unassessed, accept_any_image=anything)
    options.update({name: texts[name] or None for name in TEXTS})  # type: ignore[typeddict-item]
    return DraftForm(fields["image"], fields.get("lateral"), options, chosen, stream, heatmap)


async def _text(name: str, value: str | UploadFile | None) -> str | None:
    """The value of a text field, which may also be sent as a text file."""
    if value is None:
        return None
    if isinstance(value, str):
        content, what, how = value.encode("latin-1"), f"the form field {name}", "send it as UTF-8"
    else:
        content, what, how = await value.read(MAX_TEXT_BYTES + 1), f"the file given as {name}", "pass a text file"
        if len(content) > MAX_TEXT_BYTES:
            raise ContextError(f"{what} has more than {MAX_TEXT_BYTES:,} bytes: shorten it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ContextError(f"{what} is not valid UTF-8; {how}") from None


def _switch(name: str, text: str | None) -> bool:
    value = (text or "").strip().lower()
    if value not in (*_YES, *_NO):
        raise ContextError(f"{name} is {_shown(value)}; give true or false")
    return value in _YES


def _shown(text: str) -> str:
    return repr(text[:40])


def form_schema() -> dict[str, Any]:
    """The OpenAPI description of the form."""

    def file(what: str) -> dict[str, Any]:
        return {"type": "string", "format": "binary", "description": what}

    def text(what: str, example: str, most: int = MAX_CONTEXT_CHARACTERS) -> dict[str, Any]:
        return {"type": "string", "maxLength": most, "description": what, "examples": [example]}

    def switch(what: str) -> dict[str, Any]:
        return {"type": "boolean", "default": False, "description": what}

    properties = {
        "image": file("PNG, JPEG, TIFF, WebP or DICOM (CR, DX)."),
        "lateral": file("Lateral radiograph of the same study (optional)."),
        "indication": text("Reason for the study; text or a text file.", "cough"),
        "comparison": text("Prior study to compare with; text or a text file.", "2019"),
        "view": {"type": "string", "description": f"{VIEW_NAMES}; else from the header.", "examples": ["PA"]},
        "template": text(
            "Your normal report, whose wording the draft follows; text or a text file.",
            "The lungs are clear.",
            MAX_TEMPLATE_CHARACTERS,
        ),
        "format": {"type": "string", "enum": [*FORMATS], "default": "json"},
        "unassessed": {
            "type": "string",
            "enum": [*SHOWN_AS],
            "default": MARKED,
            "description": "Sentences on what the model does not assess: marked with *, left out, or as the others.",
        },
        "stream": switch("Send server-sent events."),
        "heatmap": switch("With `stream`, add a heat map of the model's attention (PNG)."),
        "accept_any_image": switch("Also draft from images that do not look like a chest radiograph."),
    }
    schema = {"type": "object", "required": ["image"], "properties": properties, "additionalProperties": False}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
