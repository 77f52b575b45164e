from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from training.findings import LABELS
from training.labelers import Chexbert, radgraph_f1

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "effusion", "clear", "lungs"]


@pytest.fixture()
def chexbert(tmp_path: Path) -> tuple[Path, Path]:
    """Weights in the layout of chexbert.pth, of a small random BERT, and a tokenizer that fits."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=96,
            max_position_embeddings=512,
        )
    )
    state = {f"module.bert.{name}": value for name, value in bert.state_dict().items()}
    for i in range(14):
        count = 2 if i == 13 else 4
        state[f"module.linear_heads.{i}.weight"] = torch.zeros(count, 64)
        bias = torch.zeros(count)
        bias[1 if i == 9 else 0] = 5.0  # whatever the text: effusion present, all else not mentioned
        state[f"module.linear_heads.{i}.bias"] = bias
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "chexbert.pth")
    return tmp_path / "chexbert.pth", tmp_path / "tokenizer"


def test_weights_in_chexberts_layout_label_reports(chexbert: tuple[Path, Path]):
    labels = Chexbert(*chexbert).label(["clear lungs", "effusion", ""])
    assert labels.matrix.shape == (3, 14)
    assert (labels.matrix == (np.array(LABELS) == "Pleural Effusion")).all() and labels.abnormal.all()


def test_what_is_no_chexbert_is_refused_in_one_line(chexbert: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no CheXbert weights"):
        Chexbert(tmp_path / "none.pth")
    (tmp_path / "other.pth").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is not CheXbert"):
        Chexbert(tmp_path / "other.pth", chexbert[1])


def test_radgraph_never_downloads_and_says_what_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"radgraph has no config\.json"):
        radgraph_f1(["clear"], ["clear"], tmp_path)
