"""Write the NF4 variant: the merged checkpoint with the language model's linear layers in 4-bit NormalFloat."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from cbedge.backends.torch_nf4 import FILES, HEAD
from training.base import ModelAndTokenizers, load_model


def write_nf4(parts: ModelAndTokenizers, folder: Path) -> list[Path]:
    """Quantize a merged fp32 model into ``folder``; returns the files of the variant."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        merged, packed = Path(scratch) / "merged", Path(scratch) / "packed"
        for config in (parts.model.config, parts.model.language_model.config, parts.model.config.text_config):
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config  # of the base weights; these are in fp32
        parts.save(merged)
        load_model(str(merged), merged, "nf4").model.save_pretrained(packed, max_shard_size="1000GB")
        for ours, theirs in FILES.items():
            shutil.move(packed / theirs, folder / ours)
    names = [*FILES]
    head = parts.finding_head
    if head is not None:
        save_file(head.tensors, folder / HEAD)
        names.append(HEAD)
    return [folder / name for name in names]
