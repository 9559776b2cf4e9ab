"""The config as a dataclass: former names of its options, copies, and what is written."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, get_peft_model

from plasticity_peft import PlasticityConfig, measure_plasticity
from plasticity_peft.arguments import ARGUMENTS, check_arguments
from plasticity_peft.errors import ConfigError
from tests.support.models import random_images, tiny_model

RENAMED = "is deprecated and will be removed in a later release. Use .* instead"


@pytest.mark.parametrize(
    ("former", "new"), [({"pairs": 8}, {"max_samples": 8}), ({"granularity": "block"}, {"granularity": "component"})]
)
def test_former_names_are_accepted_with_a_warning(former: dict[str, Any], new: dict[str, Any]) -> None:
    with pytest.warns(FutureWarning, match=RENAMED) as caught:
        config = PlasticityConfig(criterion="bound", **{"training": "lora", **former})
    assert len(caught) == 1
    assert caught[0].filename == __file__ or "granularity" in former
    assert config == PlasticityConfig(criterion="bound", **{"training": "lora", **new})


def test_the_former_name_of_an_option_is_read_and_written_with_a_warning() -> None:
    config = PlasticityConfig(training="lora", criterion="bound", max_samples=8)
    with pytest.warns(FutureWarning, match=RENAMED):
        assert config.pairs == 8  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning, match=RENAMED):
        config.pairs = 9  # type: ignore[attr-defined]
    assert config.max_samples == 9


def test_both_names_of_an_option_are_one_too_many() -> None:
    with pytest.raises(TypeError, match="both pairs and max_samples"):
        PlasticityConfig(training="lora", criterion="bound", pairs=8, max_samples=8)


def test_a_config_that_was_saved_with_former_names_is_loaded(tmp_path: Path) -> None:
    PlasticityConfig(training="lora", criterion="bound", max_samples=8, granularity="component").save_pretrained(
        str(tmp_path)
    )
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    values |= {"pairs": values.pop("max_samples"), "granularity": "block"}
    path.write_text(json.dumps(values))
    with pytest.warns(FutureWarning, match=RENAMED):
        config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.max_samples, config.granularity) == (8, "component")  # type: ignore[attr-defined]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dataclasses.replace], ids=lambda each: each.__name__)
def test_a_copy_measures_what_the_original_does(copied: Any) -> None:
    images = random_images()
    config = PlasticityConfig(
        training="lora", target_data=images, max_samples=8, top_k=2, candidates=("MHA", "FC1", "LN2")
    )
    again = copied(config)
    assert again == config
    configs = [config, again, dataclasses.replace(again, top_k=1)]
    models = [get_peft_model(tiny_model(), each) for each in configs]
    assert config.report.scores == again.report.scores
    assert config.selection == again.selection
    assert len(configs[2].selection.units) == 1
    assert all(model.peft_config["default"].max_samples == 8 for model in models)


def test_arguments_come_back_in_their_canonical_form() -> None:
    import torch

    given = {"candidates": {"FC1", "MHA"}, "dtype": torch.bfloat16, "modules_to_save": {"b", "a"}, "settle": None}
    assert check_arguments(given) == {
        "candidates": ("MHA", "FC1"), "dtype": "bfloat16", "modules_to_save": ["a", "b"], "settle": None,
    }  # fmt: skip
    config = PlasticityConfig(criterion="bound", **{"training": "lora", **given})
    canonical = check_arguments({name: getattr(config, name) for name in given})
    assert canonical == check_arguments(given)
    with pytest.raises(ConfigError, match=r"Give top_k or budget, not both. Got top_k=1 and budget=0.5"):
        check_arguments({"top_k": 1, "budget": 0.5})


def test_the_defaults_are_allowed() -> None:
    defaults = {each.name: each.default for each in dataclasses.fields(PlasticityConfig) if each.name in ARGUMENTS}
    given = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    assert check_arguments(given) == given


OF_LORA: list[dict[str, Any]] = [{"r": 16}, {"lora_alpha": 16}, {"use_dora": True}, {"rank_pattern": {"MHA": 4}}]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "full"),
        ({"modules_to_save": ["classifier"], "inference_mode": True}, "full"),
        ({"r": 8}, "lora"),
        *((options, "lora") for options in [*OF_LORA, {"lora_dropout": 0.1}, {"bias": "all"}]),
        ({"training": "lora"}, "lora"),
        ({"training": "full", "r": 16}, "full"),
    ],
    ids=str,
)
def test_components_train_in_full_unless_an_option_of_lora_is_given(options: dict[str, Any], expected: str) -> None:
    config = PlasticityConfig(criterion="bound", **options)
    assert config.training == expected
    assert copy.deepcopy(config).training == expected
    assert dataclasses.replace(config, seed=1).training == expected


def test_by_default_the_best_kind_trains_in_full() -> None:
    model = get_peft_model(tiny_model(), PlasticityConfig(criterion="bound", candidates="MHA"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("modules_to_save" in name for name in trained)


@pytest.mark.parametrize("options", [{}, *OF_LORA[:1]], ids=str)
def test_a_report_selects_as_the_config_does(options: dict[str, Any]) -> None:
    """A budget of parameters counts them as they train."""
    report = measure_plasticity(tiny_model(), criterion="bound")
    config = PlasticityConfig(report=report, budget=0.3, **options).choose(tiny_model())
    assert report.select(budget=0.3, **options).units == config.selection.units
    mode = "lora" if options else "full"
    assert report.select(budget=0.3, training=mode, **options) == report.select(budget=0.3, **options)
