"""Criteria by name: built-in ones, which are imported on first use, and those of a user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from plasticity_peft import (
    PlasticityConfig,
    PlasticityReport,
    load_adapter,
    measure_plasticity,
    register_criterion,
)
from plasticity_peft.components.calls import first_tensor, hooked, run
from plasticity_peft.criteria import Criterion, Observations, WeightCriterion
from plasticity_peft.criteria.bound import Bound
from plasticity_peft.criteria.registry import CRITERIA
from plasticity_peft.errors import ConfigError
from plasticity_peft.images import Batches, Pairs, Sampler, SingleImages
from tests.support.models import random_images, tiny_model
from tests.support.processes import STRICT, python


class Size(WeightCriterion):
    name = "size"
    title = "number of parameters"

    def score(self, model: Any, architecture: Any, *, image: Any, seed: int) -> torch.Tensor:
        return torch.tensor([float(part.parameters) for part in architecture.components]).double()


class OutputNorm(Criterion):
    name = "output_norm"
    title = "norm of the output"
    sampler = SingleImages

    def prepare(self, model: Any, architecture: Any, sampler: Sampler) -> Any:
        modules = {part.id: model.get_submodule(part.path) for part in architecture.components}

        def observe(batch: Any) -> Observations:
            norms = {}

            def keep(name: str, call: Any, output: Any) -> None:
                norms[name] = first_tensor(output).double().flatten(1).norm(dim=1)

            with hooked(modules, keep):
                run(model, architecture, batch.images)
            return Observations(torch.stack([norms[name] for name in modules], dim=1))

        return observe


def variant(base: type, **attributes: Any) -> type:
    return type("Variant", (base,), attributes)


def test_names_are_known_before_any_criterion_is_imported() -> None:
    script = (
        "import sys\n"
        "from plasticity_peft.criteria.registry import CRITERIA\n"
        "names = list(CRITERIA)\n"
        "assert 'bound' in CRITERIA and 'no such' not in CRITERIA and len(CRITERIA) == len(names) == 11\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = python(*STRICT, "-c", script)
    assert result.returncode == 0, result.stderr


def test_the_same_criterion_is_returned_every_time() -> None:
    assert [CRITERIA[name].name for name in CRITERIA] == list(CRITERIA)
    assert all(CRITERIA[name] is CRITERIA[name] for name in CRITERIA)
    with pytest.raises(KeyError):
        CRITERIA["no such"]


@pytest.mark.parametrize("given", [OutputNorm, OutputNorm()], ids=["class", "instance"])
def test_a_criterion_of_ones_own_ranks_in_every_interface(given: Any, tmp_path: Path) -> None:
    assert register_criterion(given) is given
    images = random_images()
    report = measure_plasticity(tiny_model(), images, criterion="output_norm", max_samples=8, settle=None)
    assert (report.criterion, report.title, report.observed) == ("output_norm", "norm of the output", "images")
    assert min(row.mean for row in report.scores) > 0
    config = PlasticityConfig(training="lora", target_data=images, criterion="output_norm", max_samples=8, settle=None)
    model = get_peft_model(tiny_model(), config)
    assert config.report.scores == report.scores
    model.save_pretrained(tmp_path)
    del CRITERIA["output_norm"]
    # Where nothing is known of the criterion, its report is loaded, shown and selected from.
    loaded = PlasticityReport.from_pretrained(tmp_path)
    assert loaded == config.report
    assert "norm of the output" in str(loaded)
    assert loaded.ranking() == report.ranking()
    again = PlasticityConfig(training="lora", report=loaded)
    get_peft_model(tiny_model(), again)
    assert again.selection == config.selection
    load_adapter(tiny_model(), tmp_path)
    with pytest.raises(ConfigError, match=r"criterion must be one of .*, or a name that register_criterion added"):
        PlasticityConfig(training="lora", target_data=images, criterion="output_norm")


def test_a_criterion_of_weights_needs_no_images() -> None:
    register_criterion(Size)
    report = measure_plasticity(tiny_model(), criterion="size")
    assert (report.observed, [row.mean for row in report.scores]) == (
        "weights",
        [float(row.parameters) for row in report.scores],
    )


def test_a_decorated_class_stays_what_it_is() -> None:
    @register_criterion
    class Other(Size):
        name = "other"

    assert isinstance(Other, type)
    assert isinstance(CRITERIA["other"], Other)


def test_a_name_is_taken_until_it_is_replaced_or_removed() -> None:
    register_criterion(Size)
    register_criterion(Size)  # a cell of a notebook is run twice
    changed = variant(Size, title="another title")
    with pytest.raises(ConfigError, match=r"'size' already exists. .* replace=True"):
        register_criterion(changed)
    register_criterion(changed, replace=True)
    assert CRITERIA["size"].title == "another title"
    del CRITERIA["size"]
    assert "size" not in CRITERIA
    own = variant(Size, name="bound")
    with pytest.raises(ConfigError, match="'bound' already exists"):
        register_criterion(own)
    register_criterion(own, replace=True)
    assert isinstance(CRITERIA["bound"], own)
    assert list(CRITERIA).count("bound") == 1
    del CRITERIA["bound"]
    assert isinstance(CRITERIA["bound"], Bound)
    with pytest.raises(KeyError):
        del CRITERIA["bound"]  # a built-in criterion cannot be removed


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (3, "criterion must be a Criterion or a WeightCriterion, as a class or as an instance. Got 3"),
        (int, "criterion must be a Criterion"),
        ("bound", "criterion must be a Criterion"),
        (Criterion, "Criterion cannot be created without arguments: .*abstract.* Register an instance"),
        (variant(Size, __init__=lambda self, width: None), "Variant cannot be created without arguments"),
        (variant(Size, name=""), "name of Variant must be ASCII letters, digits and underscores.* Got ''"),
        (variant(Size, name="two words"), "name of Variant must be .* Got 'two words'"),
        (variant(Size, name="größe"), "name of Variant must be"),
        (variant(Size, name="x" * 101), "name of Variant must be"),
        (variant(Size, name=None), "name of Variant must be .* Got None"),
        (variant(Size, title=""), "title of Variant must be a few words.* Got ''"),
        (variant(Size, title="\x1b[31m"), "title of Variant must be"),
        (variant(Size, title="x" * 101), "title of Variant must be"),
        (variant(Size, title=3), "title of Variant must be .* Got 3"),
        (variant(Size, power=0), "power of Variant must be a finite number other than 0. Got 0"),
        (variant(Size, power=float("nan")), "power of Variant must be .* Got nan"),
        (variant(Size, power=True), "power of Variant must be .* Got True"),
        (variant(OutputNorm, sampler=None), "sampler of Variant must be Pairs, SingleImages or Batches .* Got None"),
        (variant(OutputNorm, sampler=Sampler), "sampler of Variant must be Pairs, SingleImages or Batches"),
        (variant(OutputNorm, sampler="images"), "sampler of Variant must be .* Got 'images'"),
    ],
)
def test_what_is_not_a_criterion_is_refused_by_name(criterion: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_criterion(criterion)
    assert not CRITERIA.maps[0]


@pytest.mark.parametrize("sampler", [Pairs, SingleImages, Batches, variant(SingleImages)])
def test_every_sampler_is_accepted(sampler: type[Sampler]) -> None:
    register_criterion(variant(OutputNorm, sampler=sampler))


def test_protocols_are_those_of_the_registered_criterion() -> None:
    register_criterion(variant(OutputNorm, protocols=True))
    assert (
        PlasticityConfig(training="lora", target_data=random_images(), criterion="output_norm").inputs == "embedding"
    )
    with pytest.raises(ConfigError, match=r"inputs selects what .*'output_norm' feed to the components"):
        PlasticityConfig(training="lora", criterion="bound", inputs="embedding")


def test_a_report_of_an_unknown_criterion_ranks() -> None:
    values = json.loads(json.dumps(measure_plasticity(tiny_model(), criterion="bound").to_dict()))
    values["criterion"] = "somebody's"
    report = PlasticityReport.from_dict(values)
    assert report.select(top_k=2).units == measure_plasticity(tiny_model(), criterion="bound").select(top_k=2).units
