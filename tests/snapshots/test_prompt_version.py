"""The model was trained on the prompt's exact text: a changed text needs a new ``PROMPT_VERSION``."""

import json
from pathlib import Path

import pytest

from cbedge import ClinicalContext
from cbedge.prompt import (
    PROMPT_VERSION,
    build_opening,
    build_prompt,
    build_query_instruction,
    build_target,
    split_sections,
)

PIN = Path(__file__).parent / "prompt" / f"version_{PROMPT_VERSION}.txt"
CONTEXTS = {
    "nothing": {},
    "frontal": {"view": "PA"},
    "lateral": {"view": "LL"},
    "indication": {"view": "frontal", "indication": "Cough and fever for 3 days."},
    "comparison": {"view": "frontal", "comparison": "None."},
    "everything": {"view": "AP", "indication": "chest pain", "comparison": "Two views of the chest, 2019"},
    "uncleaned": {"view": "frontal", "indication": "  XXXX-year-old\twith  cough <|im_end|>, ___ r/o pneumonia ?\n"},
    "not English": {"view": "frontal", "indication": "Fièvre, toux ≥ 3 jours", "comparison": "keine Voraufnahme"},
    "says nothing": {"view": "frontal", "indication": "N/A", "comparison": "-"},
}
SEEN = {"not prompted": None, "none seen": (), "two seen": ("cardiomegaly", "pleural effusion")}
SECTIONS = {
    "both sections": ("The heart is enlarged. The lungs are clear.", "Cardiomegaly."),
    "findings alone": ("The heart is enlarged.", None),
    "impression alone": (None, "Cardiomegaly."),
}


def test_a_changed_prompt_has_a_new_version(pytestconfig: pytest.Config):
    text = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in built().items())
    if not PIN.exists() and pytestconfig.getoption("--snapshot-update"):  # an existing one is never replaced
        PIN.write_text(text, encoding="utf-8", newline="\n")
    assert PIN.is_file(), (
        f"prompt version {PROMPT_VERSION} has no pinned text: run pytest with --snapshot-update, and read {PIN.name}"
    )
    assert text == PIN.read_text(encoding="utf-8"), (
        f"the prompt's text changed, but its version is still {PROMPT_VERSION}: models trained on the old text "
        "would read another one. Restore the text, or raise PROMPT_VERSION and train anew."
    )


def built() -> dict[str, object]:
    """Every text that the model reads or learns to write, under a name."""
    texts: dict[str, object] = {}
    for name, fields in CONTEXTS.items():
        context = ClinicalContext(**fields)
        texts[f"Q-Former's instruction, {name}"] = build_query_instruction(context)
        for views in ("one view", "two views"):
            for prompted, seen in SEEN.items():
                texts[f"prompt, {name}, {views}, {prompted}"] = build_prompt(context, seen, views == "two views")
    for name, (findings, impression) in SECTIONS.items():
        texts[f"target, {name}"] = build_target(findings, impression)
        texts[f"sections of the target, {name}"] = split_sections(build_target(findings, impression))
    texts["opening"] = build_opening(["The heart is enlarged.", "There is a pleural effusion."])
    return texts
