"""Cache of recent studies, for drafting the same radiographs again.

A user who corrects the indication or the template drafts the same radiographs again. The outputs of vision encoder and
Q-Former do not depend on the indication, and the language model need not read the unchanged start of the prompt again.
Only the time changes: cached values are bit-identical to recomputed ones (``tests/test_recent.py``; with real studies
``tests/test_generator.py``).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cbedge.arguments import check_count
from cbedge.decoding import Decoder

if TYPE_CHECKING:
    from cbedge.findings.reading import QFormerOutput

MAX_RECENT_STUDIES = 64


@dataclass
class CachedStudy:
    """Cached results of one study.

    Attributes:
        features: vision features of each radiograph, float32 [1, P, H]; empty before they are computed.
        qformer_outputs: the Q-Former's output for each radiograph; empty before it is computed.
    """

    features: list[np.ndarray] = field(default_factory=list)
    qformer_outputs: list[QFormerOutput] = field(default_factory=list)
    _decoders: list[Decoder] = field(default_factory=list)

    def take_decoder(self, capacity: int) -> Decoder | None:
        """A decoder with at least ``capacity`` that has read a prompt of this study and is not in use, or ``None``."""
        try:
            decoder = self._decoders.pop()
        except IndexError:  # not cached, or in use by another thread
            return None
        # A decoder allocates one position more than requested, which it uses itself.
        return decoder if decoder.capacity > capacity else decoder.enlarged(capacity)

    def give_decoder(self, decoder: Decoder) -> None:
        """Cache the decoder of a finished draft, if it can reuse its prompt."""
        if decoder.keeps_prompt:
            self._decoders[:] = [decoder]


class Recent:
    """Thread-safe cache of the most recent studies, keyed by the preprocessed pixels and the view.

    Args:
        studies: maximum number of studies, 0 to :data:`MAX_RECENT_STUDIES`.

    Raises:
        ContextError: ``studies`` is no whole number, or out of range.
    """

    def __init__(self, studies: int):
        self.studies = check_count("recent_studies", studies, 0, MAX_RECENT_STUDIES)
        self._studies: OrderedDict[Hashable, CachedStudy] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._studies)

    def study(self, planes: Sequence[np.ndarray], view: str | None) -> CachedStudy:
        """The cache entry of a study, which the caller fills in.

        Args:
            planes: the preprocessed radiographs, float32 [1, 3, S, S] each.
            view: view of the first one.
        """
        if not self.studies:
            return CachedStudy()
        # The three channels differ only in shift and scale, so one of them identifies the image.
        key = (view, *(hashlib.sha256(plane[0, 0].tobytes()).digest() for plane in planes))
        with self._lock:
            study = self._studies.setdefault(key, CachedStudy())
            self._studies.move_to_end(key)
            while len(self._studies) > self.studies:
                self._studies.popitem(last=False)
            return study

    def clear(self) -> None:
        """Remove all studies; drafts in progress are not affected."""
        with self._lock:
            self._studies.clear()
