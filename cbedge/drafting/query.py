"""Run the Q-Former on a study's radiographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cbedge.backends import Backend
from cbedge.drafting.codec import TextCodec
from cbedge.findings.finding_reader import FindingReader
from cbedge.findings.image_findings import ImageFindings
from cbedge.findings.reading import ImageReading, QFormerOutput, interpret
from cbedge.images.gate import pooled
from cbedge.prompt import ClinicalContext, build_query_instruction


def query_films(
    backend: Backend, codec: TextCodec, features: Sequence[np.ndarray], context: ClinicalContext
) -> list[QFormerOutput]:
    """Run the Q-Former on each radiograph of a study, the frontal one first.

    Args:
        backend: runs the Q-Former.
        codec: tokenizes the instruction.
        features: vision features of each radiograph, float32 [1, P, H].
        context: the study's clinical context; its view is the first radiograph's.
    """
    contexts = [context, replace(context, view="lateral")]
    ids = (codec.encode_instruction(build_query_instruction(one)) for one in contexts)
    return [backend.query_image(f, np.array([i], np.int64)) for f, i in zip(features, ids, strict=False)]


def read_images(
    backend: Backend,
    codec: TextCodec,
    findings: ImageFindings | None,
    features: Sequence[np.ndarray],
    context: ClinicalContext,
    reader: FindingReader | None = None,
) -> ImageReading:
    """Run :func:`query_films` and :func:`interpret`."""
    outputs = query_films(backend, codec, features, context)
    rows = [pooled(found) for found in features] if reader else []
    return interpret(outputs, findings, rows, reader, context.view)
