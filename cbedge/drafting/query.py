"""Ask the Q-Former about a study's radiographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cbedge.backends import Backend
from cbedge.drafting.codec import TextCodec
from cbedge.findings.image_findings import ImageFindings
from cbedge.findings.reading import ImageReading, QFormerOutput, interpret
from cbedge.prompt import ClinicalContext, build_query_instruction


def query_films(
    backend: Backend, codec: TextCodec, features: Sequence[np.ndarray], context: ClinicalContext
) -> list[QFormerOutput]:
    """Ask the Q-Former about each radiograph of a study, its frontal one first.

    Args:
        backend: runs the Q-Former.
        codec: tokenizes its instruction.
        features: of the vision encoder, float32 [1, P, H] each.
        context: of the study; its view is the first radiograph's.
    """
    contexts = [context, replace(context, view="lateral")]
    ids = (codec.encode_instruction(build_query_instruction(one)) for one in contexts)
    return [backend.query_image(f, np.array([i], np.int64)) for f, i in zip(features, ids, strict=False)]


def read_images(
    backend: Backend, codec: TextCodec, findings: ImageFindings | None, features: Sequence[np.ndarray],
    context: ClinicalContext,
) -> ImageReading:  # fmt: skip
    """:func:`query_films` and :func:`interpret` in one."""
    return interpret(query_films(backend, codec, features, context), findings)
