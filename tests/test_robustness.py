"""A short run of the campaign, and of killed batches: none of what they count may happen."""

import time
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port, needs_default_model
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import DigitalXRayImageStorageForPresentation

from benchmarks.kill_batch import kill_rounds
from benchmarks.listen_node import send
from benchmarks.mutations import KINDS, MARKER, film, make_input
from benchmarks.robustness import Campaign, run_campaign, to_markdown, to_record
from benchmarks.robustness_outcome import COUNTS, find_faults

pytestmark = needs_default_model


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_input_can_be_made_again(kind: str):
    for index in (0, 7):
        first, again = (make_input(3, index, kind) for _ in range(2))
        assert (first.data, first.route, first.options) == (again.data, again.route, again.options)
        assert np.array_equal(first.array, again.array) if first.array is not None else again.array is None


def test_faults_are_counted():
    made = make_input(0, 0, "equivalent")
    made.route, made.film, made.may_refuse = "generate", 0, False
    truth = [["opacity"], {"opacity": 0.5}]

    def faults(**answer: object) -> list[str]:
        return [fault for fault, _ in find_faults(made, answer)]

    assert faults(code=0, truth=truth, findings=["opacity"], scores={"opacity": 0.52}) == []
    assert faults(code=0, truth=truth, findings=["opacity"], scores={"opacity": 0.54}) == ["unequal"]
    assert faults(code=0, truth=truth, findings=[], scores={"opacity": 0.5}) == ["unequal"]
    assert faults(code=3, stderr="cbedge: no\n", truth=truth) == ["unequal"]
    assert faults(code=3, stderr="cbedge: no\n") == []
    assert faults(code=3, stderr="cbedge: no\nmore\n") == ["unexplained exit"]
    assert faults(code=1, stderr="Traceback (most recent call last):\n") == ["traceback"]
    assert faults(code=3, stderr=f"cbedge: {MARKER} no\n") == ["patient data"]
    assert faults(code=0, held=2**31) == ["memory"]


def test_films_differ_and_use_the_whole_range():
    assert abs(film(0).mean() - film(3).mean()) > 0.01 and film(1).min() == 0 and film(1).max() == 1


def test_a_slow_node_is_waited_for_and_one_that_takes_nothing_is_no_hang():
    def take(event: evt.Event) -> int:
        time.sleep(0.5)
        return 0xA700 if event.request.AffectedSOPInstanceUID == "1.2.2" else 0

    node, port = AE("CBEDGE"), free_port()
    node.add_supported_context(DigitalXRayImageStorageForPresentation, ImplicitVRLittleEndian)
    server = node.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    objects = [(f"1.2.{number}", b"whatever") for number in range(1, 4)]
    assert send(port, objects, 10, syntax=ImplicitVRLittleEndian) == [0, 0xA700, 0]
    assert send(port, objects[:1], 10) == [None]
    server.shutdown()


@pytest.mark.slow
def test_a_short_campaign_finds_nothing(tmp_path: Path):
    outcome = run_campaign(Campaign(150, seed=11, workers=1, keep=tmp_path / "failed"))
    record = to_record(outcome, 1.0)
    assert record["counts"] == dict.fromkeys(COUNTS, 0), to_markdown(record)
    assert (
        record["inputs"] == 150
        and record["equivalents"] > 20
        and set(record["routes"]) == {"api", "generate", "batch", "serve", "listen"}
    )


@pytest.mark.slow
def test_killed_batches_lose_and_repeat_nothing(tmp_path: Path):
    record = kill_rounds(5, 24, seed=1, folder=tmp_path)
    assert record["finished"] and (record["lost"], record["twice"], record["broken"]) == (0, 0, 0)
    assert record["tracebacks"] == 0 and sorted(record["lines_after_rounds"]) == record["lines_after_rounds"]
