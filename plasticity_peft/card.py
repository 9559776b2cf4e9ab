"""The section of a model card about the measurement, the selection and the training.

It is between two comments below the title of the card, and is replaced when the card is written again. All other text
of PEFT, of Trainer or of a person is unchanged, except that local paths of the base model are removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers.utils import logging

from plasticity_peft.errors import AdapterError
from plasticity_peft.files import write_bytes, write_text
from plasticity_peft.report.page import as_page
from plasticity_peft.report.plotting import png
from plasticity_peft.saved.card_section import comment, eval_results_of, section_of
from plasticity_peft.saved.options import rule_of
from plasticity_peft.saved.record import AdapterRecord, all_results, digest_in, make_results
from plasticity_peft.saved.trained import TrainedAdapter, is_hub_id

logger = logging.get_logger(f"transformers.{__name__}")

CARD_NAME, PICTURE_NAME, PAGE_NAME = "README.md", "plasticity.png", "plasticity.html"


def update_card(
    folder: str | os.PathLike[str],
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: Any = None,
    split: str | None = None,
) -> Path:
    """Writes the model card of a saved adapter again, with metrics if they are given, and returns its path.

    Metrics are saved in the plasticity.json of the adapter. They stay in the card as long as the adapter has these
    weights, even if `trainer.push_to_hub()` writes another card.

    Args:
        folder: folder of an adapter that was trained with this package.
        metrics: values by name, such as {"accuracy": 0.94}; None to write only the card.
        dataset: the dataset of the metrics, its id on the Hub, or its name.
        split: split of the dataset, if the dataset does not name it.

    Returns:
        Path of README.md in `folder`.

    Raises:
        ConfigError: a metric is not a finite number, or there are metrics without a dataset.
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
    """Adds a section about each adapter to the model card in `folder`, or replaces it.

    Writes a picture and a page beside it if the packages that draw them are installed.
    """
    path = Path(folder, CARD_NAME)
    card = ModelCard.load(path)
    for adapter in reversed(adapters):  # each section is inserted at the top
        place = "" if adapter.name == "default" else adapter.name
        drawn = {name: draw(Path(folder, place, name), adapter) for name, draw in DRAWN.items()}
        paths = {name: f"{place}/{name}".lstrip("/") if done else None for name, done in drawn.items()}
        section = section_of(adapter, picture=paths[PICTURE_NAME], page=paths[PAGE_NAME])
        outdated = _outdated(Path(folder, place), adapter)
        _merge(card.data, section.data, outdated=outdated, folder=path.resolve().parent)
        card.text = _with_section(card.text, section.text, adapter.name)
        _hide_path(card, adapter)
    write_text(path, str(card))


def _draw(path: Path, adapter: TrainedAdapter) -> bool:
    try:
        picture = _png(adapter.report, adapter.selection)
    except ImportError as error:
        logger.info("The model card has no picture: %s. pip install 'plasticity_peft[plot]' draws one.", error)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, picture)
    return True


def _write_page(path: Path, adapter: TrainedAdapter) -> bool:
    try:
        rule = rule_of(adapter.options, adapter.selection.granularity, adapter.training)
        page = _page(adapter.report, rule, selection=adapter.selection)
    except (ImportError, AdapterError) as error:
        logger.debug("The model card has no page: %s", error)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return True


DRAWN = {PICTURE_NAME: _draw, PAGE_NAME: _write_page}
# Both are the same at every checkpoint of a run, and drawing them takes longer than the rest of the card.
_png = lru_cache(maxsize=4)(png)
_page = lru_cache(maxsize=4)(as_page)


def _outdated(folder: Path, adapter: TrainedAdapter) -> list[EvalResult]:
    """Returns the results of earlier weights that the card in `folder` may contain."""
    old = [one for one in all_results(folder) if one not in adapter.results]
    return [result for one in old for result in eval_results_of(one, adapter.task)]


def _merge(data: Any, ours: Any, *, outdated: list[EvalResult], folder: Path) -> None:
    """Adds the metadata of a section to the card. The card keeps its own, except for results of earlier weights."""
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
    """Returns the different values of both; each is a string, a list of strings, or None."""
    values = [value for each in (one, other) for value in ([each] if isinstance(each, str) else each or [])]
    return list(dict.fromkeys(values)) or None


def _hide_path(card: Any, adapter: TrainedAdapter) -> None:
    """Removes a base model that is not on the Hub, such as a local folder, from the text of PEFT and Trainer.

    The Hub rejects such metadata, and the folder exists on this machine only.
    """
    path = adapter.base_model or ""
    if is_hub_id(path):
        return
    if card.data.base_model == path:
        card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if tag != f"base_model:adapter:{path}"]
    card.text = card.text.replace(f"[{path}](https://huggingface.co/{path})", "a model that is not on the Hub")


def _with_section(text: str, section: str, name: str) -> str:
    """Returns the text of a card with the section below its title, or instead of an earlier section."""
    section = section.strip()
    begin, end = (re.escape(comment(which, name)) for which in ("begin", "end"))
    replaced, count = re.subn(f"{begin}.*?{end}", lambda _: section, text, count=1, flags=re.DOTALL)
    if count:
        return replaced
    title = re.search(r"^# .*$", text, flags=re.MULTILINE)
    at = title.end() if title else 0
    return f"{text[:at]}\n\n{section}\n\n{text[at:].lstrip(chr(10))}" if at else f"{section}\n\n{text}"
