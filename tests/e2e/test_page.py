"""The page that cbedge serve shows, in a real browser. Needs a Chromium and the package playwright."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEFAULT_BUNDLE, EXAMPLES, needs_default_model, served

from cbedge import ReportGenerator

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.interop, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def address(tiny_bundle: Path) -> Iterator[str]:
    with served(tiny_bundle, subprocess.DEVNULL) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[object]:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)  # knows nothing of the others
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert not faults
    assert all(url.startswith((address, "blob:", "data:")) for url in asked)


def test_a_radiograph_is_drafted_shown_with_its_map_and_edited(page, tiny_bundle: Path):
    page.set_input_files("#file", str(EXAMPLES / "chest_pa.png"))
    page.fill("#indication", "cough")
    page.keyboard.press("Enter")  # from the keyboard alone
    page.wait_for_function("document.getElementById('state').textContent.startsWith('drafted')", timeout=60_000)
    assert page.text_content("#draft")
    report = ReportGenerator.from_pretrained(tiny_bundle, device="cpu").generate(
        EXAMPLES / "chest_pa.png", indication="cough", accept_any_image=True
    )
    assert page.text_content("#unsure") == "\n".join(report.notes())
    answer = json.loads(report.to_json())  # the page shows its rounded scores
    for name, score in answer["finding_scores"].items():
        line = f"{name}{score:.2f} (threshold {answer['finding_thresholds'][name]:.2f})"
        assert line in page.text_content("#findings")
    assert page.locator("#findings tr").count() == 4 and page.locator("#timings tr").count() == 7
    assert page.locator("#map").is_visible() and page.eval_on_selector("#map", "e => e.style.opacity") == "0"
    page.fill("#strength", "60")
    assert page.eval_on_selector("#map", "e => e.style.opacity") == "0.6"
    page.fill("#draft", "corrected")
    assert page.text_content("#draft") == "corrected"


def test_a_lateral_radiograph_joins_and_does_not_stay_for_the_next_study(page, chest_png: Path):
    page.set_input_files("#file", str(EXAMPLES / "chest_pa.png"))
    page.wait_for_selector("#lateral")
    page.fill("#indication", "cough")
    page.set_input_files("#lateral", str(EXAMPLES / "chest_pa.png"))
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent.includes('the same image')", timeout=60_000)
    page.set_input_files("#lateral", str(chest_png))
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent.startsWith('drafted')", timeout=60_000)
    page.set_input_files("#file", str(EXAMPLES / "chest_pa.dcm"))
    assert page.eval_on_selector("#lateral", "e => e.files.length") == 0
    assert_empty(page)
    assert page.input_value("#indication") == ""


def assert_empty(page):
    assert page.text_content("#draft") == "" and not page.is_visible("#map") and page.is_disabled("#copy")
    assert page.text_content("#unsure") == page.text_content("#kept") == ""
    assert page.locator("#findings tr").count() == page.locator("#timings tr").count() == 0


def test_a_normal_report_in_the_users_wording_is_kept_to_and_told(page):
    page.set_input_files("#file", str(EXAMPLES / "chest_pa.png"))
    page.click("#wording summary")
    page.fill("#template", "FINDINGS: The heart is normal. IMPRESSION: Nothing acute.")
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent.startsWith('drafted')", timeout=60_000)
    assert page.text_content("#kept").startswith("Follows your template: FINDINGS: The heart is normal.")
    page.fill("#template", "IMPRESSION: Nothing acute.")
    page.click("#go")
    page.wait_for_selector("#state.bad")
    assert "no findings" in page.text_content("#state")


def test_dicom_is_drafted_and_the_model_card_is_there(page):
    page.set_input_files("#file", str(EXAMPLES / "chest_pa.dcm"))
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent.startsWith('drafted')", timeout=60_000)
    assert page.locator("#map").is_visible()
    assert "tiny" in page.locator("#card").text_content()


def test_what_cannot_be_used_is_said_on_the_page(page, tmp_path: Path):
    (tmp_path / "x.png").write_text("hello")
    page.set_input_files("#file", str(EXAMPLES / "chest_pa.png"))
    page.click("#go")
    page.wait_for_function("document.getElementById('state').textContent.startsWith('drafted')", timeout=60_000)
    page.set_input_files("#file", str(tmp_path / "x.png"))
    page.click("#go")
    page.wait_for_selector("#state.bad")
    assert "not a supported image" in page.text_content("#state") and page.is_enabled("#go")
    assert_empty(page)


def test_the_page_is_used_by_keyboard_and_names_its_parts(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "drop"
    for name in ("Radiograph", "Draft"):
        assert page.get_by_role("region", name=name).count() == 1
    assert page.get_by_label("Indication").count() == 1


@needs_default_model
def test_sentences_that_are_not_assessed_are_grey_with_a_legend(browser: Any):
    with served(DEFAULT_BUNDLE, subprocess.DEVNULL) as (address, _):
        page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page.goto(address)
        page.set_input_files("#file", str(EXAMPLES / "chest_pa.png"))
        page.fill("#indication", "cough")
        page.click("#go")
        page.wait_for_function("document.getElementById('state').textContent.startsWith('drafted')", timeout=60_000)
        grey, shown = page.locator("#draft .unassessed"), page.text_content("#draft")
        assert grey.count() == shown.count("*") > 0
        assert all(text.endswith(".*") for text in grey.all_text_contents())
        body, sentence = (page.eval_on_selector(s, "e => getComputedStyle(e).color") for s in ("#draft", ".unassessed"))
        assert body != sentence
        assert "\n\nIMPRESSION:" in shown and page.is_visible("#grey")
        assert "Not assessed: " in page.text_content("#unsure")
        page.set_input_files("#file", str(EXAMPLES / "chest_pa.dcm"))
        assert page.text_content("#draft") == "" and not page.is_visible("#grey")
        page.close()
