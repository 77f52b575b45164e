"""Linear layers multiplied in 8-bit integers, on processors that do so exactly (VNNI).

ONNX Runtime multiplies 8-bit activations by 8-bit weights several times as fast as it multiplies by blocks of 4- or
8-bit weights, where more than a few tokens are read at a time. A bundle stores no weights for that: a variant of this
kind reads those of ``int4``, which are widened, scaled column by column and rounded to 8 bits when it is loaded.
"""

from __future__ import annotations

import json
import platform
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

    def load(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Weights, int8 [columns, rows], and the scale of each row, float32 [rows]."""
        wide = self.widen(folder)
        if self.exponents:
            wide *= np.exp2(np.array(self.exponents, np.float32))
        scales = np.maximum(wide.max(1), -wide.min(1)) / _LIMIT
        scales[scales == 0] = 1
        wide /= scales[:, None]
        np.rint(wide, out=wide)
        return np.ascontiguousarray(wide.astype(np.int8).T), scales

    def widen(self, folder: Path) -> np.ndarray:
        """The weights as they are stored, float32 [rows, columns]."""
        shape = (self.rows, self.blocks, self.block_size * self.bits // 8)
        raw: np.ndarray = np.memmap(folder / self.file, np.uint8, "r", self.weights, shape)
        kind = np.float16 if self.scale_bits == 16 else np.float32
        scales = np.memmap(
            folder / (self.scale_file or self.file),
            np.uint8,
            "r",
            self.scales,
            (self.rows * self.blocks * kind().nbytes,),
        )
        if self.bits == 4:
            halves = np.empty((*shape, 2), np.uint8)
            np.bitwise_and(raw, 15, out=halves[..., 0])
            np.right_shift(raw, 4, out=halves[..., 1])
            raw = halves.reshape(self.rows, self.blocks, self.block_size)
        wide = raw.astype(np.float32)
        wide -= 2 ** (self.bits - 1)
        wide *= scales.view(kind).astype(np.float32).reshape(self.rows, self.blocks, 1)
        return wide.reshape(self.rows, -1)[:, : self.columns]


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
        for product in self.products:
            try:
                weights, scales = product.load(folder)
            except (OSError, ValueError):
                raise BundleError(f"{product.file} does not hold {product.name}: export the bundle again") from None
            for part, array in (("weights", weights), ("scales", scales)):
                made[f"{product.name}/{part}"] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        return made


@cache
def multiplies_exactly() -> bool:
    """Whether this processor multiplies 8-bit numbers exactly in ONNX Runtime, and is of a kind where that is faster.

    x86 processors without VNNI (before 2019, and AMD's before Zen 4) add pairs of products in 16 bits, which do not
    hold the largest. So the largest are multiplied here, and the result is looked at.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(_PROBE), options, providers=["CPUExecutionProvider"])
    depth = 64
    left, right = np.full((8, depth), 255, np.uint8), np.full((depth, 32), _LIMIT, np.int8)
    products = session.run(None, {"left": left, "right": right})[0]
    return bool((products == 255 * _LIMIT * depth).all())
