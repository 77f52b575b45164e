"""What was computed of the studies drafted last, kept for the next draft of the same radiographs.

A radiologist who corrects the indication, or asks for other words, has the same radiographs read again. What the vision
encoder and the Q-Former make of them does not depend on the indication; and of the prompt, the language model need not
read again what it begins with. Nothing changes but the time it takes: what is kept is bit for bit what would be
computed (``tests/test_recent.py``; over real studies ``tests/test_generator.py``).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cbedge.decoding import Decoder
from cbedge.errors import ContextError

if TYPE_CHECKING:
    from cbedge.findings.reading import QFormerOutput

MAX_RECENT_STUDIES = 64


@dataclass
class CachedStudy:
    """What is kept of one study.

    Attributes:
        features: of the vision encoder, float32 [1, P, H] for each radiograph; empty before they were computed.
        answers: what the Q-Former answered for each.
    """

    features: list[np.ndarray] = field(default_factory=list)
    answers: list[QFormerOutput] = field(default_factory=list)
    _decoders: list[Decoder] = field(default_factory=list)

    def take_decoder(self, capacity: int) -> Decoder | None:
        """A decoder for at least ``capacity`` that has read a prompt of this study and is used by no draft; ``None``
        where there is none."""
        try:
            decoder = self._decoders.pop()
        except IndexError:  # or another thread's draft has it
            return None
        # Decoders are made with a place to spare, which is theirs to use.
        return decoder if decoder.capacity > capacity else decoder.enlarged(capacity)

    def give_decoder(self, decoder: Decoder) -> None:
        """Keep a decoder, now that its draft is written, if it is one that keeps its prompt."""
        if decoder.keeps_prompt:
            self._decoders[:] = [decoder]


class Recent:
    """The last studies that were drafted; many threads may ask.

    Studies are told apart by the pixels that the model sees, and by the view.

    Args:
        studies: how many are kept, 0 to :data:`MAX_RECENT_STUDIES`.

    Raises:
        ContextError: ``studies`` is out of that range.
    """

    def __init__(self, studies: int):
        if not 0 <= studies <= MAX_RECENT_STUDIES:
            raise ContextError(f"{studies} recent studies; give 0 to {MAX_RECENT_STUDIES}")
        self.studies = studies
        self._kept: OrderedDict[Hashable, CachedStudy] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def study(self, planes: Sequence[np.ndarray], view: str | None) -> CachedStudy:
        """What is kept of a study, to be added to.

        Args:
            planes: for each radiograph what :func:`cbedge.images.radiograph.preprocess` made, float32 [1, 3, S, S].
            view: of the first one.
        """
        if not self.studies:
            return CachedStudy()
        # The three channels are one, shifted and scaled.
        key = (view, *(hashlib.sha256(plane[0, 0].tobytes()).digest() for plane in planes))
        with self._lock:
            study = self._kept.setdefault(key, CachedStudy())
            self._kept.move_to_end(key)
            while len(self._kept) > self.studies:
                self._kept.popitem(last=False)
            return study

    def clear(self) -> None:
        """Forget all studies; what is being drafted is finished undisturbed."""
        with self._lock:
            self._kept.clear()
