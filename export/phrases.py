"""What a bundle's phrasebook is made of: training reports, and what the model itself writes of training studies."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from cbedge.bundles.bundle import TOKENIZER, open_bundle
from cbedge.decoding.phrasebook import Phrasebook
from training.datasets import open_studies
from training.datasets.studies import Study
from training.drafting import Request, RuntimeDrafter

DRAFTS_WEIGH = 3  # as much as a radiologist's report: what a draft goes on with is the model's word


def report_phrases(tokenizer: Tokenizer, stop_id: int, data: Path, limit: int | None = None) -> list[list[int]]:
    """The tokens of the training reports at ``data``, each with the token that ends it."""
    return _encode(tokenizer, stop_id, [study.target for study in open_studies(data, ("train",), limit)])


def phrasebook_of(folder: Path, data: Path, limit: int | None, tell: Callable[[int, int], None]) -> Phrasebook:
    """A phrasebook of training reports and of a bundle's drafts of the same studies.

    Each study is drafted twice, kept to the usual template and not; of every second one the lateral radiograph is read,
    too, where there is one and the model reads it.

    Args:
        folder: of the bundle, whose usual variant for this machine writes.
        data: IU X-RAY or MIMIC-CXR-JPG.
        limit: only the first so many studies.
        tell: is told how many drafts are written, and of how many.

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

    requests = [_request(study, number % 2 == 0) for number, study in enumerate(studies)]
    for drafter in (kept, kept.freely()):
        drafts += drafter.draft(requests, count)
    tokenizer, stop_id = Tokenizer.from_file(str(folder / TOKENIZER)), open_bundle(folder).manifest.stop_ids[0]
    written = _encode(tokenizer, stop_id, drafts)
    return Phrasebook.compile([*report_phrases(tokenizer, stop_id, data, limit), *DRAFTS_WEIGH * written])


def _request(study: Study, frontal_alone: bool) -> Request:
    return Request(study.image, study.context, None if frontal_alone else study.lateral)


def _encode(tokenizer: Tokenizer, stop_id: int, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer.encode_batch([text for text in texts if text], add_special_tokens=False)
    return [[*encoding.ids, stop_id] for encoding in encoded]
