"""Drafts of several studies written together: every pass of the language model reads the next token of each.

A pass reads all weights once, however many drafts it serves; so many drafts cost little more time than one where memory
is what limits, as it does on a GPU. Each draft is written by the code that writes it alone, in a thread of its own; its
decoder waits until every other draft that is not yet finished wants its next token too.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cbedge.backends import Backend
from cbedge.errors import CbedgeError, ContextError
from cbedge.recent import Recent

if TYPE_CHECKING:
    from cbedge.backends.onnx import OnnxDecoder
    from cbedge.generator import ReportGenerator
    from cbedge.report import Report

MAX_TOGETHER = 64


class Group:
    """Drafts that read their tokens together.

    Args:
        count: of drafts; each calls :meth:`leave` once it is finished.
    """

    def __init__(self, count: int):
        self._turn = threading.Condition()
        self._writing = count
        self._wanted: dict[Seat, Sequence[int]] = {}
        self._answers: dict[Seat, np.ndarray] = {}
        self._rows: dict[Seat, list[int]] = {}
        self._joint: OnnxDecoder | None = None
        self._failure: Exception | None = None

    def read_each(self, seat: Seat, token_ids: Sequence[int]) -> np.ndarray:
        """Wait for the others, read a token in each of the seat's drafts; the logits after it, float32 [drafts, V]."""
        with self._turn:
            self._wanted[seat] = token_ids
            self._read_if_all_ask()
            self._turn.wait_for(lambda: seat in self._answers or self._failure is not None)
            if self._failure is not None:
                raise self._failure
            return self._answers.pop(seat)

    def leave(self) -> None:
        """Tell that one draft is finished."""
        with self._turn:
            self._writing -= 1
            self._read_if_all_ask()

    def seated(self, seat: Seat) -> bool:
        """Whether the seat's cache is in the common one."""
        return seat in self._rows

    def lengths(self, seat: Seat) -> np.ndarray:
        """How much the seat's drafts have read, int64 [drafts]."""
        assert self._joint is not None
        return self._joint.lengths[self._rows[seat]]

    def forget(self, seat: Seat, count: int) -> None:
        """Forget the last ``count`` tokens of the seat's drafts."""
        with self._turn:
            assert self._joint is not None
            self._joint.lengths[self._rows[seat]] -= count

    def _read_if_all_ask(self) -> None:
        if self._wanted and len(self._wanted) == self._writing:
            try:
                self._read()
            except Exception as error:
                self._failure = error
            self._wanted.clear()
            self._turn.notify_all()

    def _read(self) -> None:
        for seat in self._wanted:
            if seat not in self._rows:
                self._sit(seat)
        self._close_up()
        joint = self._joint
        assert joint is not None
        tokens = np.zeros(joint.drafts, np.int64)
        asked = np.zeros(joint.drafts, bool)
        for seat, ids in self._wanted.items():
            tokens[self._rows[seat]], asked[self._rows[seat]] = ids, True
        joint.lengths[~asked] = 0  # a finished draft's places are read into no more: they hold this pass's leftovers
        logits = joint.read_each(tokens.tolist())
        for seat in self._wanted:
            self._answers[seat] = logits[self._rows[seat]]

    def _sit(self, seat: Seat) -> None:
        own = seat.decoder
        first = self._joint.drafts if self._joint is not None else 0
        self._joint = own if self._joint is None else self._joint.join(own)
        self._rows[seat] = list(range(first, first + own.drafts))

    def _close_up(self) -> None:
        """Take the places of finished drafts away, once they are as many as the others."""
        assert self._joint is not None
        rows = [row for seat in self._wanted for row in self._rows[seat]]
        if 2 * len(rows) > self._joint.drafts:
            return
        self._joint = self._joint.spread(rows)
        places = iter(range(len(rows)))
        self._rows = {seat: [next(places) for _ in self._rows[seat]] for seat in self._wanted}


class Seat:
    """A :class:`~cbedge.decoding.Decoder` of one draft among others.

    It reads alone until it reads single tokens, and with the others from there on.

    Args:
        group: the others.
        decoder: its own, to begin with.
    """

    def __init__(self, group: Group, decoder: OnnxDecoder):
        self.group, self.decoder = group, decoder

    @property
    def length(self) -> int:
        """Embeddings and tokens that the first draft has read."""
        return int(self.group.lengths(self)[0]) if self.group.seated(self) else self.decoder.length

    @property
    def capacity(self) -> int:
        """How many it can hold."""
        return self.decoder.capacity

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        """As of :class:`~cbedge.decoding.Decoder`."""
        return self.decoder.prefill(embeds)

    def read(self, token_ids: Sequence[int]) -> np.ndarray:
        """As of :class:`~cbedge.decoding.Decoder`; with the others, one token after another."""
        if len(token_ids) > 1 and not self.group.seated(self):
            return self.decoder.read(token_ids)
        return np.concatenate([self.read_each([token_id]) for token_id in token_ids])

    def read_each(self, token_ids: Sequence[int]) -> np.ndarray:
        """As of :class:`~cbedge.decoding.Decoder`, with the others."""
        return self.group.read_each(self, token_ids)

    def rewind(self, length: int) -> None:
        """As of :class:`~cbedge.decoding.Decoder`."""
        if self.group.seated(self):
            self.group.forget(self, max(0, self.length - length))
        else:
            self.decoder.rewind(length)

    def spread(self, rows: Sequence[int]) -> Seat:
        """As of :class:`~cbedge.decoding.Decoder`, before it reads with the others."""
        return Seat(self.group, self.decoder.spread(rows))

    def join(self, other: Seat) -> Seat:
        """A seat of the drafts of both, before they read with the others."""
        return Seat(self.group, self.decoder.join(other.decoder))


class _SeatedBackend:
    """A backend whose decoders have seats in a group; all else is the backend's own."""

    def __init__(self, backend: Backend, group: Group):
        self._backend, self._group = backend, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def new_decoder(self, capacity: int) -> Seat:
        return Seat(self._group, self._backend.new_decoder(capacity))  # type: ignore[arg-type]


def draft_together(
    generator: ReportGenerator, requests: Sequence[Mapping[str, Any]]
) -> list[Report | CbedgeError]:  # fmt: skip
    """See :meth:`cbedge.generator.ReportGenerator.generate_many`."""
    if len(requests) > MAX_TOGETHER:
        raise ContextError(f"{len(requests)} studies at once; give at most {MAX_TOGETHER}")
    settings = [request.get("decoding") or generator.decoding for request in requests]
    if any(how.beams > 1 or how.candidates > 1 for how in settings):
        raise ContextError("beams and candidates are many drafts already: write their studies one at a time")
    # Where guesses hold, a pass gives one draft more tokens than it would give eight together. On a GPU one study is
    # written in a few milliseconds a pass, and to move its cache to a common one takes longer: 8 studies of the mini
    # model took .33 s one after another and 1.43 s together (H100).
    guided = generator.bundle.manifest.decoding.get("guidance", 1) != 1
    guesses = generator.phrasebook is not None and not guided
    guessed = guesses and all(how.is_greedy and how.speculative for how in settings)
    if guessed or len(requests) < 2 or not generator.backend.decoder_only or generator.backend.device == "cuda":
        return [_draft(generator, request) for request in requests]
    group = Group(len(requests))
    seated = copy.copy(generator)
    seated.backend = _SeatedBackend(generator.backend, group)  # type: ignore[assignment]
    seated.recent = Recent(0)  # which would hand over decoders without a seat
    one_a_pass = [replace(how, speculative=False) for how in settings]

    def draft(number: int) -> Report | CbedgeError:
        try:
            return _draft(seated, {**requests[number], "decoding": one_a_pass[number]})
        finally:
            group.leave()

    with ThreadPoolExecutor(len(requests)) as pool:  # all at once: each waits for all
        return list(pool.map(draft, range(len(requests))))


def _draft(generator: ReportGenerator, request: Mapping[str, Any]) -> Report | CbedgeError:
    try:
        return generator.generate(**request)
    except CbedgeError as error:
        return error
