"""The snippets of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from plasticity_peft import PlasticityConfig
from plasticity_peft.components.layouts import LAYOUTS
from tests.support.models import REPOSITORY, random_images, tiny_model

SNIPPETS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)


def elsewhere(snippet: str) -> bool:
    """Returns whether a snippet needs the Hub or bitsandbytes: test_hub.py and test_quantised.py do what it does."""
    return 'load_pretrained("user/repo")' in snippet or "BitsAndBytesConfig" in snippet


def test_the_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    model, base_model = (ViTForImageClassification.from_pretrained("base") for _ in range(2))
    names = {
        "model": model,
        "base_model": base_model,
        "train_dataset": [{"pixel_values": image} for image in random_images(12)],
    }
    arguments = TrainingArguments("outputs", use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    labelled = [{**row, "labels": 0} for row in names["train_dataset"]]
    assert len(SNIPPETS) == 10
    assert len([snippet for snippet in SNIPPETS if elsewhere(snippet)]) == 2
    for snippet in SNIPPETS:
        if elsewhere(snippet):
            compile(snippet, "README.md", "exec")
            continue
        names["fresh_base_model"] = ViTForImageClassification.from_pretrained("base")
        exec(compile(snippet, "README.md", "exec"), names)
        if "print_trainable_parameters" in snippet:
            names["model"].save_pretrained("adapter")
            names["trainer"] = Trainer(names["model"], arguments, train_dataset=labelled)
    assert names["config"].load_report() == names["report"]
    assert isinstance(names["config"], PlasticityConfig)
    plt.close("all")


def test_every_known_architecture_is_named() -> None:
    text = (REPOSITORY / "README.md").read_text()
    table = text[text.index("## Architectures") : text.index("- Ids of hierarchical models")]
    assert set(LAYOUTS) - {"my_vit"} == set(re.findall(r"(?<=[|,] )[a-z0-9_-]+(?=[ ,])", table)) & set(LAYOUTS)


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (REPOSITORY / "README.md").read_text()
    paths = {path for path in re.findall(r"`((?:tests|examples)/[\w./]+|[\w-]+\.txt)`", text) if "outputs" not in path}
    assert paths
    for path in paths:
        assert (REPOSITORY / path).exists(), path
    for target in re.findall(r"make ([\w-]+)", text):
        assert f"\n{target}:" in (REPOSITORY / "Makefile").read_text()
