import asyncio
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import EXAMPLES, USUAL_VARIANT, draw_chest, draw_lateral, needs_default_model
from PIL import Image

from cbedge import (
    BundleError,
    ContextError,
    DeviceError,
    DraftError,
    RadiographError,
    Report,
    ReportGenerator,
    load_radiograph,
)
from cbedge.backends import provider as backend
from cbedge.backends.ort_cuda import CudaDecoder
from cbedge.backends.ort_decoder import OnnxDecoder
from cbedge.decoding import Decoding
from cbedge.decoding.phrasebook import Phrasebook
from cbedge.drafting.plan import plan_draft
from cbedge.drafting.template_parser import parse_template
from cbedge.drafting.templates import Templates
from cbedge.findings.image_findings import ImageFindings
from cbedge.findings.reading import ImageReading
from cbedge.prompt import ClinicalContext


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path) -> ReportGenerator:
    return ReportGenerator.from_pretrained(tiny_bundle, device="cpu")


def test_the_same_radiograph_gives_the_same_draft(generator: ReportGenerator, chest_png: Path):
    first = generator.generate(chest_png, indication="cough", max_new_tokens=12)
    again = generator.generate(Image.open(chest_png), indication="cough", max_new_tokens=12)
    assert first.text == again.text
    assert first.new_tokens <= 12 and first.prompt_tokens > 20
    assert first.model == "tiny" and first.variant == USUAL_VARIANT and first.device == "cpu"
    assert "draft" in first.statement


def test_threads_share_one_generator(generator: ReportGenerator):
    films = [draw_chest(seed) for seed in range(8)]
    alone = [generator.generate(film, max_new_tokens=12).text for film in films]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda film: generator.generate(film, max_new_tokens=12).text, films * 3))
    assert together == alone * 3


def test_an_event_loop_goes_on_while_a_draft_is_written_and_can_cancel_it(generator: ReportGenerator, chest_png: Path):
    async def draft() -> tuple[str, str, int]:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0.001)

        heart = asyncio.create_task(beat())
        report = await generator.generate_async(chest_png, indication="cough", max_new_tokens=40)
        stream = generator.stream(chest_png, indication="cough", max_new_tokens=40)
        pieces = "".join([piece async for piece in stream])
        given_up = asyncio.create_task(generator.generate_async(chest_png, max_new_tokens=500))
        await asyncio.sleep(0.01)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        heart.cancel()
        return report.text, pieces.strip(), beats

    text, pieces, beats = asyncio.run(draft())
    assert text == pieces == generator.generate(chest_png, indication="cough", max_new_tokens=40).text
    assert beats > 3


def test_the_stream_is_the_report(generator: ReportGenerator, chest_png: Path):
    stream = generator.stream(chest_png, max_new_tokens=12)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = stream.report
    assert "".join(stream).strip() == stream.report.text == generator.generate(chest_png, max_new_tokens=12).text


def test_stages_add_up_to_the_whole(generator: ReportGenerator, chest_png: Path):
    t = generator.generate(load_radiograph(chest_png), max_new_tokens=4).timings
    assert t.read + t.vision + t.qformer + t.prefill + t.decode == pytest.approx(t.total)
    assert min(t.vision, t.qformer, t.prefill, t.decode) > 0


def test_json_holds_what_an_integrator_needs(generator: ReportGenerator, chest_png: Path):
    told = json.loads(generator.generate(chest_png, max_new_tokens=4).to_json())
    assert {
        "findings",
        "impression",
        "model",
        "model_version",
        "variant",
        "device",
        "image_sha256",
        "prompt_tokens",
        "new_tokens",
        "timings_ms",
        "statement",
        "complete",
    } <= set(told)
    assert set(told["timings_ms"]) == {"read", "vision", "qformer", "prefill", "decode", "total"}


def test_bad_input_is_refused_before_the_model_runs(generator: ReportGenerator, chest_png: Path, tmp_path: Path):
    with pytest.raises(RadiographError, match="no such file"):
        generator.stream(tmp_path / "none.png")
    for count in (0, 5000, "5", 2.5, True):
        with pytest.raises(ContextError, match="max_new_tokens"):
            generator.stream(chest_png, max_new_tokens=count)  # type: ignore[arg-type]
    for decoding in ({"beam": 2}, "greedy", {"temperature": "hot"}):
        with pytest.raises(ContextError):
            generator.stream(chest_png, decoding=decoding)  # type: ignore[arg-type]


def test_settings_may_come_as_a_mapping(generator: ReportGenerator, chest_png: Path):
    plain = generator.generate(chest_png, max_new_tokens=8)
    assert generator.generate(chest_png, max_new_tokens=8, decoding={}).text == plain.text  # type: ignore[arg-type]


def test_a_context_that_says_nothing_is_left_out_and_noted(generator: ReportGenerator, chest_png: Path):
    told = generator.generate(chest_png, indication="n/a", comparison="-", max_new_tokens=8)
    plain = generator.generate(chest_png, max_new_tokens=8)
    assert told.text == plain.text and told.indication_source is None and plain.warnings == ()
    assert told.warnings == (
        "The indication has no content and was ignored.",
        "The comparison has no content and was ignored.",
    )


needs_real_data = pytest.mark.skipif(
    "CBEDGE_IU_XRAY" not in os.environ, reason="set CBEDGE_IU_XRAY to the folder of IU X-RAY"
)


def real_studies(count: int) -> list:
    from training.datasets.iu_xray import read_studies

    return read_studies(Path(os.environ["CBEDGE_IU_XRAY"]), ("val",))[:count]


def seeing(generator: ReportGenerator, least: float) -> ReportGenerator:
    """The same, seeing what reaches a score: 0 is everything, 1 nothing. A random model's scores lie on its own
    thresholds, on either side by chance."""
    findings = findings_of(generator)
    findings = replace(findings, thresholds=(least,) * len(findings.thresholds))
    other = copy(generator)
    other.bundle = replace(generator.bundle, manifest=replace(generator.bundle.manifest, image_findings=findings))
    return other


def test_a_lateral_radiograph_joins_the_frontal_one(generator: ReportGenerator):
    generator = seeing(generator, 1.0)
    films = [draw_chest(0), draw_lateral(0)]
    alone = generator.generate(films[0], indication="cough", max_new_tokens=12)
    both = generator.generate(films[0], indication="cough", lateral=films[1], max_new_tokens=12)
    assert alone.lateral_sha256 is None and both.lateral_sha256 == load_radiograph(films[1]).sha256
    assert both.prompt_tokens >= alone.prompt_tokens + generator.bundle.manifest.shapes.num_query_tokens
    assert both.image_sha256 == alone.image_sha256 and both.finding_scores != alone.finding_scores
    assert json.loads(both.to_json())["lateral_sha256"] == both.lateral_sha256
    request = {"image": films[0], "indication": "cough", "max_new_tokens": 12}
    many = generator.generate_many([request, request | {"lateral": films[1]}, {"image": b"no image"}])
    assert [report.text for report in many[:2]] == [alone.text, both.text] and isinstance(many[2], RadiographError)


def test_a_draft_keeps_to_the_template_that_is_given_or_usual(generator: ReportGenerator, chest_png: Path):
    own = "The spleen is tiny. The lungs are clear. IMPRESSION: Tiny spleen."
    given = generator.generate(chest_png, template=own, max_new_tokens=160)
    assert given.template == f"FINDINGS: {own}" and given.template_source == "given"
    assert "The spleen is tiny." in given.findings
    plain = replace(generator.decoding, speculative=False)
    assert generator.generate(chest_png, template=own, max_new_tokens=160, decoding=plain).text == given.text
    house = copy(generator)
    house.keep_to(own)
    assert house.generate(chest_png, max_new_tokens=160).text == given.text
    assert "spleen" not in house.generate(chest_png, template="Lungs are clear.", max_new_tokens=160).text


def test_what_a_template_loses_is_a_warning_of_each_draft(generator: ReportGenerator, chest_png: Path):
    template = "The lungs are clear.\nIMPRESSION: Normal chest.\nSigned by Jo Smith"
    house = copy(generator)
    house.keep_to(template)
    for report in (generator.generate(chest_png, template=template), house.generate(chest_png)):
        assert "Line 3 of the template has what looks like a signature: this sentence was left out." in report.warnings
        assert "Smith" not in report.to_json()


@pytest.mark.parametrize(
    "template",
    [
        "النتائج: القلب طبيعي. الرئتان صافيتان.",
        "ממצאים: הלב תקין.\nרושם: תקין.",
        "所見：心拡大なし。胸水なし。\n印象：異常なし。",
    ],
)
def test_a_template_in_another_script_is_refused(generator: ReportGenerator, template: str):
    with pytest.raises(ContextError, match="the template is in another language, whose script drafts do not support"):
        copy(generator).keep_to(template)


@pytest.mark.parametrize("abnormal", [False, True])
def test_the_usual_template_is_kept_to_where_nothing_abnormal_is_seen(
    generator: ReportGenerator, chest_png: Path, abnormal: bool
):
    told = seeing(generator, 0.0 if abnormal else 1.0)
    usual = told.generate(chest_png, max_new_tokens=40)
    free = replace(told.decoding, keep_to_template=False)
    freely = told.generate(chest_png, max_new_tokens=40, decoding=free)
    assert freely.template is freely.template_source is None
    assert json.loads(usual.to_json())["template"] == usual.template
    if abnormal:
        assert usual.template is usual.template_source is None and usual.findings == freely.findings
        return
    assert told.resources.templates is not None and usual.template in told.resources.templates.texts
    assert usual.template_source == "model" and usual.text != freely.text


def test_what_is_seen_takes_its_sentences_out_of_the_template(generator: ReportGenerator):
    template = "FINDINGS: The heart is normal. Ribs are intact. IMPRESSION: No pneumothorax."
    patterns = {"cardiomegaly": "heart.*normal", "effusion": "ribs.*intact|no pneumothorax"}
    denials = tuple(((patterns[name],) if name in patterns else ()) for name in findings_of(generator).names)
    told = copy(generator)
    told.bundle = replace(
        generator.bundle,
        manifest=replace(generator.bundle.manifest, image_findings=replace(findings_of(generator), denials=denials)),
    )

    def planned(present: tuple[str, ...], usual: bool = False) -> tuple[str, tuple[str, ...]]:
        resources = copy(generator.resources)
        resources.templates = Templates([template], np.zeros((8, 1), np.float32), np.zeros(1, np.float32))
        scores = {name: 0.9 for name in present}
        reading = ImageReading(np.zeros((1, 1, 1), np.float32), present, scores, np.zeros(1, np.float32))
        given = None if usual else parse_template(template)
        plan = plan_draft(reading, ClinicalContext(), Decoding(), told.bundle.manifest, resources, given)
        begun = plan.opening_ids
        return resources.codec.decode([*begun, *plan.constraint.forced(begun)]), plan.warnings

    assert planned(()) == (template, ())
    large = "The heart is enlarged."
    text, warnings = planned(("cardiomegaly",))
    assert text == f"FINDINGS: {large} Ribs are intact. IMPRESSION: {large} No pneumothorax."
    assert len(warnings) == 1 and "'The heart is normal.'" in warnings[0] and "cardiomegaly" in warnings[0]
    text, warnings = planned(("cardiomegaly", "effusion"))
    assert text == f"FINDINGS: {large} There is a pleural effusion.", (
        "all of the template's findings are contradicted: the model writes them"
    )
    assert all("effusion" in warning for warning in warnings[1:]) and len(warnings) == 3
    text, warnings = planned(("cardiomegaly", "device"))
    assert text.endswith(f"IMPRESSION: {large} No pneumothorax."), "a device alone takes no conclusion away"
    text, _ = planned(("cardiomegaly",), usual=True)
    assert text == f"FINDINGS: {large}", "the findings are the language model's"
    text, _ = planned(("effusion",))
    effusion = "There is a pleural effusion."
    assert text == f"FINDINGS: {effusion} The heart is normal. IMPRESSION: {effusion}"


def test_a_template_without_an_impression_gets_one_that_the_scores_support(generator: ReportGenerator):
    manifest, names = generator.bundle.manifest, findings_of(generator).names

    def conclusion(present: tuple[str, ...], template: str | None) -> list[tuple[str, str | None]]:
        reading = ImageReading(np.zeros((1, 1, 1), np.float32), present, dict.fromkeys(names, 0.9), np.zeros(1))
        given = None if template is None else parse_template(template)
        plan = plan_draft(reading, ClinicalContext(), Decoding(), manifest, generator.resources, given)
        assert plan.supported == (None if given is None else {*present})
        return [(token.piece.strip(), token.finding) for token in plan.conclusion]

    template = "FINDINGS: There is no effusion."
    assert conclusion(("cardiomegaly",), template) == [("The heart is enlarged.", "cardiomegaly")]
    assert conclusion(("other abnormality",), template) == [("Abnormal chest radiograph.", names[0])]
    assert conclusion((), template) == conclusion(("other abnormality",), None) == []


def findings_of(generator: ReportGenerator) -> ImageFindings:
    assert generator.bundle.manifest.image_findings is not None
    return generator.bundle.manifest.image_findings


def test_a_template_is_refused_where_nothing_says_what_it_must_not_hide(generator: ReportGenerator, chest_png: Path):
    blind = copy(generator)
    blind.bundle = replace(generator.bundle, manifest=replace(generator.bundle.manifest, image_findings=None))
    with pytest.raises(ContextError, match="template"):
        blind.generate(chest_png, template="Lungs are clear.")
    with pytest.raises(ContextError, match="no findings"):
        generator.generate(chest_png, template="IMPRESSION: Normal.")


def test_two_radiographs_that_are_no_frontal_and_lateral_one_of_a_study_are_refused(generator: ReportGenerator):
    frontal, lateral = (
        replace(load_radiograph(film), view=view, study_uid="1.2.3")
        for film, view in ((draw_chest(0), "frontal"), (draw_lateral(0), "lateral"))
    )
    for first, second, view, told in (
        (lateral, frontal, None, "first radiograph is a lateral view"),
        (frontal, lateral, "lateral", "first radiograph is a lateral view"),
        (frontal, replace(lateral, view="frontal"), None, "lateral radiograph is a frontal view"),
        (frontal, replace(lateral, sha256=frontal.sha256), None, "same image"),
        (frontal, replace(lateral, study_uid="1.2.4"), None, "different Study Instance UIDs"),
    ):
        with pytest.raises(RadiographError, match=told) as caught:
            generator.stream(first, lateral=second, view=view)
        assert "1.2." not in str(caught.value)
    with pytest.raises(RadiographError, match="no such file"):
        generator.stream(frontal, lateral="none.png")
    one_view = copy(generator)
    one_view.bundle = replace(generator.bundle, manifest=replace(generator.bundle.manifest, reads_lateral=False))
    with pytest.raises(ContextError, match="cannot read a lateral radiograph: leave it out"):
        one_view.stream(frontal, lateral=lateral)


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="there is no GPU")
def test_a_gpu_drafts_what_the_cpu_drafts(tiny_bundle: Path, chest_png: Path):
    on_gpu, on_cpu = (
        ReportGenerator.from_pretrained(tiny_bundle, "fp32", device).generate(chest_png) for device in ("cuda", "cpu")
    )
    assert (on_gpu.device, on_gpu.text, on_gpu.new_tokens) == ("cuda", on_cpu.text, on_cpu.new_tokens)
    assert on_gpu.finding_scores == pytest.approx(on_cpu.finding_scores, abs=0.01)


def test_fp32_and_int4_of_one_bundle_both_run(tiny_bundle: Path, chest_png: Path):
    exact = ReportGenerator.from_pretrained(tiny_bundle, variant="fp32", device="cpu")
    assert exact.generate(chest_png, max_new_tokens=4).variant == "fp32"
    with pytest.raises(BundleError, match="unknown variant"):
        ReportGenerator.from_pretrained(tiny_bundle, variant="int3")


def test_cuda_is_never_replaced_silently(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is built for CUDA")
    with pytest.raises(DeviceError, match=r"cbedge\[gpu\]"):
        ReportGenerator.from_pretrained(tiny_bundle, device="cuda")
    with pytest.raises(DeviceError, match="auto, cpu, cuda"):
        ReportGenerator.from_pretrained(tiny_bundle, device="tpu")
    # A CUDA build whose libraries do not load gives a session on the CPU: that is refused too.
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(DeviceError, match="nvidia-smi"):
        ReportGenerator.from_pretrained(tiny_bundle, device="cuda")


@pytest.mark.parametrize(
    ("installed", "told"), [((), "not installed"), (("onnxruntime", "onnxruntime-gpu"), "both installed")]
)
def test_exactly_one_onnx_runtime_is_wanted(installed: tuple, told: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "is_installed", lambda name: name in installed)
    with pytest.raises(DeviceError, match=told) as caught:
        backend.check_runtime()
    assert "pip install" in str(caught.value)


@needs_default_model
def test_the_embedded_model_drafts_a_report_of_the_example():
    generator = ReportGenerator.from_pretrained(device="cpu")
    report = generator.generate(EXAMPLES / "chest_pa.png", indication="cough")
    assert report.complete
    assert len(report.findings.split()) >= 8 and report.impression
    assert "XXX" not in report.text and "<|" not in report.text


@needs_default_model
def test_the_embedded_model_answers_without_priors_and_to_noise():
    generator = ReportGenerator.from_pretrained(device="cpu")
    assert generator.generate(EXAMPLES / "chest_pa.png").findings
    noise = np.random.default_rng(0).random((300, 300)).astype(np.float32)
    assert isinstance(generator.generate(noise, max_new_tokens=8, accept_any_image=True).text, str)


def test_guessing_ahead_and_one_token_a_pass_write_the_same(generator: ReportGenerator):
    assert generator.resources.phrasebook is not None and len(generator.resources.phrasebook) > 0

    def draft(writer: ReportGenerator, seed: int, speculative: bool) -> Report:
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 64)).astype(np.uint8)
        how = Decoding(speculative=speculative)
        return writer.generate(pixels, indication=f"case {seed}", max_new_tokens=40, decoding=how)

    alone = [draft(generator, seed, False) for seed in range(12)]
    knowing = copy(generator)  # a random model writes what no report holds: its own drafts are its phrases
    knowing.resources = copy(generator.resources)
    tokens = [generator.resources.codec.encode(report.text) for report in alone]
    knowing.resources.phrasebook = Phrasebook.compile([ids for ids in tokens for _ in range(2)])
    for writer in (generator, knowing):
        ahead = [draft(writer, seed, True) for seed in range(12)]
        assert [(r.text, r.new_tokens) for r in ahead] == [(r.text, r.new_tokens) for r in alone]
    assert sum(r.guessed_tokens for r in ahead) > 0 and sum(r.guessed_tokens for r in alone) == 0


@pytest.fixture(scope="module", params=[OnnxDecoder, CudaDecoder])
def exact_generator(tiny_bundle: Path, request: pytest.FixtureRequest) -> ReportGenerator:
    """In fp32: with activations rounded to 8 bits, logits hang on how many rows a processor's kernel takes at once.

    What CUDA's decoder does on a GPU it also does on a CPU, but for the recording of its passes.
    """
    generator = ReportGenerator.from_pretrained(tiny_bundle, "fp32", device="cpu")
    generator.backend.new_decoder = lambda capacity: request.param(generator.backend, capacity)  # type: ignore[method-assign]
    return generator


def test_a_decoder_forgets_and_goes_on_with_many_drafts_at_once(exact_generator: ReportGenerator):
    generator = exact_generator
    embeds = np.random.default_rng(0).standard_normal((1, 5, generator.bundle.manifest.shapes.hidden_size))
    decoder = generator.backend.new_decoder(12)
    decoder.prefill(embeds)
    first = decoder.append([7, 8, 9]).copy()
    decoder.rewind(6)
    pair = decoder.fork([0, 0])
    assert np.allclose(decoder.append([8]), first[1:2], atol=1e-4)
    assert np.allclose(pair.step([5, 8])[1], first[1], atol=1e-4)
    four = pair.fork([1, 0, 1, 1])
    assert np.allclose(four.step([9, 9, 5, 9])[[0, 3]], first[2], atol=1e-4)
    assert np.allclose(decoder.append([9]), first[2:], atol=1e-4)
    with pytest.raises(ValueError, match="exceed the decoder"):
        decoder.append([1] * 8)


def test_reports_one_after_another_are_written_in_the_same_memory(tiny_bundle: Path, chest_png: Path):
    usual, reused = (ReportGenerator.from_pretrained(tiny_bundle, "fp32", device="cpu") for _ in range(2))
    backend = reused.backend
    backend.new_decoder = lambda capacity: CudaDecoder(backend, capacity)  # type: ignore[method-assign]
    for how in ({}, {"decoding": Decoding(beams=3)}, {"decoding": Decoding(speculative=False)}, {}):
        for indication in ("cough", "chest pain after a fall"):
            reports = [g.generate(chest_png, indication=indication, max_new_tokens=20, **how) for g in (usual, reused)]
            assert reports[0].text == reports[1].text
    assert all(len(memories) <= 2 for memories in backend.free_memory.values())


def test_a_gpu_reads_any_number_of_tokens_in_passes_of_few_sizes(tiny_bundle: Path):
    backend = ReportGenerator.from_pretrained(tiny_bundle, "fp32", device="cpu").backend
    embeds = np.random.default_rng(0).standard_normal((1, 5, backend.shapes.hidden_size))
    usual, filled = (kind(backend, 5 + 248) for kind in (OnnxDecoder, CudaDecoder))  # 3 places less than there are
    assert np.allclose(usual.prefill(embeds), filled.prefill(embeds), atol=1e-4)
    tokens = np.random.default_rng(1).integers(4, 200, 248).tolist()
    for count in (1, 2, 3, 4, 5, 7, 12, 17, 20, 33, 40, 1, 60, 30, 12, 1):
        now, tokens = tokens[:count], tokens[count:]
        assert np.allclose(usual.append(now), filled.append(now), atol=1e-4)
        assert usual.length == filled.length
    assert not tokens
    assert {*filled._memory._steps} == {2, 5, 9, 17, 33}


def test_a_draft_holds_no_piece_of_a_character(generator: ReportGenerator):
    broken = [
        i for i in range(generator.backend.vocabulary) if "\ufffd" in generator.resources.codec._tokenizer.decode([i])
    ]
    assert len(broken) >= 128 and {*broken} == {*generator.bundle.manifest.never_ids}
    for seed in range(4):
        for how in (
            Decoding(),
            Decoding(beams=2),
            Decoding(temperature=3.0, seed=seed),
        ):
            how = replace(how, stop_bias=-20)  # what is drawn first could be the stop token
            text = generator.generate(draw_chest(seed), max_new_tokens=24, decoding=how).text
            assert "\ufffd" not in text  # a random model may end no sentence in so few tokens


def test_beams_and_sampling_write_reports(generator: ReportGenerator, chest_png: Path):
    generator = seeing(generator, 1.0)
    beams = generator.generate(chest_png, max_new_tokens=24, decoding=Decoding(beams=3))
    drawn = {
        generator.generate(
            chest_png, max_new_tokens=450, decoding=Decoding(temperature=2.0, seed=seed, keep_to_template=False)
        ).text
        for seed in range(4)
    }
    assert beams.new_tokens <= 24 and len(drawn) > 1 and "" not in drawn


def test_a_sampled_draft_that_ends_before_its_impression_is_an_error_unless_the_user_set_the_limit(
    generator: ReportGenerator, chest_png: Path
):
    short, manifest = copy(generator), generator.bundle.manifest
    limited = replace(manifest, decoding={**manifest.decoding, "max_new_tokens": 4})
    short.bundle = replace(generator.bundle, manifest=limited)
    with pytest.raises(DraftError, match=r"incomplete \(no .*impression\): write this report without a draft"):
        short.generate(chest_png, decoding=Decoding(temperature=5.0, seed=3))
    report = short.generate(chest_png, decoding=Decoding(temperature=5.0, seed=3), max_new_tokens=4)
    assert not report.complete and not report.impression


def test_a_bundle_without_a_phrasebook_works(tiny_bundle: Path, chest_png: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "phrasebook.npy").unlink()
    manifest = json.loads((bundle / "manifest.json").read_text())
    with pytest.raises(BundleError, match=r"phrasebook\.npy is missing"):
        ReportGenerator.from_pretrained(bundle, device="cpu")
    del manifest["files"]["phrasebook.npy"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    bare = Decoding(keep_to_template=False)  # which guesses too
    report = ReportGenerator.from_pretrained(bundle, device="cpu").generate(chest_png, max_new_tokens=4, decoding=bare)
    assert report.guessed_tokens == 0


@pytest.mark.parametrize("variant", ["fp16", "int8", "q4f16", "nf4"])
def test_every_variant_writes_on_the_cpu_too(tiny_bundle: Path, chest_png: Path, variant: str):
    report = ReportGenerator.from_pretrained(tiny_bundle, variant=variant, device="cpu").generate(chest_png)
    assert report.variant == variant and report.new_tokens > 0


@pytest.mark.slow
@needs_default_model
def test_the_embedded_model_writes_the_same_whether_it_guesses_ahead_or_not():
    generator = ReportGenerator.from_pretrained(device="cpu")
    radiograph = load_radiograph(EXAMPLES / "chest_pa.png")
    for indication in (None, "cough", "chest pain", "shortness of breath", "fever", "trauma", "tuberculosis screening"):
        for rotated in (0, 1):
            image = replace(radiograph, pixels=np.roll(radiograph.pixels, 200 * rotated, axis=1))
            plain, ahead = (
                generator.generate(
                    image, indication=indication, decoding=Decoding(speculative=s), accept_any_image=True
                )
                for s in (False, True)
            )
            assert plain.text == ahead.text


@needs_default_model
@needs_real_data
@pytest.mark.parametrize("keep", [True, False], ids=["kept to its template", "freely"])
@pytest.mark.parametrize("variant", [None, "int4"])
def test_guessing_ahead_changes_no_draft_of_200_real_studies(variant: str | None, keep: bool):
    generator = ReportGenerator.from_pretrained(variant=variant, device="cpu", recent_studies=0)
    accepted, differing = 0, []
    for study in real_studies(200):
        plain, ahead = (
            generator.generate(
                study.image,
                indication=study.context.indication,
                comparison=study.context.comparison,
                accept_any_image=True,
                decoding=replace(generator.decoding, speculative=speculative, keep_to_template=keep),
            )
            for speculative in (False, True)
        )
        differing += [study.study_id] if plain.text != ahead.text else []
        accepted += ahead.accepted_tokens
    assert not differing
    assert accepted > 200


@needs_default_model
@needs_real_data
@pytest.mark.parametrize("variant", [None, "int4"])
def test_what_is_kept_changes_no_draft_of_200_real_studies(variant: str | None):
    forgetful, generator = (
        ReportGenerator.from_pretrained(variant=variant, device="cpu", recent_studies=studies) for studies in (0, 1)
    )
    differing = []
    for study in real_studies(200):
        # Without an indication first, as a workstation asks before the order is there.
        generator.generate(study.image, accept_any_image=True)
        request = {"indication": study.context.indication or "cough", "accept_any_image": True}
        fresh, *again = (one.generate(study.image, **request) for one in (forgetful, generator, generator))
        assert all(report.reused_tokens for report in again)
        same = all((r.text, r.sentences) == (fresh.text, fresh.sentences) for r in again)
        differing += [] if same else [study.study_id]
    assert not differing


def test_a_draft_never_goes_on_with_what_contradicts_its_opening():
    generator = ReportGenerator.from_pretrained(device="cpu", variant="int4", recent_studies=0)
    findings = generator.bundle.manifest.image_findings
    assert findings is not None and len(findings.denials) == len(findings.names)
    count = len(findings.names)

    def draft(denial: str) -> Report:
        changed = replace(
            findings,
            thresholds=(0.0,) * count,
            openings=("There it is.",) * count,
            denials=((denial,) if denial else (),) * count,
        )
        copied = copy(generator)
        copied.bundle = replace(generator.bundle, manifest=replace(generator.bundle.manifest, image_findings=changed))
        return copied.generate(draw_chest(0), indication="cough", accept_any_image=True)

    whole, opened = draft("(?!)"), draft(".")
    assert opened.text == "FINDINGS: There it is. IMPRESSION: There it is."
    assert whole.findings.startswith("There it is. ") and len(whole.text) > len(opened.text)
    assert whole.text == draft("").text
