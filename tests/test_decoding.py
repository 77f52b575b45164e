import numpy as np

from cbedge.decoding import greedy


class Counting:
    """After token n comes token n + 1."""

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        return np.eye(10, dtype=np.float32)[0]

    def step(self, token_id: int) -> np.ndarray:
        return np.eye(10, dtype=np.float32)[token_id + 1]


def start() -> tuple[Counting, np.ndarray]:
    decoder = Counting()
    return decoder, decoder.prefill(np.zeros((1, 1, 1)))


def test_greedy_follows_the_likeliest_token_up_to_the_stop():
    assert list(greedy(*start(), stop_ids=(4,), max_new_tokens=9)) == [0, 1, 2, 3, 4]


def test_greedy_ends_at_the_limit():
    assert list(greedy(*start(), stop_ids=(9,), max_new_tokens=3)) == [0, 1, 2]
