"""The findings, read from ``ontology.yaml``; a new finding is one entry there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).with_name("ontology.yaml")


@dataclass(frozen=True)
class Finding:
    """One entry; the head of the file explains its fields.

    Raises:
        ValueError: a field has the wrong type.
    """

    name: str
    read_as: tuple[str, ...] = ()
    opening: str = ""
    denials: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    iu_xray: tuple[str, ...] = ()
    iu_xray_unsure: tuple[str, ...] = ()
    chexpert: tuple[str, ...] = ()
    nih: tuple[str, ...] = ()
    is_tag: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            if isinstance(value, list):
                value = tuple(map(str, value))
                object.__setattr__(self, field.name, value)
            if field.name != "name" and not isinstance(value, wanted):
                raise ValueError(f"{PATH.name}: {field.name} of {self.name} must be a {wanted.__name__}")


def read_ontology(path: Path = PATH) -> dict[str, Finding]:
    """The findings by name, in the order of the file; references in denials are replaced.

    Raises:
        ValueError: an entry has an unknown field, or one of the wrong type.
    """
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts: dict[str, str] = {}

    def fill(text: str) -> str:
        for name, part in parts.items():
            text = text.replace(f"<{name}>", f"(?:{part})")
        return text

    for name, text in values["parts"].items():  # a part may refer to earlier ones
        parts[name] = fill(text)
    known = {field.name for field in fields(Finding)} - {"name"}
    findings = {}
    for name, entry in values["findings"].items():
        entry = entry or {}
        if unknown := [*entry.keys() - known]:
            raise ValueError(
                f"{path.name}: {name} has the unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        findings[name] = Finding(name, **{**entry, "denials": [*map(fill, entry.get("denials", ()))]})
    return findings


ONTOLOGY = read_ontology()
TAGS = tuple(name for name, finding in ONTOLOGY.items() if finding.is_tag)
TAG_FINDINGS = {name: ONTOLOGY[name].read_as for name in TAGS if ONTOLOGY[name].read_as}
OPENINGS = {name: finding.opening for name, finding in ONTOLOGY.items() if finding.opening}
DENIALS = {name: finding.denials for name, finding in ONTOLOGY.items() if finding.denials}
