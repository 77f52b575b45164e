"""An operator for MONAI Deploy, in an application that drafts the chest radiographs of a folder.

``pip install monai-deploy-app-sdk`` and, in the clone, ``pip install -c constraints.txt ".[cpu,hospital]"``; then
``python examples/monai_operator.py --input FOLDER --output FOLDER``: every CR or DX image's draft is written there as a
DICOM Structured Report. Behind the SDK's own DICOMSeriesSelectorOperator, which needs MONAI and torch beside it, emit
``series.get_sop_instances()[0].get_native_sop_instance()`` saved to bytes in the place of :class:`FolderOperator`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, ConditionType, Fragment, OperatorSpec
from monai.deploy.core import Operator as MonaiOperator

from cbedge import CbedgeError, ReportGenerator
from cbedge.outputs import render


class FolderOperator(MonaiOperator):
    """Emits the DICOM files of a folder, named output ``radiographs``: a list of bytes."""

    def __init__(self, fragment: Fragment, *args: Any, folder: Path, **kwargs: Any):
        self.folder = folder
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name what goes out."""
        spec.output("radiographs")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read the folder."""
        op_output.emit([path.read_bytes() for path in sorted(self.folder.glob("*.dcm"))], "radiographs")


class ReportDraftOperator(MonaiOperator):
    """Drafts radiographs.

    Named input ``radiographs``, DICOM files as bytes; named output ``texts``, which may find no taker. Each draft is
    also written as a Structured Report. What cannot be drafted is named on standard output and passed over.

    Args:
        output_folder: for ``draft-1.dcm``, ``draft-2.dcm`` and so on.
        generator: to be used; default is the embedded model.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        output_folder: Path,
        generator: ReportGenerator | None = None,
        **kwargs: Any,
    ):
        self.output_folder = output_folder
        self.generator = generator or ReportGenerator.from_pretrained()
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name what comes in and what goes out."""
        spec.input("radiographs")
        spec.output("texts").condition(ConditionType.NONE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Draft what has come."""
        self.output_folder.mkdir(parents=True, exist_ok=True)
        texts = []
        for number, file in enumerate(op_input.receive("radiographs"), 1):
            try:
                report = self.generator.generate(file)
                document = render(report, "sr", file)
            except CbedgeError as error:
                print(f"image {number}: {error}")
                continue
            (self.output_folder / f"draft-{number}.dcm").write_bytes(document)
            texts.append(report.text)
        op_output.emit(texts, "texts")


class DraftApplication(Application):
    """Read and draft.

    Args:
        source: folder of DICOM files.
        target: folder for the drafts.
    """

    def __init__(self, source: Path, target: Path):
        self.source, self.target = source, target
        super().__init__([])

    def compose(self) -> None:
        """Connect the operators."""
        reader = FolderOperator(self, CountCondition(self, 1), folder=self.source, name="reader")
        drafter = ReportDraftOperator(self, output_folder=self.target, name="drafter")
        self.add_flow(reader, drafter, {("radiographs", "radiographs")})


def main() -> None:
    """Run the application on one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    DraftApplication(arguments.input, arguments.output).run()


if __name__ == "__main__":
    main()
