"""The part of a model card that tells what was measured, chosen and trained.

It stands between two comments below the title of the card, and is replaced when the card is written again; everything
else is left as PEFT, Trainer or a person wrote it, but for paths of the machine that the base model was loaded from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers.utils import logging

from plasticity_peft.files import write_bytes, write_text
from plasticity_peft.report.plotting import png
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.selection import Selection
from plasticity_peft.saved.card_section import comment, eval_results_of, part_of
from plasticity_peft.saved.record import AdapterRecord, all_results, digest_in, make_results
from plasticity_peft.saved.trained import TrainedAdapter, is_hub_id

logger = logging.get_logger(f"transformers.{__name__}")

CARD_NAME, PICTURE_NAME = "README.md", "plasticity.png"


def update_card(
    folder: str | os.PathLike[str],
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: Any = None,
    split: str | None = None,
) -> Path:
    """Returns the path of the model card of a saved adapter, which it writes anew, with what was measured.

    The metrics are kept in plasticity.json beside the adapter and stay in the card, also when `trainer.push_to_hub()`
    writes another one, for as long as the adapter has these weights.

    Args:
        folder: where an adapter of this package was saved.
        metrics: values by name, such as {"accuracy": 0.94}; None where only the card is to be written.
        dataset: what they were measured on: a dataset, its id on the Hub, or its name.
        split: the split of it, where it does not say so itself.

    Raises:
        ConfigError: a metric is no finite number, or there is no dataset to it.
        AdapterError: there is no adapter in `folder`.
        ReportError: its plasticity.json is missing or damaged.

    Examples:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from plasticity_peft import PlasticityConfig
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=8, patch_size=4)
        >>> model = get_peft_model(ViTForImageClassification(config), PlasticityConfig(criterion="bound"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     card = update_card(folder, metrics={"accuracy": 0.5}, dataset="digits", split="test").read_text()
        >>> "| digits | test | accuracy | 0.5 |" in card
        True
    """
    adapter = TrainedAdapter.from_folder(folder)
    if metrics is not None:
        results = make_results(metrics, dataset, split, str(digest_in(folder)))
        AdapterRecord.read(folder).with_results(results).write(folder)
        adapter = TrainedAdapter.from_folder(folder)
    path = Path(folder, CARD_NAME)
    if not path.exists():
        write_text(path, f"---\nlibrary_name: peft\n---\n\n# {path.resolve().parent.name}\n")
    complete_card(folder, [adapter])
    return path


def complete_card(folder: str | os.PathLike[str], adapters: Sequence[TrainedAdapter]) -> None:
    """Adds what each adapter is to the model card that is in `folder`, or renews it, with a picture if it can."""
    path = Path(folder, CARD_NAME)
    card = ModelCard.load(path)
    for adapter in reversed(adapters):  # each goes to the top
        place = "" if adapter.name == "default" else adapter.name
        picture = _draw(Path(folder, place, PICTURE_NAME), adapter)
        part = part_of(adapter, f"{place}/{PICTURE_NAME}".lstrip("/") if picture else None)
        _merge(card.data, part.data, outdated=_outdated(Path(folder, place), adapter), folder=path.resolve().parent)
        card.text = _with_part(card.text, part.text, adapter.name)
        _hide_path(card, adapter)
    write_text(path, str(card))


def _draw(path: Path, adapter: TrainedAdapter) -> bool:
    try:
        picture = _png(json.dumps(adapter.report.to_dict()), json.dumps(asdict(adapter.selection)))
    except ImportError as error:
        logger.info("The model card has no picture: %s. pip install 'plasticity_peft[plot]' draws one.", error)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture)
    return True


@lru_cache(maxsize=4)
def _png(report: str, selection: str) -> bytes:
    """Returns the picture; it is the same at every checkpoint of a training, and takes longer than all the rest."""
    return png(PlasticityReport.from_dict(json.loads(report)), Selection(**json.loads(selection)))


def _outdated(folder: Path, adapter: TrainedAdapter) -> list[EvalResult]:
    """Returns the results of earlier weights that the card in `folder` may contain."""
    old = [one for one in all_results(folder) if one not in adapter.results]
    return [result for one in old for result in eval_results_of(one)]


def _merge(data: Any, ours: Any, *, outdated: list[EvalResult], folder: Path) -> None:
    """Adds our metadata to those of the card; what is already there stays, but for results that no longer hold."""
    data.library_name = data.library_name or ours.library_name
    data.base_model = data.base_model or ours.base_model
    data.pipeline_tag = data.pipeline_tag or ours.pipeline_tag
    data.datasets = _union(data.datasets, ours.datasets)
    data.metrics = _union(data.metrics, ours.metrics)
    data.tags = sorted(_union(data.tags, ours.tags) or ())
    replaced = [_key(result) for result in (*outdated, *(ours.eval_results or []))]
    kept = [result for result in data.eval_results or [] if _key(result) not in replaced]
    if data.eval_results or ours.eval_results:
        data.eval_results = [*kept, *(ours.eval_results or [])] or None
        left = {result.metric_type for result in data.eval_results or []}
        gone = {result.metric_type for result in outdated} - left
        data.metrics = [name for name in _union(data.metrics, None) or [] if name not in gone] or None
        data.model_name = (data.model_name or folder.name) if data.eval_results else None


def _key(result: EvalResult) -> tuple[Any, ...]:
    return (result.dataset_type, result.dataset_split, result.metric_type)


def _union(one: Any, other: Any) -> list[str] | None:
    """Returns the values of both, each a string, several or none, each value once."""
    values = [value for part in (one, other) for value in ([part] if isinstance(part, str) else part or [])]
    return list(dict.fromkeys(values)) or None


def _hide_path(card: Any, adapter: TrainedAdapter) -> None:
    """Takes a base model that is not on the Hub, such as a local folder, out of what PEFT and Trainer wrote.

    The Hub refuses such metadata, and nobody else has that folder.
    """
    path = adapter.base_model or ""
    if is_hub_id(path):
        return
    if card.data.base_model == path:
        card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if tag != f"base_model:adapter:{path}"]
    card.text = card.text.replace(f"[{path}](https://huggingface.co/{path})", "a model that is not on the Hub")


def _with_part(text: str, part: str, name: str) -> str:
    """Returns the text of a card with our part below its title, or in the place of an earlier one."""
    part = part.strip()
    begin, end = (re.escape(comment(which, name)) for which in ("begin", "end"))
    replaced, count = re.subn(f"{begin}.*?{end}", lambda _: part, text, count=1, flags=re.DOTALL)
    if count:
        return replaced
    title = re.search(r"^# .*$", text, flags=re.MULTILINE)
    at = title.end() if title else 0
    return f"{text[:at]}\n\n{part}\n\n{text[at:].lstrip(chr(10))}" if at else f"{part}\n\n{text}"
