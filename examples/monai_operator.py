"""An operator for MONAI Deploy, in an application that drafts the chest radiograph of a DICOM study.

``pip install monai-deploy-app-sdk "cbedge[cpu,hospital]"``, then
``python examples/monai_operator.py --input FOLDER_OF_A_STUDY --output FOLDER``: the draft is written there as a DICOM
Structured Report.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from monai.deploy.core import Application, Fragment, OperatorSpec
from monai.deploy.core import Operator as MonaiOperator
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator

from cbedge import ReportGenerator
from cbedge.formats import render

RULES = """
{"selections": [{"name": "radiograph", "conditions": {"Modality": "(?i)(CR|DX)"}}]}
"""


class ReportDraftOperator(MonaiOperator):
    """Drafts the first radiograph of the selected series.

    Named input ``study_selected_series_list``, from a DICOMSeriesSelectorOperator; named output ``text``, which a
    DICOMTextSRWriterOperator or any other may take. The draft is also written as a Structured Report.

    Args:
        output_folder: for ``draft-<SOP Instance UID>.dcm``.
        generator: to be used; default is the embedded model.
    """

    def __init__(
        self, fragment: Fragment, *args: Any, output_folder: Path, generator: ReportGenerator | None = None,
        **kwargs: Any,
    ):  # fmt: skip
        self.output_folder = Path(output_folder)
        self.generator = generator or ReportGenerator.from_pretrained()
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name what comes in and what goes out."""
        spec.input("study_selected_series_list")
        spec.output("text").condition(_ANYWAY)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Draft one study.

        Raises:
            ValueError: no series was selected.
            cbedge.CbedgeError: the radiograph cannot be used.
        """
        selected = [s for study in op_input.receive("study_selected_series_list") for s in study.selected_series]
        if not selected:
            raise ValueError("the study has no CR or DX series")
        dataset = selected[0].series.get_sop_instances()[0].get_native_sop_instance()
        file = io.BytesIO()
        dataset.save_as(file)
        report = self.generator.generate(file.getvalue())
        self.output_folder.mkdir(parents=True, exist_ok=True)
        target = self.output_folder / f"draft-{dataset.SOPInstanceUID}.dcm"
        target.write_bytes(render(report, "sr", file.getvalue()))
        op_output.emit(report.text, "text")


class DraftApplication(Application):
    """Load, select, draft.

    Args:
        source: folder of a study's DICOM files.
        target: folder for the draft.
    """

    def __init__(self, source: Path, target: Path):
        self.source, self.target = source, target
        super().__init__([])

    def compose(self) -> None:
        """Connect the operators."""
        loader = DICOMDataLoaderOperator(self, input_folder=self.source, name="loader")
        selector = DICOMSeriesSelectorOperator(self, rules=RULES, name="selector")
        drafter = ReportDraftOperator(self, output_folder=self.target, name="drafter")
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, drafter, {("study_selected_series_list", "study_selected_series_list")})


def _anyway() -> Any:
    from monai.deploy.core import ConditionType

    return ConditionType.NONE  # the text may find no taker


_ANYWAY = _anyway()


def main() -> None:
    """Run the application on one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    DraftApplication(arguments.input, arguments.output).run()


if __name__ == "__main__":
    main()
