from dataclasses import replace
from pathlib import Path

import numpy as np

from training.datasets.iu_xray import read_studies
from training.datasets.studies import TAGS
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
