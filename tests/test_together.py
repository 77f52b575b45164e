from dataclasses import replace
from pathlib import Path

import pytest
from conftest import EXAMPLES, draw_chest, needs_default_model
from PIL import Image

from cbedge import ContextError, RadiographError, ReportGenerator, batch
from cbedge.decoding import Decoding


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path) -> ReportGenerator:
    return ReportGenerator.from_pretrained(tiny_bundle, "fp32", "cpu")


PLAIN = Decoding(speculative=False)  # else they are written one after another


def requests(lengths: list[int]) -> list[dict]:
    return [
        {"image": draw_chest(n), "indication": "cough " * n or None, "max_new_tokens": length, "accept_any_image": True,
         "decoding": PLAIN}
        for n, length in enumerate(lengths)
    ]  # fmt: skip


def test_each_draft_is_what_it_is_alone_whenever_the_others_end(generator: ReportGenerator):
    wanted = requests([12, 1, 3, 20, 7, 2])
    together = generator.generate_many(wanted)
    assert [r.text for r in together] == [generator.generate(**request).text for request in wanted]
    assert [r.new_tokens for r in together] == [generator.generate(**request).new_tokens for request in wanted]


@needs_default_model
def test_guided_and_opened_drafts_are_written_together_too():
    generator = ReportGenerator.from_pretrained(device="cpu")
    how = replace(generator.decoding, speculative=False)
    image = EXAMPLES / "chest_pa.png"
    wanted = [{"image": image, "indication": text, "decoding": how} for text in ("cough", None, "trauma")]
    together = generator.generate_many(wanted)
    for report, request in zip(together, wanted, strict=True):
        alone = generator.generate(**request)
        assert report.findings.split(". ")[0] == alone.findings.split(". ")[0]
        assert report.image_findings == alone.image_findings and report.complete


@needs_default_model
def test_drafts_that_are_guessed_ahead_are_written_one_after_another():
    generator = ReportGenerator.from_pretrained(device="cpu")
    wanted = [{"image": EXAMPLES / "chest_pa.png", "indication": text} for text in ("cough", "trauma")]
    for report, request in zip(generator.generate_many(wanted), wanted, strict=True):
        assert report.passes > 0 and report.text == generator.generate(**request).text


def test_what_cannot_be_drafted_is_told_in_its_place_and_stops_no_other(generator: ReportGenerator, tmp_path: Path):
    bad = tmp_path / "bad.png"
    bad.write_text("hello")
    wanted = requests([5, 5, 5])
    wanted[1]["image"] = bad
    first, second, third = generator.generate_many(wanted)
    assert isinstance(second, RadiographError)
    assert [r.text for r in (first, third)] == [generator.generate(**wanted[i]).text for i in (0, 2)]
    assert generator.generate_many([]) == []


def test_what_is_many_drafts_already_is_refused(generator: ReportGenerator):
    with pytest.raises(ContextError, match="beams"):
        generator.generate_many([{"image": draw_chest(0), "decoding": Decoding(beams=2)}] * 2)
    with pytest.raises(ContextError, match="64"):
        generator.generate_many(requests([1] * 65))


def test_a_batch_drafts_some_at_a_time_and_loses_none(generator: ReportGenerator, tmp_path: Path):
    for number in range(5):
        Image.fromarray(draw_chest(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("hello")
    items = batch.find_items(str(tmp_path))
    written = {}
    for together in (1, 2):
        out = tmp_path / f"{together}.jsonl"
        tally = batch.run_batch(items, out, "tiny", batch.local_engine(generator, 6, True, together))
        assert tally.written == 4 and [name for name, _ in tally.failed] == ["2.png"]
        written[together] = {line["id"]: line.get("text") for line in batch.read_lines(out)}
    assert written[1] == written[2] and len(written[1]) == 5
