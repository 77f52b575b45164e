"""The Python names that users may import, with their signatures."""

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from conftest import needs_default_model
from syrupy.assertion import SnapshotAssertion

import cbedge

# Names of modules that docs and examples import.
DOCUMENTED = {
    "cbedge.outputs": "render",
    "cbedge.images.heatmap": "overlay",
    "cbedge.services.dicom_node": "Peer",
    "cbedge.images.radiograph": "load_radiograph",
    "cbedge.report": "DRAFT_STATEMENT",
}
PROTOCOLS = ("__aiter__", "__anext__", "__call__", "__enter__", "__exit__", "__iter__", "__next__")


class Plain(str):
    """An annotation that is printed as it is."""

    __repr__ = str.__str__


def test_public_names(snapshot: SnapshotAssertion):
    assert lines([(name, getattr(cbedge, name)) for name in sorted(cbedge.__all__)]) == snapshot


def test_documented_names(snapshot: SnapshotAssertion):
    found = [(f"{home}.{name}", getattr(importlib.import_module(home), name)) for home, name in DOCUMENTED.items()]
    assert lines(found) == snapshot


@needs_default_model
def test_attributes_of_a_generator(snapshot: SnapshotAssertion):
    generator = cbedge.ReportGenerator.from_pretrained(variant="int4", device="cpu")
    assert "".join(f"{name}\n" for name in sorted(vars(generator)) if not name.startswith("_")) == snapshot


def lines(names: Sequence[tuple[str, Any]]) -> str:
    return "".join(f"{line}\n" for name, value in names for line in described(name, value))


def described(name: str, value: Any) -> Iterator[str]:
    """A name in a line; a class with its constructor, methods and attributes, those of its bases among them."""
    if inspect.isfunction(value):
        yield f"{name}{signature(value)}"
    elif inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})"
        if not issubclass(value, Exception):
            yield f"    {value.__name__}{signature(value)}"
        for word in sorted(members(value)):
            yield f"    {member(value, word)}"
    else:
        yield f"{name}: {type(value).__name__}"


def members(kind: type) -> set[str]:
    """Public names that cbedge's own classes define."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("cbedge")]
    names = {name for base in own for name in (*vars(base), *inspect.get_annotations(base))}
    return {name for name in names if not name.startswith("_") or name in PROTOCOLS}


def member(kind: type, name: str) -> str:
    value = inspect.getattr_static(kind, name, None)
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {name}{signature(getattr(kind, name))}"
    if inspect.isfunction(value):
        return f"{'async ' * inspect.iscoroutinefunction(value)}{name}{signature(value)}"
    if isinstance(value, int | str):
        return f"{name} = {value!r}"
    return name


def signature(value: Any) -> str:
    """A signature whose annotations name no module: where a class lies is no promise."""
    found = inspect.signature(value)
    parameters = [p.replace(annotation=plain(p.annotation)) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=plain(found.return_annotation)))


def plain(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return Plain(re.sub(r"\b(?:\w+\.)+(?=\w)", "", text.replace("'", "")))
