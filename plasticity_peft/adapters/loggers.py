"""What the Trainer's loggers show of a report beside numbers: its table and its picture.

Numbers go through `Trainer.log` to every logger. Tables and pictures do not, so they are given to the loggers that
take them, which are found among the callbacks that `report_to` makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations.integration_utils import MLflowCallback, TensorBoardCallback, WandbCallback
from transformers.utils import logging

from plasticity_peft.extras import require
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection

NAME = "train/plasticity"
"""Where they are, beside the numbers: the Trainer puts these under "train/"."""

logger = logging.get_logger(f"transformers.{__name__}")


def show(
    callbacks: Iterable[TrainerCallback], report: PlasticityReport, selection: Selection | None, step: int
) -> None:
    """Shows a report in TensorBoard, W&B and MLflow, if they are among the callbacks of a Trainer.

    Args:
        callbacks: the callbacks of the main process.
        report: the report.
        selection: the selection to mark in the picture, if there is one.
        step: number of steps that were trained.
    """
    shows = {TensorBoardCallback: _in_tensorboard, WandbCallback: _in_wandb, MLflowCallback: _in_mlflow}
    found = [(one, function) for one in callbacks for kind, function in shows.items() if isinstance(one, kind)]
    picture = _picture(report, selection) if found else None
    for callback, function in found:
        function(callback, report, picture, step)


def _picture(report: PlasticityReport, selection: Selection | None) -> np.ndarray | None:
    """Returns the picture of a report, uint8 of shape (height, width, 4); None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas: Any = FigureCanvasAgg(report.plot(selection=selection)[0].figure)
    except ImportError as error:
        logger.info("The loggers get no picture: %s. pip install 'plasticity_peft[plot]' draws one.", error)
        return None
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def _in_tensorboard(callback: Any, report: PlasticityReport, picture: np.ndarray | None, step: int) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    writer.add_text(f"{NAME}/report", str(report), step)
    if picture is not None:
        writer.add_image(f"{NAME}/picture", picture, step, dataformats="HWC")


def _in_wandb(callback: Any, report: PlasticityReport, picture: np.ndarray | None, step: int) -> None:
    wandb: Any = require("wandb", extra="integrations", purpose="W&B")
    if wandb.run is None:
        return
    values = {f"{NAME}/report": wandb.Html(report._repr_html_()), "train/global_step": step}
    if picture is not None:
        values[f"{NAME}/picture"] = wandb.Image(picture)
    wandb.log(values)


def _in_mlflow(callback: Any, report: PlasticityReport, picture: np.ndarray | None, step: int) -> None:
    mlflow: Any = require("mlflow", extra="integrations", purpose="MLflow")
    if mlflow.active_run() is None:
        return
    mlflow.log_text(str(report), f"plasticity/{step}.txt")
    if picture is not None:
        mlflow.log_image(picture, artifact_file=f"plasticity/{step}.png")
