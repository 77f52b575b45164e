"""Training of the vision encoder alone: labels, splits, augmentation, packs, and runs that resume."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InstructBlipVisionModel

from training.encoder.areas import areas
from training.encoder.augment import Augmenter
from training.encoder.config import EncoderConfig, read_config
from training.encoder.films import Films, decode_films, list_films, read_pack, write_pack
from training.encoder.labels import FINDINGS, iu_labels, nih_labels
from training.encoder.model import (
    EncoderWithHead,
    build_model,
    load_start,
    parameter_groups,
    resample_positions,
    vision_config,
)
from training.encoder.run import EncoderRun
from training.encoder.sampling import Sampler

ROOT = Path(__file__).parents[2]
SIDE, SIZE = 64, 56


def draw_film(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (70, 60)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small collections in the layouts of the real ones; files of the test splits are no images."""
    root = tmp_path_factory.mktemp("films")
    studies, films = [], []
    for number in range(60):
        split = ("train", "extra", "val", "test")[number % 4]
        images = [
            {"file": draw_film(root / "iu" / "images" / f"{number}-{view}.jpg", number), "view": view}
            for view in ("frontal", "lateral")
        ]
        terms = ["normal"] if number % 3 else ["Cardiomegaly/mild", "Pleural Effusion/left"]
        row = {"study_id": f"S{number}", "split": split, "images": images, "problems": terms}
        studies.append(row | {"mesh_major": terms, "mesh_automatic": []})
        for image in images if split == "test" else ():
            (root / "iu" / "images" / image["file"]).write_bytes(b"not an image")
    for number in range(80):
        split = "test" if number % 4 == 3 else "train"
        name = draw_film(root / "nih" / "images" / f"n{number}.jpg", 100 + number)
        if split == "test":
            (root / "nih" / "images" / name).write_bytes(b"not an image")
        labels = ["Pneumothorax"] if number % 5 == 0 else []
        films.append({"file": name, "split": split, "patient": str(number // 2), "labels": labels})
    for path, rows in (("iu/studies", studies), ("nih/films", films)):
        (root / f"{path}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"iu_xray": root / "iu", "nih": root / "nih"}


@pytest.fixture(scope="module")
def films(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Films:
    return decode_films(list_films(folders), tmp_path_factory.mktemp("cache"), SIDE)


@pytest.fixture(scope="module")
def start() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    vision = InstructBlipVisionModel(vision_config(2, SIZE, 64))
    return {f"vision_model.{name}": tensor for name, tensor in vision.state_dict().items()}


CONFIG = EncoderConfig(
    image_size=SIZE, side=SIDE, batch_size=8, epochs=1, learning_rate=1e-3, warmup_steps=2, save_minutes=1e9
)


def make_run(films: Films, start: dict[str, torch.Tensor], folder: Path, config: EncoderConfig = CONFIG) -> EncoderRun:
    return EncoderRun(config, films, start, folder, report=lambda line: None)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("terms", "present", "unknown"),
    [
        (["normal"], [], []),
        (["Airspace Disease/lung/base/left"], ["abnormal", "opacity", "consolidation"], []),
        (["Pneumonia"], ["abnormal", "opacity"], ["consolidation"]),
        (["Pulmonary Edema/mild"], ["abnormal", "congestion", "edema"], []),
        (["Pulmonary Congestion"], ["abnormal", "congestion"], ["edema"]),
        (["Thickening/pleura/apex"], ["abnormal", "scar", "pleural thickening"], []),
        (["Thickening/bronchovascular"], ["abnormal", "scar"], ["pleural thickening"]),
        (["Mass/lung"], ["abnormal", "nodule"], []),
        (["No Indexing"], [], list(FINDINGS)),
    ],
)
def test_iu_xray_terms_become_labels(terms: list[str], present: list[str], unknown: list[str]):
    labels = dict(zip(FINDINGS, iu_labels(terms).tolist(), strict=True))
    assert [name for name in FINDINGS if labels[name] == 1] == [name for name in FINDINGS if name in present]
    assert [name for name in FINDINGS if labels[name] == -1] == unknown


def test_nih_labels_know_nothing_of_findings_that_they_do_not_cover():
    labels = dict(zip(FINDINGS, nih_labels(["Edema", "Mass"]).tolist(), strict=True))
    assert {name for name in FINDINGS if labels[name] == 1} == {"abnormal", "opacity", "nodule", "congestion", "edema"}
    assert {name for name in FINDINGS if labels[name] == -1} == {
        "calcification",
        "low volume",
        "spine",
        "aorta",
        "device",
        "fracture",
    }
    assert set(nih_labels([]).tolist()) == {0, -1}


def test_test_splits_are_never_read_and_patients_are_apart(folders: dict[str, Path], films: Films):
    listed = list_films(folders, validation_share=0.4)
    rows = [json.loads(line) for line in (folders["nih"] / "films.jsonl").read_text().splitlines()]
    held_out = {row["file"] for row in rows if row["split"] == "test"}
    held_out |= {f"{number}-{view}.jpg" for number in range(3, 60, 4) for view in ("frontal", "lateral")}
    assert not held_out & {film.file.name for film in listed}
    patients = {row["file"]: row["patient"] for row in rows}
    by_split = {
        split: {patients[f.file.name] for f in listed if f.collection == "nih" and f.split == split}
        for split in ("train", "val")
    }
    assert by_split["train"] and by_split["val"] and not by_split["train"] & by_split["val"]
    assert len(films.rows("iu_xray", "train", "lateral")) == 30 and len(films.rows("iu_xray", "val", "frontal")) == 15


def test_films_are_decoded_once(folders: dict[str, Path], films: Films, tmp_path: Path):
    listed = list_films({"nih": folders["nih"]})
    first = decode_films(listed, tmp_path, SIDE)
    (cached,) = tmp_path.glob("*.npy")
    stamp = cached.stat().st_mtime_ns
    again = decode_films(listed, tmp_path, SIDE)
    assert cached.stat().st_mtime_ns == stamp
    assert again.pixels.shape == (60, SIDE, SIDE) and np.array_equal(first.pixels, again.pixels)


def test_augmentation_keeps_shape_and_range_and_follows_its_seed():
    torch.manual_seed(0)
    images = torch.rand(32, 1, SIDE, SIDE)
    made = [Augmenter(SIZE)(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert made[0].shape == (32, 1, SIZE, SIZE)
    assert all(float(m.min()) >= 0 and float(m.max()) <= 1 and bool(torch.isfinite(m).all()) for m in made)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_augmentation_never_mirrors_a_film():
    ramp = torch.linspace(0.2, 0.8, SIDE).expand(64, 1, SIDE, SIDE)
    changed = Augmenter(SIZE)(ramp.contiguous(), torch.Generator().manual_seed(0))
    inner = changed[:, :, 16:-16, 16:-16]
    assert bool((inner[..., -8:].mean((1, 2, 3)) > inner[..., :8].mean((1, 2, 3))).all())


def test_batches_are_balanced_and_repeatable(films: Films):
    sampler = Sampler(films, CONFIG)
    nih = set(films.rows("nih", "train", "frontal").tolist())
    train = set(np.flatnonzero(films.split == 0).tolist())
    for step in (0, 7, 100):
        batch = sampler.batch(step)
        assert len(batch) == 8 and set(batch.tolist()) <= train
        assert sum(row in nih for row in batch.tolist()) == sampler.counts[2]
        assert np.array_equal(batch, Sampler(films, CONFIG).batch(step))


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(
    films: Films, start: dict[str, torch.Tensor], tmp_path: Path
):
    whole = make_run(films, start, tmp_path / "whole")
    whole.train(max_steps=8)
    first = make_run(films, start, tmp_path / "parts")
    first.train(max_steps=5)
    first._lock.release()
    with open(tmp_path / "parts" / "log.jsonl", "a", encoding="utf-8") as log:  # killed after a later validation
        log.write(json.dumps({"step": 7}) + "\n")
    second = make_run(films, start, tmp_path / "parts")
    assert second.step == 5
    second.train(max_steps=3)
    assert whole.step == second.step == 8
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(whole.averaged[name], second.averaged[name]), name
    assert not torch.equal(whole.model.head.weight, first.model.head.weight)
    steps = [row["step"] for row in read_log(tmp_path / "parts")]
    assert steps == [row["step"] for row in read_log(tmp_path / "whole")] and 7 not in steps


def test_a_run_that_ends_keeps_its_best_weights_and_a_log(films: Films, start: dict[str, torch.Tensor], tmp_path: Path):
    run = make_run(films, start, tmp_path)
    run.train()
    assert run.finished
    log = read_log(tmp_path)
    assert log[0]["step"] == 0 and log[-1]["step"] == run.total
    best = load_start(str(tmp_path / "best.safetensors"), tmp_path)
    model = build_model(best, SIZE)
    chosen = max(log, key=lambda row: row["mean"])
    assert run._areas(model)["mean"] == pytest.approx(chosen["mean"], abs=1e-6)
    following = make_run(films, best, tmp_path / "following")
    following.train(max_steps=0)
    assert torch.equal(following.model.head.weight, best["head.weight"])  # a head that is there is not fitted anew


def test_a_run_stops_at_its_deadline(films: Films, start: dict[str, torch.Tensor], tmp_path: Path):
    run = make_run(films, start, tmp_path / "run")
    run.train(deadline=time.time())
    assert run.step == 0 and (tmp_path / "run" / "state.pt").is_file()


def test_a_folder_holds_one_run(films: Films, start: dict[str, torch.Tensor], tmp_path: Path):
    make_run(films, start, tmp_path)._lock.release()
    with pytest.raises(ValueError, match="another seed"):
        make_run(films, start, tmp_path, EncoderConfig(**{**vars(CONFIG), "seed": 1}))


def test_a_pack_brings_films_and_weights_to_another_machine(
    films: Films, start: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_pack(films, start, tmp_path / "pack", quality=95)
    read, weights = read_pack(tmp_path / "pack")
    for name in ("labels", "collection", "split", "view"):
        assert np.array_equal(getattr(read, name), getattr(films, name))
    assert np.abs(read.pixels.astype(float) - films.pixels).mean() < 12  # noise is the hardest to compress
    assert weights.keys() == start.keys()
    for name, value in start.items():
        assert float((weights[name] - value).abs().max()) <= float(value.abs().max()) / 200, name
    monkeypatch.setattr("training.encoder.films.FINDINGS", ("other",))
    with pytest.raises(ValueError, match="other findings"):
        read_pack(tmp_path / "pack")
    with pytest.raises(FileNotFoundError, match="--pack"):
        read_pack(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a shell script for GPU machines, which run Linux")
def test_the_gpu_script_leaves_the_best_weights_in_pieces(films: Films, start: dict[str, torch.Tensor], tmp_path: Path):
    write_pack(films, start, tmp_path / "pack")
    config = tmp_path / "config.yaml"
    config.write_text(f"{{image_size: {SIZE}, side: {SIDE}, batch_size: 8, epochs: 1}}", encoding="utf-8")
    script = ROOT / "training" / "gpu_encoder.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not (Path(sys.executable).parent / "python3").exists():
        pytest.skip("no python3 beside the interpreter")
    done = subprocess.run(
        [script, tmp_path / "pack", tmp_path / "out", "1", config, "--device", "cpu", "--max-steps", "2"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    best = tmp_path / "best.safetensors"
    best.write_bytes(b"".join(p.read_bytes() for p in sorted((tmp_path / "out").glob("best.safetensors.??"))))
    weights = load_start(str(best), tmp_path)
    assert weights["head.weight"].dtype == torch.float16
    assert build_model(weights, SIZE).head.weight.dtype == torch.float32
    assert read_log(tmp_path / "out")[0]["step"] == 0


def test_rates_fall_from_the_top_layer_down(start: dict[str, torch.Tensor]):
    model = build_model(start, SIZE)
    groups = parameter_groups(model, 1.0, 10.0, 0.5, 0.1)
    peaks = {id(p): group["peak"] for group in groups for p in group["params"]}
    layers = model.vision_model.encoder.layers
    assert len(peaks) == len(list(model.parameters()))
    assert peaks[id(layers[1].mlp.fc1.weight)] == 0.5 and peaks[id(layers[0].mlp.fc1.weight)] == 0.25
    assert peaks[id(model.vision_model.embeddings.patch_embedding.weight)] == 0.125
    assert peaks[id(model.head.weight)] == 10.0


def test_positions_are_resampled_to_another_image_size(start: dict[str, torch.Tensor]):
    table = start["vision_model.embeddings.position_embedding"]
    assert resample_positions(table, 4) is table
    assert resample_positions(table, 6).shape == (1, 37, 64)
    logits = build_model(start, 84)(torch.rand(2, 1, 84, 84), torch.tensor([0, 1]))
    assert logits.shape == (2, len(FINDINGS))


def test_each_view_has_its_own_head(start: dict[str, torch.Tensor]):
    model: EncoderWithHead = build_model(start, SIZE)
    torch.nn.init.normal_(model.head.weight)
    images = torch.rand(1, 1, SIZE, SIZE).expand(2, 1, SIZE, SIZE)
    frontal, lateral = model(images, torch.tensor([0, 1]))
    assert not torch.allclose(frontal, lateral)


def test_a_training_step_reads_a_share_of_the_patches_and_validation_all(start: dict[str, torch.Tensor]):
    model, read = build_model(start, SIZE), []
    model.vision_model.post_layernorm.register_forward_hook(lambda module, inputs, tokens: read.append(tokens.shape[1]))
    model.patches = 0.5
    images = torch.rand(2, 1, SIZE, SIZE)
    model.train().features(images)
    model.eval().features(images)
    patches = (SIZE // 14) ** 2
    assert read[0] == 1 + patches // 2 and patches + 1 in read[1:]


def test_areas_leave_out_what_is_unknown_or_seldom():
    labels = np.full((20, len(FINDINGS)), -1, np.int8)
    labels[:10, 0], labels[10:, 0] = 1, 0
    labels[:, 1] = 0
    labels[:4, 1] = 1
    logits = np.zeros((20, len(FINDINGS)), np.float32)
    logits[:10, 0] = 1
    result = areas(logits, labels)
    assert result["auc"] == {"abnormal": 1.0} and result["positives"] == {"abnormal": 10} and result["mean"] == 1.0


def test_an_unknown_setting_is_named(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("batchsize: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="batchsize"):
        read_config(path)


@pytest.mark.parametrize("name", ["encoder.yaml", "encoder_gpu.yaml"])
def test_the_shipped_configurations_are_valid(name: str):
    config = read_config(ROOT / "training" / "configs" / name)
    assert config.image_size == 224 and sum(config.shares.values()) == pytest.approx(1)
