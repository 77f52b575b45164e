from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbedge import BundleError, ContextError
from cbedge.decoding import (
    Decoding,
    GuessLength,
    SpeculationStats,
    Token,
    beam_search,
    decode,
)
from cbedge.decoding.phrasebook import ORDER, Phrasebook
from cbedge.decoding.processors import NoRepeatNgram, RepetitionPenalty, processors_of
from cbedge.decoding.samplers import sampler_of

WORDS = 12
STOP = (0,)


class RandomModel:
    """A language model whose logits hang on the last two tokens, drawn at random: anything may follow anything."""

    def __init__(self, seed: int, capacity: int = 1000):
        self.table = np.random.default_rng(seed).standard_normal((WORDS, WORDS, WORDS)).astype(np.float32) * 2
        self.capacity, self.history, self.passes = capacity, [1, 1], 0

    @property
    def length(self) -> int:
        return len(self.history)

    def prefill(self, embeds: np.ndarray | None = None) -> np.ndarray:
        return self.table[self.history[-2], self.history[-1]]

    def append(self, token_ids: Sequence[int]) -> np.ndarray:
        self.passes += 1
        rows = []
        for token in token_ids:
            self.history.append(token)
            rows.append(self.prefill())
        assert self.length <= self.capacity
        return np.stack(rows)

    def rewind(self, length: int) -> None:
        self.history = self.history[:length]

    def fork(self, rows: Sequence[int]) -> "RandomModels":
        return RandomModels([self.branch() for row in rows if row == 0])

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        return self.append(token_ids)

    def branch(self) -> "RandomModel":
        other = RandomModel.__new__(RandomModel)
        other.table, other.capacity, other.history, other.passes = self.table, self.capacity, [*self.history], 0
        return other


class RandomModels:
    """Many drafts of one such model."""

    def __init__(self, models: list[RandomModel]):
        self.models = models

    def fork(self, rows: Sequence[int]) -> "RandomModels":
        return RandomModels([self.models[row].branch() for row in rows])

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.concatenate([model.append([t]) for model, t in zip(self.models, token_ids, strict=True)])


def ids(tokens: Iterable[Token]) -> list[int]:
    return [token.id for token in tokens]


def write_greedily(seed: int, limit: int = 40) -> list[int]:
    model = RandomModel(seed)
    return ids(decode(model, model.prefill(), STOP, limit))


def test_greedy_ends_at_the_stop_token_or_at_the_limit():
    drafts = [write_greedily(seed) for seed in range(30)]
    assert any(d[-1] == 0 for d in drafts) and any(len(d) == 40 for d in drafts)
    assert all(0 not in d[:-1] for d in drafts)
    assert len(write_greedily(3, 5)) <= 5


CONTROLS = (Decoding(), Decoding(no_repeat=3), Decoding(stop_bias=-2.0, repetition_penalty=1.3))
reports = st.lists(st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=30), max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), reports, st.integers(1, 40), st.booleans(), st.sampled_from(CONTROLS))
def test_guessing_ahead_changes_no_token(
    seed: int, others: list[list[int]], limit: int, knows: bool, controls: Decoding
):
    model = RandomModel(seed)
    wanted = ids(decode(model, model.prefill(), STOP, limit, processors=processors_of(controls, STOP)))
    phrasebook = Phrasebook.compile([*others, *([wanted] * 2 if knows else [])])
    model = RandomModel(seed, capacity=2 + limit)  # as tight as the generator makes it
    stats, processors = SpeculationStats(), processors_of(controls, STOP)
    written = ids(decode(model, model.prefill(), STOP, limit, processors=processors, guesser=phrasebook, stats=stats))
    assert written == wanted
    assert stats.accepted <= stats.guessed and stats.passes == model.passes <= max(0, len(wanted) - 1)


def test_a_known_report_takes_far_fewer_passes():
    seed = next(s for s in range(100) if len(set(write_greedily(s))) > 8 and len(write_greedily(s)) > 10)
    wanted = write_greedily(seed)
    model = RandomModel(seed)
    length = GuessLength()
    length.choose = lambda: 4  # type: ignore[method-assign]
    guesser = Phrasebook.compile([wanted] * 2)
    list(decode(model, model.prefill(), STOP, 40, guesser=guesser, guess_length=length))
    assert model.passes <= len(wanted) / 2


def test_nothing_is_guessed_where_it_does_not_pay():
    length = GuessLength()
    chosen = []
    for _ in range(200):
        chosen.append(length.choose())
        length.learn(chosen[-1], 0, 0.001 * (1 + chosen[-1]))  # every guess wrong, every one as dear as a token
    assert np.mean(chosen[20:]) < 0.2
    for _ in range(400):  # now every guess holds, and costs next to nothing
        guesses = length.choose()
        length.learn(guesses, guesses, 0.001 * (1 + 0.05 * guesses))
    assert length.choose() > 8


@pytest.mark.parametrize("known", [0, 3, 4, 16])
def test_what_a_pass_costs_is_learnt_whatever_the_guesser_knows(known: int):
    length = GuessLength()
    for _ in range(30):
        guesses = min(length.choose(), known)
        length.learn(guesses, 0, 0.01 * (1 + guesses))  # never right, and dear
    assert length.choose() == 0 or known == 0


def test_a_phrasebook_learns_saves_and_guesses(tmp_path: Path):
    report = [5, 6, 7, 8, 5, 6, 9, 0]
    book = Phrasebook.compile([report] * 3)
    assert book.guess([], 8) == report
    assert book.guess([7, 8, 5, 6], 2) == [9, 0]
    assert book.guess([11], 4) == []
    book.save(tmp_path / "phrasebook.npy")
    again = Phrasebook.load(tmp_path / "phrasebook.npy")
    assert len(again) == len(book) and again.guess([5, 6], 1) == book.guess([5, 6], 1)


def test_a_phrase_met_once_is_not_kept_and_the_size_has_a_limit(tmp_path: Path):
    assert len(Phrasebook.compile([[1, 2, 3]])) == 0
    rng = np.random.default_rng(0)
    many = [rng.integers(0, 5000, 200).tolist() for _ in range(40)]
    book = Phrasebook.compile(many * 2, max_bytes=10_000)
    book.save(tmp_path / "phrasebook.npy")
    assert 5_000 < (tmp_path / "phrasebook.npy").stat().st_size <= 10_000
    assert len(Phrasebook.compile(many * 2)) > len(book) > ORDER


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"not an array"])
def test_a_damaged_phrasebook_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "phrasebook.npy").write_bytes(content)
    with pytest.raises(BundleError, match="not a phrasebook"):
        Phrasebook.load(tmp_path / "phrasebook.npy")


def draw_from(model_seed: int, **values: float) -> list[int]:
    model = RandomModel(model_seed)
    settings = Decoding(**values)
    processors = processors_of(settings, STOP)
    return ids(decode(model, model.prefill(), STOP, 40, sampler=sampler_of(settings), processors=processors))


def draw(seed: int, **values: float) -> list[int]:
    return draw_from(7, seed=seed, **values)


def test_sampling_depends_on_its_seed_and_at_temperature_0_is_greedy():
    assert draw(1, temperature=1.0) == draw(1, temperature=1.0)
    assert len({tuple(draw(seed, temperature=1.0)) for seed in range(20)}) > 10
    assert draw(5) == write_greedily(7)
    assert draw(5, temperature=1.0, top_p=1e-6) == write_greedily(7)


def test_a_run_of_tokens_is_not_written_twice():
    for seed in range(20):
        model = RandomModel(seed)
        written = ids(decode(model, model.prefill(), STOP, 40, processors=[NoRepeatNgram(3)]))
        runs = [tuple(written[i : i + 3]) for i in range(len(written) - 2)]
        assert len(runs) == len(set(runs))


def test_a_stop_bias_makes_drafts_longer_or_shorter():
    lengths = {bias: sum(len(draw_from(seed, stop_bias=bias)) for seed in range(30)) for bias in (-3.0, 0.0, 3.0)}
    assert lengths[-3.0] > lengths[0.0] > lengths[3.0]


def test_a_penalty_makes_repetition_rarer():
    kinds = {penalty: 0 for penalty in (1.0, 1.5)}
    for penalty in kinds:
        for seed in range(20):
            model = RandomModel(seed)
            written = ids(decode(model, model.prefill(), (), 12, processors=[RepetitionPenalty(penalty)]))
            kinds[penalty] += len(set(written))
    assert kinds[1.5] > kinds[1.0] + 20


def mean_log_probability(seed: int, written: list[int]) -> float:
    model = RandomModel(seed)
    total, logits = 0.0, model.prefill()
    for token in written:
        total += float(logits[token] - np.log(np.exp(logits.astype(np.float64)).sum()))
        logits = model.append([token])[-1]
    return total / len(written)


def test_beams_find_likelier_reports_than_greedy():
    gains = []
    for seed in range(20):
        model = RandomModel(seed)
        found = ids(beam_search(model, model.prefill(), STOP, 12, 4))
        assert len(found) <= 12 and 0 not in found[:-1]
        gains.append(mean_log_probability(seed, found) - mean_log_probability(seed, write_greedily(seed, 12)))
    assert np.mean(gains) > 0


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"beams": 99},
        {"beams": 2, "temperature": 1},
        {"no_repeat": -1},
    ],
)
def test_settings_out_of_range_are_refused_by_name(values: dict[str, float]):
    with pytest.raises(ContextError, match=next(iter(values))):
        Decoding(**values)


def test_a_token_comes_with_its_probability():
    model = RandomModel(3)
    logits = model.prefill().astype(np.float64)
    token = next(decode(model, logits, STOP, 5))
    assert token.probability == pytest.approx(np.exp(logits).max() / np.exp(logits).sum())
    plain = list(decode(RandomModel(3), logits, STOP, 20))
    ahead = list(decode(RandomModel(3), logits, STOP, 20, guesser=Phrasebook.compile([ids(plain)] * 2)))
    assert [t.probability for t in ahead] == pytest.approx([t.probability for t in plain])


def test_a_length_is_chosen_while_another_thread_learns_a_new_one():
    class Growing(dict):
        def values(self):
            self[len(self)] = 1.0
            return super().values()

    length = GuessLength()
    length._seconds = Growing({0: 1.0, 1: 1.0})
    assert length.choose() == 32  # the most, as long as more guesses cost nothing
