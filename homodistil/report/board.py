"""TensorBoard, made pleasant to open: the report's figures, a summary in words, settings to compare runs by, and charts
that show what belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from homodistil.report.figures import Picture
from homodistil.report.history import History

FOLDER = "tensorboard"
CHARTS = {
    "distance from the teacher": {
        "KL, held out, and jumps": ["Multiline", ["validation/kl", "pruning/prune_jump"]],
        "held-out loss": ["Multiline", ["validation/student_loss", "validation/teacher_loss"]],
    },
    "training": {
        "loss terms, unweighted": ["Multiline", ["loss/.*"]],
        "shares of the loss": ["Multiline", ["share/.*"]],
    },
    "student": {"widths": ["Multiline", ["shape/hidden", "shape/ffn", "shape/heads", "shape/head_width"]]},
}
"""Tab CUSTOM SCALARS: section -> chart -> what it shows."""
OUTCOMES = ("validation/kl", "validation/student_loss", "validation/student_accuracy", "shape/parameters")


def show_on_board(run_directory: Path, run: History, pictures: Sequence[Picture], summary: str) -> None:
    """Add them to a run's TensorBoard, at its last update. summary: Markdown."""
    from torch.utils.tensorboard import SummaryWriter  # 2 s that `homodistil report` need not wait
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(run_directory / FOLDER)) as board:
        for picture in pictures:
            board.add_figure(picture.name, picture.figure, run.last_update, close=False)
        board.add_text("summary", summary, run.last_update)
        board.add_custom_scalars(CHARTS)
        outcomes = {tag: value for tag in OUTCOMES if (value := run.last(tag)) is not None}
        settings = {k: value for k, value in run.flat_settings.items() if isinstance(value, str | bool | int | float)}
        for part in hparams(settings, outcomes):
            board.file_writer.add_summary(part)
