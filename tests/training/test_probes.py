from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import call_cli
from PIL import Image

from cbedge.provenance import provenance
from training.datasets.iu_xray import read_studies
from training.learning_curve import learning_curve, plot, to_markdown
from training.ontology import TAGS
from training.probes import KINDS, probe


def test_a_probe_finds_what_is_there_and_nothing_in_noise(tiny_data: Path):
    rng = np.random.default_rng(0)
    study = read_studies(tiny_data, ("train",))[0]
    groups, seen = {}, {}
    for name, count in (("train", 300), ("val", 100), ("studied", 200)):
        sick = rng.random(count) < 0.3
        groups[name] = [replace(study, tags=(int(s), *[-1] * (len(TAGS) - 1))) for s in sick]
        signal = rng.standard_normal((count, 20)).astype(np.float32)
        noise = rng.standard_normal((count, 20)).astype(np.float32)
        signal[:, 0] += 3 * sick
        seen[name] = {"pixels": noise, "vision": signal, "qformer": noise}
    found = probe(seen, groups)
    assert set(found) == {"abnormal"} and set(found["abnormal"]) == {*KINDS, "positives"}
    assert found["abnormal"]["vision"] > 0.9 and abs(found["abnormal"]["pixels"] - 0.5) < 0.2


def test_more_studies_tell_a_weak_sign_better(tiny_data: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    study = read_studies(tiny_data, ("train",))[0]
    groups, seen = {}, {}
    for name, count in (("train", 1600), ("val", 200), ("studied", 400)):
        sick = rng.random(count) < 0.3
        groups[name] = [replace(study, tags=(int(s), *[-1] * (len(TAGS) - 1))) for s in sick]
        signal = rng.standard_normal((count, 200)).astype(np.float32)
        signal[:, :40] += 0.25 * sick[:, None]
        seen[name] = {"vision": signal}
    points = learning_curve(seen, groups, repeats=2)
    assert [point["studies"] for point in points] == [200, 400, 800, 1600]
    first, last = (points[i]["vision"]["abnormal"][0] for i in (0, -1))
    assert last > first + 0.05 and points[-1]["vision"]["mean"] == [last, 0.0]
    record = provenance("nothing", bundle=False) | {
        "base": "b",
        "limited": False,
        "repeats": 2,
        "studies": 400,
        "split": "test",
        "kinds": ["vision"],
        "points": points,
    }
    assert f"| 1600 | {last:.3f} | {last:.3f} |" in to_markdown(record)
    plot(record, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 300


def test_too_few_studies_for_a_curve_are_refused(tiny_run: Path, tiny_data: Path, tmp_path: Path):
    from training.trained import checkpoint_of

    done = call_cli(
        "training", "curve", "--base", checkpoint_of(tiny_run), "--data", tiny_data, "--output", tmp_path / "curve"
    )
    assert done.returncode == 1 and "train studies are too few" in done.stderr and not [*tmp_path.iterdir()]
