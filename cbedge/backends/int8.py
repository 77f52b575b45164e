"""Linear layers with exact 8-bit integer multiplication, on x86 processors.

For more than a few tokens at a time, ONNX Runtime multiplies 8-bit activations by 8-bit weights several times faster
than by block-quantized 4- or 8-bit weights. A bundle stores no additional weights for this: when the variant is loaded,
the weights of ``int4`` are dequantized, scaled per output and rounded to 8 bits.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cbedge.errors import BundleError

if TYPE_CHECKING:
    import onnxruntime

_PROBE = Path(__file__).parent / "int8_probe.onnx"
_LIMIT = 127  # of weights' absolute values
PROBE_DEPTH = 64  # inputs of the probe layer, whose weights are all 127
EXACT = ("session.x64quantprecision", "1")  # session option: do not accumulate products in 16 bits
_COLUMNS = 128  # columns of weights that are rounded at a time
Files = Mapping[str, np.ndarray]  # file name → bytes, from read_files


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer, and the location of its block-quantized weights.

    Attributes:
        name: name of the layer; the graph's initializers are ``name/weights`` (8 bits) and ``name/scales``.
        file: bundle file with the weights; ``scale_file``: file with the scales, if different.
        weights, scales: their offsets in bytes.
        scale_bits: bits of a scale, 16 or 32.
        rows, columns: outputs and inputs of the layer.
        bits: bits of a weight, 4 or 8.
        block_size: consecutive weights of a row that share a scale.
        exponents: exponents of two, one per input, or empty: the weights are multiplied by these powers of two, and the
            graph divides the inputs by them.
    """

    name: str
    file: str
    weights: int
    scales: int
    scale_bits: int
    rows: int
    columns: int
    bits: int
    block_size: int
    exponents: tuple[int, ...] = ()
    scale_file: str = ""

    @property
    def blocks(self) -> int:
        """Number of blocks in a row."""
        return -(-self.columns // self.block_size)

    @property
    def stored_bytes(self) -> int:
        """Size of the weights in the file, without scales."""
        return self.rows * self.blocks * self.block_size * self.bits // 8

    def load(self, files: Files) -> tuple[np.ndarray, np.ndarray]:
        """Weights, int8 [columns, rows], and the scale of each row, float32 [rows].

        This runs at every cold start, so it works on blocks of columns that fit into the CPU cache.
        """
        raw, scales = self._stored(files)
        steps = np.abs(scales).max(1) * (2 ** (self.bits - 1) / _LIMIT)  # so that the largest weight fits
        steps[steps == 0] = 1
        scales = np.ascontiguousarray((scales / steps[:, None]).T)
        if self.exponents:
            wide = self._widen(raw, scales)[: self.columns]
            wide *= np.exp2(np.array(self.exponents, np.float32))[:, None]
            more = np.maximum(wide.max(0), -wide.min(0)) / _LIMIT
            more[more == 0] = 1
            wide /= more
            return np.rint(wide, out=wide).astype(np.int8), steps * more
        weights = np.empty((self.blocks * self.block_size, self.rows), np.int8)
        together = max(1, _COLUMNS // self.block_size)
        for first in range(0, self.blocks, together):
            part = slice(first, first + together)
            wide = self._widen(raw[:, part], scales[part])
            begin = first * self.block_size
            weights[begin : begin + len(wide)] = np.rint(wide, out=wide)
        return weights[: self.columns], steps

    def widen(self, files: Files) -> np.ndarray:
        """The dequantized weights, float32 [columns, rows]."""
        raw, scales = self._stored(files)
        return self._widen(raw, scales.T)[: self.columns]

    def _stored(self, files: Files) -> tuple[np.ndarray, np.ndarray]:
        """Stored integers, uint8 [rows, blocks, bytes of a block], and scales, float32 [rows, blocks]."""
        raw = files[self.file][self.weights : self.weights + self.stored_bytes]
        kind = np.float16 if self.scale_bits == 16 else np.float32
        end = self.scales + self.rows * self.blocks * kind().nbytes
        scales = files[self.scale_file or self.file][self.scales : end].view(kind).astype(np.float32)
        return raw.reshape(self.rows, self.blocks, -1), scales.reshape(self.rows, self.blocks)

    def _widen(self, raw: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Some blocks' integers, uint8 [rows, blocks, bytes], and scales, float32 [blocks, rows] → float32 [columns,
        rows]."""
        packed = np.ascontiguousarray(raw.reshape(self.rows, -1).T)
        if self.bits == 4:
            wide = np.empty((2 * len(packed), self.rows), np.float32)
            wide[0::2], wide[1::2] = packed & 15, packed >> 4
        else:
            wide = packed.astype(np.float32)
        wide -= 2 ** (self.bits - 1)
        blocks = wide.reshape(-1, self.block_size, self.rows)
        blocks *= scales[:, None]
        return wide


@dataclass(frozen=True)
class Table:
    """The quantized layers of a graph, stored next to it as ``.json`` with the same name.

    Attributes:
        sources: bundle files that the graph or its layers read.
        products: the quantized layers.
    """

    sources: tuple[str, ...]
    products: tuple[QuantizedLinear, ...]

    @staticmethod
    def path(graph: Path) -> Path:
        """Path of a graph's table."""
        return graph.with_suffix(".json")

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a table.

        Raises:
            BundleError: the file is not a valid table.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            products = tuple(
                QuantizedLinear(**{**p, "exponents": tuple(p.get("exponents", ()))}) for p in values["products"]
            )
            table = cls(tuple(values["sources"]), products)
        except (OSError, ValueError, KeyError, TypeError):
            raise BundleError(
                f"{path.name} is not a table of quantized layers: install or export the bundle again"
            ) from None
        known = {*table.sources, ""}
        if any({p.file, p.scale_file} - known or p.bits not in (4, 8) for p in table.products):
            raise BundleError(f"{path.name} refers to unknown weights: install or export the bundle again")
        return table

    def save(self, path: Path) -> None:
        """Write the table."""
        products = [{k: v for k, v in asdict(p).items() if v not in ((), "")} for p in self.products]
        lines = ",\n".join(json.dumps(p, separators=(",", ":")) for p in products)
        path.write_text(f'{{"sources": {json.dumps(self.sources)}, "products": [\n{lines}\n]}}\n', encoding="utf-8")

    def initializers(self, folder: Path) -> dict[str, onnxruntime.OrtValue]:
        """The graph's initializers (weights and scales) by name, computed from the files in ``folder``.

        Raises:
            BundleError: a file is shorter than the table states.
        """
        import onnxruntime

        made = {}
        files = read_files(folder, self.sources)
        for product in self.products:
            try:
                weights, scales = product.load(files)
            except ValueError:  # a slice of a truncated file has another shape
                raise BundleError(f"{product.file} does not contain {product.name}: export the bundle again") from None
            for part, array in (("weights", weights), ("scales", scales)):
                made[f"{product.name}/{part}"] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return made


def read_files(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Memory maps of files, uint8 [size]."""
    return {name: np.asarray(np.memmap(folder / name, np.uint8, "r")) for name in names}


@cache
def multiplies_exactly() -> bool:
    """Whether ONNX Runtime multiplies 8-bit integers exactly on this processor, and faster than 4-bit weights.

    x86 processors without VNNI (before 2019; AMD before Zen 4) add pairs of products of unsigned and signed numbers in
    16 bits, which can overflow. :data:`EXACT` makes ONNX Runtime use unsigned weights there, whose products are added
    in 32 bits; processors with VNNI are not affected. This function multiplies the largest numbers and checks the
    result.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry(*EXACT)
    session = onnxruntime.InferenceSession(str(_PROBE), options, providers=["CPUExecutionProvider"])
    products = session.run(None, {"left": np.full((8, PROBE_DEPTH), 255, np.uint8)})[0]
    return bool((products == 255 * _LIMIT * PROBE_DEPTH).all())
