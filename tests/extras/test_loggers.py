"""Weights & Biases and MLflow, themselves and without a network, show ranking, selection, cost and picture.

TensorBoard is in tests/adapters/test_callback.py. `nox -s "tests(extras-3.12)"` has the packages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model

from plasticity_peft import PlasticityCallback, PlasticityConfig
from plasticity_peft.components.component import KINDS
from tests.support.models import tiny_model
from tests.support.training import IMAGES, trainer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the loggers and what they import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PNG = b"\x89PNG"


def train(folder: Path, logger: str) -> tuple[Any, PlasticityConfig]:
    """Trains two epochs, and measures again after each. Returns the callback and the config."""
    config = PlasticityConfig(target_data=IMAGES, max_samples=8, top_k=2)
    trainer = trainer_of(get_peft_model(tiny_model(), config), folder, report_to=logger, num_train_epochs=2)
    callback = PlasticityCallback(trainer, IMAGES, every=1)
    trainer.add_callback(callback)
    trainer.train()
    return callback, config


def expected(config: PlasticityConfig, report: Any) -> dict[str, float]:
    """Returns numbers that a logger must have of a report, computed from the report itself."""
    kinds = {row.kind: row for row in report.kinds}
    numbers = {f"plasticity/{kind}": kinds[kind].mean for kind in KINDS}
    numbers |= {f"plasticity/rank/{row.unit}": rank for rank, row in enumerate(report.ranking(), start=1)}
    numbers |= {f"plasticity/selected/{kind}": float(kind in config.selection.units) for kind in KINDS}
    cost = config.selection.cost
    numbers |= {"plasticity/cost/time": cost.time, "plasticity/cost/memory": cost.memory}
    return numbers | {"plasticity/parameters": config.selection.parameters["lora"]}


def test_wandb_shows_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; nox -s 'tests(extras-3.12)' has it")
    for name, value in {"MODE": "offline", "DIR": tmp_path, "SILENT": "true", "PROJECT": "test"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    callback, config = train(tmp_path / "out", "wandb")
    summary = dict(wandb.run.summary)
    folder = Path(wandb.run.dir)
    last = callback.reports[2.0]
    for name, value in expected(config, last).items():
        assert summary[f"train/{name}"] == pytest.approx(value), name
    pictures = sorted((folder / "media" / "images" / "train" / "plasticity").glob("picture_*.png"))
    assert len(pictures) == 3
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
    tables = sorted((folder / "media" / "html" / "train" / "plasticity").glob("report_*.html"))
    assert any(last._repr_html_() in table.read_text() for table in tables)
    wandb.finish()


def test_mlflow_shows_them_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; nox -s 'tests(extras-3.12)' has it")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    callback, config = train(tmp_path / "out", "mlflow")
    run = mlflow.last_active_run()
    client = mlflow.MlflowClient()
    for name, value in expected(config, callback.reports[2.0]).items():
        assert run.data.metrics[name] == pytest.approx(value), name
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "plasticity/MHA")]
    assert steps[0] == 0 < steps[1] < steps[2]
    for step, report in zip(steps, callback.reports.values(), strict=True):
        picture, table = (
            Path(client.download_artifacts(run.info.run_id, f"plasticity/{step}.{form}", str(tmp_path)))
            for form in ("png", "txt")
        )
        assert picture.read_bytes().startswith(PNG)
        assert table.read_text() == str(report)
