import numpy as np
import pytest

from training.clinical import (
    Labels,
    clinical_scores,
    finding_f1,
    label_reports,
    paired_difference,
    validate,
    with_intervals,
)
from training.datasets.iu_xray import study_tags
from training.datasets.studies import Record, make_study
from training.findings import LABELS, NO_FINDING, chexpert_labels, find_mentions, positive_findings


@pytest.mark.parametrize(
    ("report", "findings"),
    [
        ("There is a small left pleural effusion.", {"Pleural Effusion"}),
        ("No pleural effusion, pneumothorax or focal consolidation. Heart size normal.", set()),
        ("The lungs are clear of infiltrate. The heart is mildly enlarged.", {"Cardiomegaly"}),
        ("No effusion, but there is mild cardiomegaly.", {"Cardiomegaly"}),
        ("There is blunting of the left costophrenic angle.", {"Pleural Effusion"}),
        ("Degenerative changes of the thoracic spine. No acute disease.", {"spine"}),
        ("the heart is normal in size . there is bibasilar atelectasis .", {"Atelectasis"}),
        ("", set()),
    ],
)
def test_a_finding_counts_only_where_it_is_not_denied(report: str, findings: set[str]):
    assert positive_findings([report]) == [findings]


def test_mentions_say_where_they_are():
    report = "The heart is enlarged.\nNo pneumothorax."
    first, second = next(find_mentions([report]))
    assert report[first.start : first.end] == "heart is enlarged" and not first.denied
    assert report[second.start : second.end] == "pneumothorax" and second.denied


def test_no_finding_means_that_none_of_the_14_is_named():
    assert chexpert_labels(frozenset()) == {NO_FINDING}
    assert chexpert_labels(frozenset({"spine", "Support Devices"})) == {NO_FINDING, "Support Devices"}
    assert chexpert_labels(frozenset({"Edema", "spine"})) == {"Edema"}


def test_scores_of_a_perfect_and_of_a_normal_draft():
    reports = ["Cardiomegaly.", "Small pleural effusion.", "The lungs are clear.", "Scoliosis."]
    labels = label_reports(reports)
    perfect = clinical_scores(labels, labels)
    assert perfect["finding_f1"] == perfect["macro_f1"] == perfect["balanced_accuracy"] == 1
    normal = clinical_scores(label_reports(["The lungs are clear."] * 4), labels)
    assert normal["finding_f1"] == 0 and normal["balanced_accuracy"] == 0.5 and normal["micro_precision"] == 0.5
    assert normal["specificity"] == 1 and normal["sensitivity"] == 0


def test_precision_and_recall_of_one_finding():
    truth = label_reports(["Cardiomegaly.", "Cardiomegaly.", "Clear lungs."])
    row = finding_f1(label_reports(["Cardiomegaly.", "Clear.", "Cardiomegaly."]), truth)["Cardiomegaly"]
    assert (row["precision"], row["recall"], row["f1"], row["positives"]) == (0.5, 0.5, 0.5, 2)


def test_the_reader_is_measured_against_tags_of_studies_that_have_them():
    tags = [study_tags(["Cardiomegaly/mild"]), study_tags(["normal"]), study_tags([])]
    studies = [make_study(Record(str(i), "train", (), tags=t), "") for i, t in enumerate(tags)]
    rows = validate(studies, ["Cardiomegaly.", "Clear lungs. Cardiomegaly.", "Cardiomegaly."])
    assert rows["cardiomegaly"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "positives": 1}


def test_a_paired_difference_sees_what_the_spread_of_studies_hides():
    values = np.random.default_rng(0).random(300)
    better = paired_difference(
        lambda rows: float(values[rows].mean() + 0.01), lambda rows: float(values[rows].mean()), 300, 200
    )
    assert better["low"] == pytest.approx(0.01) and better["p"] <= 0.01
    same = paired_difference(lambda rows: float(values[rows].mean()), lambda rows: float(values[rows].mean()), 300, 200)
    assert same["p"] == 1


def test_labels_have_a_column_for_each_of_the_14():
    labels = label_reports([])
    assert isinstance(labels, Labels) and labels.matrix.shape == (0, len(LABELS)) and len(LABELS) == 14


def test_intervals_are_around_the_value():
    reports = ["Cardiomegaly.", "Clear lungs."] * 30
    truth = label_reports(reports)
    drafts = label_reports(reports[:40] + ["Clear lungs."] * 20)
    value, low, high = with_intervals(drafts, truth, truth.abnormal, resamples=100)["finding_f1"]
    assert 0 < low < value < high < 1
