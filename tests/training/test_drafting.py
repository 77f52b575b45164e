"""What is scored in training is what ships: drafts of a run and of its bundle."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cbedge import ReportGenerator
from cbedge.drafting.templates import BUCKETS, Templates
from training.base import ModelAndTokenizers
from training.controls import own
from training.datasets import open_studies
from training.drafting import Drafter, Request, TorchDrafter
from training.run_bundle import ReportResources
from training.trained import checkpoint_of, load_adapted

TEMPLATE = "FINDINGS: The heart is normal in size. The lungs are clear. IMPRESSION: No acute disease."


@pytest.fixture(scope="module")
def parts(tiny_run: Path) -> ModelAndTokenizers:
    """The run, its adapters not merged, with thresholds that no score is near, so that some studies have findings."""
    parts = load_adapted(checkpoint_of(tiny_run), [tiny_run], tiny_run)
    head = parts.finding_head
    assert head is not None
    thresholds = (0.0, 0.0, *(1.0,) * (len(head.findings.names) - 2))
    return replace(parts, finding_head=replace(head, findings=replace(head.findings, thresholds=thresholds)))


@pytest.fixture(scope="module")
def requests(tiny_data: Path) -> list[Request]:
    requests = own(open_studies(tiny_data, ("test",)))
    assert {request.lateral is None for request in requests} == {True, False}
    return requests


def draft(drafter: Drafter, requests: list[Request]) -> list[str]:
    return drafter.draft(requests, lambda count: None)


@pytest.mark.parametrize("has_findings", [True, False], ids=["findings", "no findings"])
@pytest.mark.parametrize("has_template", [True, False], ids=["template", "no template"])
def test_a_run_drafts_letter_for_letter_what_its_fp32_bundle_drafts(
    parts: ModelAndTokenizers,
    requests: list[Request],
    tiny_bundle: Path,
    tiny_data: Path,
    has_template: bool,
    has_findings: bool,
):
    gate = 0.0 if has_findings else 1.0
    head = parts.finding_head
    findings = replace(head.findings, thresholds=(gate, *head.findings.thresholds[1:]))
    parts = replace(parts, finding_head=replace(head, findings=findings))
    templates = Templates([TEMPLATE], np.zeros((BUCKETS, 1), np.float32), np.zeros(1, np.float32))
    templates = templates if has_template else None
    generator = ReportGenerator.from_pretrained(tiny_bundle, "fp32", "cpu")
    shipped = replace(generator.bundle.manifest.image_findings, thresholds=findings.thresholds)
    generator.bundle = replace(generator.bundle, manifest=replace(generator.bundle.manifest, image_findings=shipped))
    generator.resources.templates = templates
    run = TorchDrafter(parts, resources=replace(ReportResources.learn(parts, tiny_data), templates=templates))
    ours, theirs = draft(Drafter(generator, "bundle"), requests), draft(run, requests)
    assert theirs == ours and all(ours)
    if has_template and not has_findings:
        assert {*theirs} == {TEMPLATE}
    if has_findings:
        assert all("The heart is enlarged." in text for text in theirs)
    assert (draft(run.freely(), requests) == theirs) is not has_template


def test_the_phrasebook_of_a_run_changes_no_draft(parts: ModelAndTokenizers, requests: list[Request], tiny_data: Path):
    whole = ReportResources.learn(parts, tiny_data)
    assert whole.phrasebook
    guessing, plain = (TorchDrafter(parts, resources=one) for one in (whole, replace(whole, phrasebook=None)))
    assert draft(guessing, requests) == draft(plain, requests)


def test_an_image_blind_run_reads_no_image(parts: ModelAndTokenizers, requests: list[Request], tmp_path: Path):
    blind = TorchDrafter(parts, image_blind=True)
    missing = [replace(request, image=tmp_path / "none.png", lateral=tmp_path / "none.png") for request in requests]
    assert draft(blind, requests) == draft(blind, missing) != draft(TorchDrafter(parts), requests)
