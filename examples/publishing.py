"""Publishes the results of train.py: the adapter with its report, card and picture, and optionally the merged model.

The merged model can also be saved without the Hub. Each publication is one commit at the end, so a push that fails
leaves the repository unchanged.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, upload_folder
from transformers import Trainer, TrainingArguments

from plasticity_peft.files import replaced_when_whole

logger = logging.getLogger(__name__)


@contextmanager
def _or_exit(repository: str, advice: str) -> Iterator[None]:
    """Inside, any error on the way to the Hub ends the program with one message."""
    try:
        yield
    except Exception as error:  # the Hub, the network and the card have many types of errors
        reason = f"{error}" + (f" ({error.__cause__})" if error.__cause__ is not None else "")
        raise SystemExit(f"Publishing {repository} failed: {type(error).__name__}: {reason}\n{advice}") from error


def claim_repository(arguments: TrainingArguments, base_model: str) -> str:
    """Returns the full name of the repository, which is created if it is missing. A wrong token fails before training.

    The token is moved to the environment, because Trainer writes its arguments into a file that it publishes.
    """
    if arguments.hub_token:
        os.environ["HF_TOKEN"], arguments.hub_token = arguments.hub_token, None
    name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
    with _or_exit(name, "Nothing was trained. Log in with `hf auth login`, or give --hub_token and --hub_model_id."):
        name = create_repo(name, private=arguments.hub_private_repo, exist_ok=True).repo_id
    if Path(base_model).is_dir():
        logger.warning(
            "The base model is the folder %s. Users who load the adapter from the Hub need it too. --push_merged "
            "publishes the whole model.",
            base_model,
        )
    return name


def publish(trainer: Trainer, repository: str, **card: str | None) -> None:
    """Publishes the adapter, plasticity.json, its card and picture, and the image processor."""
    folder = trainer.args.output_dir
    command = f'hf upload {repository} {folder} --exclude "_*" "checkpoint-*"'
    with _or_exit(repository, f"The trained adapter is in {folder}. To publish it: {command}"):
        trainer.push_to_hub(**card)
    logger.info("Published https://huggingface.co/%s", repository)


def publish_merged(
    trainer: Trainer, repository: str, *, base_model: str, dataset_name: str, trained: str, metrics: dict[str, float]
) -> None:
    """Merges the adapter into the model, saves it in a folder that Trainer does not publish, and publishes the
    folder."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir, "_merged")
    name = f"{repository}-merged"
    model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    merged_card(name, repository, base_model, dataset_name, trained, metrics["test_accuracy"]).save(
        folder / "README.md"
    )
    with _or_exit(name, f"The merged model is in {folder}. To publish it: hf upload {name} {folder}"):
        create_repo(name, private=trainer.args.hub_private_repo, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder, commit_message="Merged model")
    logger.info("Published https://huggingface.co/%s", name)


def save_merged(trainer: Trainer) -> None:
    """Saves a merged copy of the model and its image processor in the folder `merged`; the adapter stays as it is."""
    if not trainer.is_world_process_zero():
        return
    model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).merge_and_unload()
    with replaced_when_whole(Path(trainer.args.output_dir, "merged"), last="config.json") as folder:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    logger.info("The merged model is in %s", Path(trainer.args.output_dir, "merged"))


def merged_card(
    name: str, adapter: str, base_model: str, dataset_name: str, trained: str, accuracy: float
) -> ModelCard:
    """Returns the card of a merged model. Local folders are named by their last part, and not linked."""
    known, dataset = not Path(base_model).exists(), Path(dataset_name)
    public = "/" in dataset_name and not dataset.exists()
    data = ModelCardData(
        model_name=name.split("/")[-1],
        base_model=base_model if known else None,
        base_model_relation="finetune" if known else None,
        datasets=dataset_name if public else None,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["plasticity"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset_name if public else dataset.stem,
                dataset_name=dataset.stem,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(accuracy, 4),
            )
        ],
    )
    base = f"[{base_model}](https://huggingface.co/{base_model})" if known else Path(base_model).name
    text = (
        f"# {name.split('/')[-1]}\n\n"
        f"{base}, finetuned on {dataset.stem} to classify images: {trained} trained, and merged into the weights.\n"
        f"Test accuracy: {100 * accuracy:.2f} %.\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model="{name}")\n'
        'classify("image.png")\n```\n\n'
        f"The adapter alone, with the scores and the selection: [{adapter}](https://huggingface.co/{adapter})."
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
