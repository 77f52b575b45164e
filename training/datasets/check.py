"""``python -m training data check``: report what was found and dropped in a collection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from training.datasets import INDEX_CACHE, open_records
from training.datasets.studies import SPLITS, Record, Study, Tally, studies_of
from training.ontology import TAGS

MAX_WORDS = 200


@dataclass
class Summary:
    """Counts of the studies for training.

    Attributes:
        studies: split → number of studies with a frontal radiograph.
        given: ``findings``, ``impression``, ``indication``, ``comparison``, ``lateral`` → number of studies with it.
        labels: split → number of studies with each tag present, and with each tag known, int [2, TAGS].
        words: split → histogram of the number of words per target; the last bin has longer ones.
    """

    collection: str
    tally: Tally
    studies: Counter[str] = field(default_factory=Counter)
    given: Counter[str] = field(default_factory=Counter)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    words: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of studies of all splits."""
        return self.studies.total()


def summarize(folder: Path, cache: Path = INDEX_CACHE) -> Summary:
    """Read a collection once, study by study.

    Raises:
        FileNotFoundError, ValueError: as :func:`training.datasets.open_records`.
    """
    tally = Tally()
    collection, records = open_records(folder, tally, cache)
    summary = Summary(collection, tally)
    for study in studies_of(_watched(records, summary), SPLITS, tally):
        _count(summary, study)
    return summary


def print_summary(summary: Summary, console: Console) -> None:
    """Print a summary as tables."""
    table = Table("split", "studies", title=f"{summary.collection}: studies with a frontal radiograph", min_width=40)
    for split in SPLITS:
        if summary.studies[split]:
            table.add_row(split, f"{summary.studies[split]:,}")
    table.add_row("all", f"{summary.total:,}", style="bold")
    console.print(table)
    given = Table("of these, with", "studies", "share", min_width=40)
    for name, count in summary.given.most_common():
        given.add_row(name, f"{count:,}", f"{count / max(1, summary.total):.1%}")
    console.print(given)
    labels = Table("label", "present", "known", title="labels of all splits", min_width=40)
    totals = sum(summary.labels.values(), np.zeros((2, len(TAGS)), int))
    for tag, present, known in zip(TAGS, *totals, strict=True):
        labels.add_row(tag, f"{present:,}", f"{known:,}")
    console.print(labels)
    for title, counts in (("found", summary.tally.found), ("dropped", summary.tally.dropped)):
        table = Table(title, "count", min_width=40)
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            if count:
                table.add_row(name, f"{count:,}")
        if any(counts.values()):
            console.print(table)
        else:
            console.print(f"{title}: nothing")
    for note in summary.tally.notes:
        console.print(f"note: {note}")


def plot_summary(summary: Summary, path: Path) -> None:
    """Draw report lengths by split and label counts into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="tight")
    lengths, labels = figure.subplots(1, 2)
    for split in (s for s in SPLITS if summary.studies[s]):
        share = summary.words[split].reshape(-1, 5).sum(1) / max(1, summary.words[split].sum())
        lengths.plot(np.arange(len(share)) * 5, 100 * share, label=f"{split} ({summary.studies[split]:,})")
    lengths.set(xlabel="words in a report (findings and impression)", ylabel="% of the split's reports")
    lengths.legend(frameon=False)
    present = sum(summary.labels.values(), np.zeros((2, len(TAGS)), int))[0]
    order = np.argsort(present)
    labels.barh([TAGS[i] for i in order], present[order])
    labels.bar_label(labels.containers[0], padding=3, fontsize=8)
    labels.set(xlabel="studies with the label")
    labels.margins(x=0.12)
    for axes in (lengths, labels):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{summary.collection}: {summary.total:,} studies with a frontal radiograph")
    figure.savefig(path, dpi=120)


def _watched(records: Iterator[Record], summary: Summary) -> Iterator[Record]:
    for record in records:
        if any(image.view == "frontal" for image in record.images):
            for name in ("findings", "impression", "indication", "comparison"):
                summary.given[name] += bool(getattr(record, name))
            summary.given["lateral radiograph"] += any(image.view == "lateral" for image in record.images)
        yield record


def _count(summary: Summary, study: Study) -> None:
    summary.studies[study.split] += 1
    tags = np.array(study.tags)
    labels = summary.labels.setdefault(study.split, np.zeros((2, len(TAGS)), int))
    labels += np.stack([tags == 1, tags >= 0])
    words = summary.words.setdefault(study.split, np.zeros(MAX_WORDS, int))
    if study.target:
        words[min(len(study.target.split()), MAX_WORDS - 1)] += 1
