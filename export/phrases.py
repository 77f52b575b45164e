"""Build a bundle's word list from training reports, and its phrasebook from them and from the model's own drafts."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from cbedge.bundles.bundle import TOKENIZER, open_bundle
from cbedge.decoding.phrasebook import Phrasebook
from cbedge.drafting.lexicon import Lexicon
from cbedge.prompt import split_sections
from training.datasets import open_studies
from training.drafting import Request, RuntimeDrafter

DRAFT_WEIGHT = 3  # relative to a training report, because the model continues its own words


def lexicon_of(data: Path) -> Lexicon:
    """The words of the training reports at ``data``."""
    return Lexicon.compile(" ".join(split_sections(study.target)) for study in open_studies(data, ("train",)))


def report_phrases(tokenizer: Tokenizer, stop_id: int, data: Path, limit: int | None = None) -> list[list[int]]:
    """Token ids of the training reports at ``data``, each with the stop token."""
    return _encode(tokenizer, stop_id, [study.target for study in open_studies(data, ("train",), limit)])


def phrasebook_of(folder: Path, data: Path, limit: int | None, tell: Callable[[int, int], None]) -> Phrasebook:
    """A phrasebook from training reports and a bundle's drafts of the same studies.

    Each study is drafted twice, with the usual template and without one. Every second study is read with its lateral
    radiograph, if it has one and the model can read it.

    Args:
        folder: the bundle; its preferred variant for this machine writes the drafts.
        tell: gets the number of finished drafts, and of all drafts.

    Raises:
        ValueError: ``data`` has no train study.
    """
    studies = open_studies(data, ("train",), limit)
    if not studies:
        raise ValueError(f"{data} has no train study with a frontal radiograph and a report")
    kept = RuntimeDrafter(folder, None, "auto")
    done, drafts = 0, []

    def count(written: int) -> None:
        nonlocal done
        done += written
        tell(done, 2 * len(studies))

    requests = [Request(s.image, s.context, s.lateral if number % 2 else None) for number, s in enumerate(studies)]
    for drafter in (kept, kept.freely()):
        drafts += drafter.draft(requests, count)
    tokenizer, stop_id = Tokenizer.from_file(str(folder / TOKENIZER)), open_bundle(folder).manifest.stop_ids[0]
    written = _encode(tokenizer, stop_id, drafts)
    return Phrasebook.compile([*report_phrases(tokenizer, stop_id, data, limit), *DRAFT_WEIGHT * written])


def _encode(tokenizer: Tokenizer, stop_id: int, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer.encode_batch([text for text in texts if text], add_special_tokens=False)
    return [[*encoding.ids, stop_id] for encoding in encoded]
