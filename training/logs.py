"""Logs of a stage: CSV files of losses, and their plot."""

import csv
from pathlib import Path


def append_row(path: Path, row: dict[str, float]) -> None:
    """Append one row to a CSV file; a new file gets a header."""
    new = not path.is_file()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def cut_rows(path: Path, last_step: int) -> None:
    """Remove the rows of a CSV file after a step; a resumed run writes them again."""
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        path.unlink()
        for row in rows:
            if int(row["step"]) <= last_step:
                append_row(path, {key: value for key, value in row.items()})  # type: ignore[misc]


def plot_losses(folder: Path) -> None:
    """Draw ``loss.csv`` and ``validation.csv`` of a stage as ``loss.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    for log, style in (("loss.csv", "-"), ("validation.csv", "o--")):
        if not (folder / log).is_file():
            continue
        with open(folder / log, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name in [key for key in rows[0] if key != "step" and not key.startswith("auc")]:
            label = name if log == "loss.csv" else f"{name} (validation)"
            axes.plot([int(r["step"]) for r in rows], [float(r[name]) for r in rows], style, label=label, alpha=0.8)
    axes.set(xlabel="optimizer step", ylabel="loss", title=f"stage {folder.name}")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)
