"""The input and the options of one draft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from cbedge.arguments import check_type
from cbedge.decoding import Decoding
from cbedge.drafting.assessment import check_shown_as
from cbedge.report import MARKED

if TYPE_CHECKING:
    from cbedge.images.radiograph import ImageSource


class DraftOptions(TypedDict, total=False):
    """The fields of :class:`DraftRequest` except ``image``, as keyword arguments."""

    lateral: ImageSource | None
    indication: str | None
    comparison: str | None
    view: str | None
    template: str | None
    max_new_tokens: int | None
    decoding: Decoding | Mapping[str, Any] | None
    accept_any_image: bool
    unassessed: str


@dataclass(frozen=True)
class DraftRequest:
    """The input and the options of one draft.

    Attributes:
        image: the frontal radiograph: a path, the file's bytes, a binary file object, a PIL image, an array, a pydicom
            dataset or a :class:`~cbedge.images.radiograph.Radiograph`; see
            :func:`~cbedge.images.radiograph.load_radiograph`.
        lateral: lateral radiograph of the same study, for a model whose :attr:`~ReportGenerator.reads_lateral` is true.
        indication: reason for the study; default is the one in the DICOM header.
        comparison: prior study to compare with.
        view: ``frontal`` or ``lateral``; default is the view in the file, else ``frontal``.
        template: a normal report whose wording the draft follows. Default is the one of
            :meth:`~ReportGenerator.keep_to`; else, if no abnormality is detected, the bundle's template for the
            indication.
        max_new_tokens: maximum number of tokens, 1 to 1,024; a longer draft is cut after its last whole sentence and
            is not ``complete``. Default is the bundle's limit, or more if the template needs it.
        decoding: decoding settings; default is :attr:`~ReportGenerator.decoding`. A mapping changes some of them.
        accept_any_image: also draft from an image that does not look like a chest radiograph.
        unassessed: sentences that state or deny what the model does not assess: ``mark`` them with ``*``, ``omit``
            them, or ``plain``, as the others. The text itself follows it, and so do the stream and every output.

    Raises:
        OptionError: ``accept_any_image`` is neither ``True`` nor ``False``, or ``unassessed`` is another text.
    """

    image: ImageSource
    lateral: ImageSource | None = None
    indication: str | None = None
    comparison: str | None = None
    view: str | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    decoding: Decoding | Mapping[str, Any] | None = None
    accept_any_image: bool = False
    unassessed: str = MARKED

    def __post_init__(self) -> None:
        check_type("accept_any_image", self.accept_any_image, (bool, np.bool_), "True or False")
        check_shown_as(self.unassessed)
