"""A small Qt viewer: it shows a radiograph, and a button writes the draft beside it while the window stays alive.

``pip install PySide6-Essentials``, then ``python examples/qt_viewer.py examples/chest_pa.png``. What a real viewer
takes over is :class:`DraftTask`: work in a thread of the pool, pieces of text as Qt signals.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PySide6.QtCore import QObject, QRunnable, Qt, QThreadPool, Signal
from PySide6.QtGui import QImage, QPixmap
from PySide6.QtWidgets import (
    QApplication,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPlainTextEdit,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from cbedge import CbedgeError, ReportGenerator
from cbedge.images.radiograph import load_radiograph
from cbedge.report import DRAFT_STATEMENT


class DraftSignals(QObject):
    """What a task tells the window: text as it is written, then ``done``; or ``failed`` with what is wrong."""

    piece = Signal(str)
    done = Signal()
    failed = Signal(str)


class DraftTask(QRunnable):
    """One draft, written in a thread of Qt's pool."""

    def __init__(self, generator: ReportGenerator, image: Path, indication: str | None):
        super().__init__()
        self.generator, self.image, self.indication = generator, image, indication
        self.signals = DraftSignals()

    def run(self) -> None:
        """Called by Qt in the thread."""
        try:
            for piece in self.generator.stream(self.image, indication=self.indication):
                self.signals.piece.emit(piece)
        except CbedgeError as error:
            self.signals.failed.emit(str(error))
        else:
            self.signals.done.emit()


class Viewer(QWidget):
    """The radiograph, the indication, the button, and the draft to edit."""

    def __init__(self, generator: ReportGenerator, image: Path):
        super().__init__()
        self.generator, self.image = generator, image
        self.setWindowTitle("Radiograph")
        pixels = (255 * load_radiograph(image).pixels).astype("uint8").copy()
        rows, columns = pixels.shape
        picture = QImage(pixels.data, columns, rows, columns, QImage.Format.Format_Grayscale8).copy()
        shown = QLabel()
        shown.setPixmap(QPixmap.fromImage(picture).scaledToHeight(600, Qt.TransformationMode.SmoothTransformation))
        self.indication = QLineEdit(placeholderText="Indication")
        self.button = QPushButton("Draft the report")
        self.draft = QPlainTextEdit()
        self.status = QLabel(DRAFT_STATEMENT)
        self.status.setWordWrap(True)
        side = QVBoxLayout()
        for part in (self.indication, self.button, self.draft, self.status):
            side.addWidget(part)
        layout = QHBoxLayout(self)
        layout.addWidget(shown)
        layout.addLayout(side)
        self.button.clicked.connect(self.start)

    def start(self) -> None:
        """Write a draft; the button comes back when it is done."""
        self.button.setEnabled(False)
        self.draft.clear()
        self.status.setText("Writing …")
        self.task = DraftTask(self.generator, self.image, self.indication.text().strip() or None)
        self.task.setAutoDelete(False)  # its signals are needed until the last was taken
        self.task.signals.piece.connect(self.draft.insertPlainText)
        self.task.signals.done.connect(lambda: self.end(DRAFT_STATEMENT))
        self.task.signals.failed.connect(self.end)
        QThreadPool.globalInstance().start(self.task)

    def end(self, message: str) -> None:
        """Show what is to be known of the draft."""
        self.status.setText(message)
        self.button.setEnabled(True)


def main() -> None:
    """Open the viewer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    image = parser.parse_args().image
    app = QApplication(sys.argv[:1])
    try:
        viewer = Viewer(ReportGenerator.from_pretrained(), image)
    except CbedgeError as error:
        sys.exit(f"error: {error}")
    viewer.show()
    sys.exit(app.exec())


if __name__ == "__main__":
    main()
