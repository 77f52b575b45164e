"""Linear layers multiplied in 8-bit integers, exactly, on x86 processors.

ONNX Runtime multiplies 8-bit activations by 8-bit weights several times as fast as it multiplies by blocks of 4- or
8-bit weights, where more than a few tokens are read at a time. A bundle stores no weights for that: a variant of this
kind reads those of ``int4``, which are widened, scaled column by column and rounded to 8 bits when it is loaded.
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
PROBE_DEPTH = 64  # inputs of the probe's layer, whose weights are all 127
EXACT = ("session.x64quantprecision", "1")  # session option: no sums of products in 16 bits
_COLUMNS = 128  # of weights that are rounded at a time
Files = Mapping[str, np.ndarray]  # the bytes of files by name, as read_files gives them


@dataclass(frozen=True)
class Product:
    """One linear layer, and where its block-quantized weights lie.

    Attributes:
        name: of the layer; the graph calls its 8-bit weights ``name/weights``, its scales ``name/scales``.
        file: of the bundle, in which the weights lie; ``scale_file``: the one of their scales, where it is another.
        weights, scales: where they begin there, in bytes.
        scale_bits: 16 or 32, of a scale.
        rows, columns: outputs and inputs of the layer.
        bits: 4 or 8, of a weight.
        block_size: weights of a row that share a scale.
        exponents: of two, one an input: the weights are multiplied by those powers and the graph divides the inputs by
            them; or none.
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
        """Blocks in a row."""
        return -(-self.columns // self.block_size)

    @property
    def stored_bytes(self) -> int:
        """What its weights take in the file, without scales."""
        return self.rows * self.blocks * self.block_size * self.bits // 8

    def load(self, files: Files) -> tuple[np.ndarray, np.ndarray]:
        """Weights, int8 [columns, rows], and the scale of each row, float32 [rows].

        A user waits for this at every cold start: some columns at a time stay in a core's cache.
        """
        raw, scales = self._stored(files)
        steps = np.abs(scales).max(1) * (2 ** (self.bits - 1) / _LIMIT)  # which the largest integer would need
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
        """The weights as they are stored, float32 [columns, rows]."""
        raw, scales = self._stored(files)
        return self._widen(raw, scales.T)[: self.columns]

    def _stored(self, files: Files) -> tuple[np.ndarray, np.ndarray]:
        """Integers, uint8 [rows, blocks, bytes of a block], and scales, float32 [rows, blocks]."""
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
    """What is beside a graph of this kind, under the same name with ``.json``: its products.

    Attributes:
        sources: files of the bundle that the graph or its products read.
        products: see :class:`Product`.
    """

    sources: tuple[str, ...]
    products: tuple[Product, ...]

    @staticmethod
    def path(graph: Path) -> Path:
        """Where a graph's table is."""
        return graph.with_suffix(".json")

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a table.

        Raises:
            BundleError: the file is none.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            products = tuple(Product(**{**p, "exponents": tuple(p.get("exponents", ()))}) for p in values["products"])
            table = cls(tuple(values["sources"]), products)
        except (OSError, ValueError, KeyError, TypeError):
            raise BundleError(
                f"{path.name} is no table of 8-bit products: install or export the bundle again"
            ) from None
        known = {*table.sources, ""}
        if any({p.file, p.scale_file} - known or p.bits not in (4, 8) for p in table.products):
            raise BundleError(f"{path.name} names weights that are not there: install or export the bundle again")
        return table

    def save(self, path: Path) -> None:
        """Write the table."""
        products = [{k: v for k, v in asdict(p).items() if v not in ((), "")} for p in self.products]
        lines = ",\n".join(json.dumps(p, separators=(",", ":")) for p in products)
        path.write_text(f'{{"sources": {json.dumps(self.sources)}, "products": [\n{lines}\n]}}\n', encoding="utf-8")

    def initializers(self, folder: Path) -> dict[str, onnxruntime.OrtValue]:
        """The graph's weights and scales, by name, made of the files in ``folder``.

        Raises:
            BundleError: a file is shorter than the table says.
        """
        import onnxruntime

        made = {}
        files = read_files(folder, self.sources)
        for product in self.products:
            try:
                weights, scales = product.load(files)
            except ValueError:  # a slice that ends too soon has another shape
                raise BundleError(f"{product.file} does not hold {product.name}: export the bundle again") from None
            for part, array in (("weights", weights), ("scales", scales)):
                made[f"{product.name}/{part}"] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return made


def read_files(folder: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The bytes of some files, uint8 [size], read when they are looked at."""
    return {name: np.asarray(np.memmap(folder / name, np.uint8, "r")) for name in names}


@cache
def multiplies_exactly() -> bool:
    """Whether ONNX Runtime multiplies 8-bit integers exactly on this processor, and faster than 4-bit weights.

    x86 processors without VNNI (before 2019, and AMD's before Zen 4) add pairs of products of unsigned and signed
    numbers in 16 bits, which overflow. :data:`EXACT` makes ONNX Runtime store the weights as unsigned numbers there,
    whose products it adds in 32 bits; processors with VNNI are not affected. To be sure, the largest numbers are
    multiplied here and the result is compared.
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
