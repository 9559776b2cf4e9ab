"""The costs of a training step, against what autograd keeps and what torch counts; and budgets of time and memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plasticity_peft import PlasticityConfig, PlasticityReport, measure_plasticity
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.calls import run
from plasticity_peft.errors import ConfigError, ReportError
from plasticity_peft.measuring import costs as counting
from plasticity_peft.measuring.costs import costs_of
from plasticity_peft.report import cost as formula
from plasticity_peft.report.cost import Costs, Trained
from plasticity_peft.report.selection import CostBudget, SelectionRule
from tests.support.families import each_kind_of_family, family
from tests.support.models import random_images, tiny_model

IMAGES = random_images(12)


def costs_and_architecture(model: nn.Module, images: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    architecture = find_architecture(model)
    with torch.no_grad():
        return costs_of(model, architecture, {name: value[:1] for name, value in images.items()}), architecture


def kept_bytes(model: nn.Module, architecture: Any, images: dict[str, torch.Tensor]) -> int:
    """Returns the bytes that autograd keeps in a forward pass, weights and images excepted."""
    others = (*model.parameters(), *model.buffers(), *images.values())
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model, architecture, images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@each_kind_of_family
def test_the_activations_are_what_autograd_keeps(name: str) -> None:
    """Of random choices. What lies before the first trained component in its block is counted, and not kept."""
    model, images = family(name).build(), family(name).images(1)
    costs, architecture = costs_and_architecture(model, images)
    assert costs is not None
    chance = random.Random(0)
    everything = kept_bytes(model, architecture, images)
    for _ in range(4):
        rows = sorted(chance.sample(range(len(costs.components)), chance.randint(1, 5)))
        model.requires_grad_(False)
        for row in rows:
            for path in architecture.components[row].modules:
                model.get_submodule(path).requires_grad_(True)
        found = costs.of([Trained(row, architecture.components[row].parameters) for row in rows])
        kept = kept_bytes(model, architecture, images)
        first = costs.blocks[costs.components[rows[0]].block]
        # After the blocks, norms and poolers keep a little for the gradient that passes through them.
        after = costs.outside_saved
        assert kept - after <= found.activation_bytes <= kept + first.saved
        assert found.activations == pytest.approx(found.activation_bytes / everything, rel=0.02)


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "beit"])
def test_the_operations_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "WORK_PER_ELEMENT", 0)
    monkeypatch.setattr(formula, "WORK_PER_ELEMENT", 0)
    model, images = family(name).build(attn_implementation="eager"), family(name).images(1)
    costs, architecture = costs_and_architecture(model, images)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        run(model, architecture, images)
    assert costs.outside_forward + sum(block.forward for block in costs.blocks) == forward.get_total_flops()
    model.requires_grad_(False)
    for part in architecture.components:
        for path in part.modules:
            model.get_submodule(path).requires_grad_(True)
    output = run(model, architecture, images)
    with FlopCounterMode(display=False) as backward:
        (output.logits if hasattr(output, "logits") else output.last_hidden_state).sum().backward()
    expected = sum(block.backward for block in costs.blocks) + sum(part.weights for part in costs.components)
    # The gradient of the first norm's input is not needed, and the head's is.
    assert backward.get_total_flops() == pytest.approx(expected, rel=0.02)


def report(**options: Any) -> PlasticityReport:
    return measure_plasticity(tiny_model(num_hidden_layers=4), IMAGES, **options)


@pytest.fixture(scope="module")
def scores() -> PlasticityReport:
    return report()


RULES = [
    {"granularity": granularity, "training": training, "budget": f"{share} {unit}"}
    for granularity in ("kind", "component")
    for training in ("lora", "full")
    for share in (0.35, 0.6, 0.9, 1)
    for unit in ("time", "memory")
]


@pytest.mark.parametrize("options", RULES, ids=lambda options: " ".join(options.values()))
def test_a_budget_is_kept_and_no_unit_that_fits_is_left(scores: PlasticityReport, options: dict[str, Any]) -> None:
    rule = SelectionRule(**options)
    units = [row.unit for row in scores.ranking(rule.granularity)]
    share, name = options["budget"].split()

    def ratio(chosen: list[str]) -> float:
        return getattr(rule.cost(scores.scores, chosen, scores.costs), name)

    if all(ratio([unit]) > float(share) for unit in units):
        with pytest.raises(ConfigError, match=rf"The {name} of a training step may be at most {share} .*cheapest"):
            scores.select(**options)
        return
    found = scores.select(**options)
    assert getattr(found.cost, name) == ratio(list(found.units)) <= float(share)
    for unit in set(units) - set(found.units):
        before = [each for each in found.units if units.index(each) < units.index(unit)]
        assert ratio([*before, unit]) > float(share)


def test_more_components_cost_more_and_late_ones_less(scores: PlasticityReport) -> None:
    rule = SelectionRule(granularity="component", training="full")
    ids = [row.id for row in scores.scores]
    chance = random.Random(1)
    for _ in range(30):
        order = chance.sample(ids, len(ids))
        costs = [rule.cost(scores.scores, order[:count], scores.costs) for count in range(len(ids) + 1)]
        for less, more in itertools.pairwise(costs):
            assert less.time <= more.time
            assert less.memory <= more.memory
            assert less.activations <= more.activations
        assert costs[-1].activations <= 1
        assert costs[0].optimizer_bytes == 0
    for kind in ("MHA", "FC1", "FC2", "LN1"):
        times = [rule.cost(scores.scores, [f"{block}.{kind}"], scores.costs).time for block in range(4)]
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1]


def test_the_order_of_other_pairs_does_not_matter() -> None:
    """`orders` returns all pairs whose order decides: any ranking that keeps them selects the same units."""
    chance = random.Random(2)
    units = tuple("abcdef")
    for _ in range(200):
        price = {unit: chance.random() for unit in units}
        shared = {unit: chance.randrange(3) for unit in units}

        def cost(chosen: Any, price: dict[str, float] = price, shared: dict[str, int] = shared) -> Any:
            deepest = max((3 - shared[unit] for unit in chosen), default=0)
            return type("Cost", (), {"time": 0.2 * deepest + sum(0.2 * price[unit] for unit in chosen)})

        choice = CostBudget(units, chance.uniform(0.2, 1.2), "time", cost)
        ranking = chance.sample(units, len(units))
        selected = set(choice.chosen(ranking))
        pairs = choice.orders(ranking)
        for _ in range(50):
            other = chance.sample(units, len(units))
            if all(other.index(better) < other.index(worse) for better, worse in pairs):
                assert set(choice.chosen(other)) == selected


def test_lora_costs_what_its_options_say(scores: PlasticityReport) -> None:
    small, large = scores.select(r=2).cost, scores.select(r=8).cost
    assert small.time < large.time
    assert large.file_bytes == 4 * small.file_bytes == 4 * scores.select(r=8).parameters["lora"]
    assert large.optimizer_bytes == 3 * large.file_bytes
    pattern = scores.select(r=2, rank_pattern={"q_proj": 8, "query": 8})
    assert small.time < pattern.cost.time < large.time


def test_a_config_takes_a_budget_of_time() -> None:
    model = tiny_model(num_hidden_layers=4)
    config = PlasticityConfig(
        target_data=IMAGES, budget="60% time", granularity="component", training="full", candidates=("MHA", "FC1")
    ).choose(model)
    assert config.budget == "0.6 time"
    assert config.selection.cost.time <= 0.6
    assert config.report.ending.units == config.selection.units


@pytest.mark.parametrize("budget", ["time", "0.6 hours", "0 time", "120% memory", "nan time", "0.5 0.5", "", "- time"])
def test_other_texts_are_refused(budget: str) -> None:
    with pytest.raises(ConfigError, match=r"budget must be a share of the model's parameters.*'0\.6 time'"):
        PlasticityConfig(training="lora", target_data=IMAGES, budget=budget)


def test_a_report_without_costs_says_so(scores: PlasticityReport) -> None:
    older = dataclasses.replace(scores, costs=None)
    assert older.select().cost is None
    assert "memory" not in str(older)
    with pytest.raises(ConfigError, match="needs the costs of training, which the report does not contain"):
        older.select(budget="0.5 time", granularity="component")


def test_costs_survive_a_file_and_wrong_ones_are_refused(scores: PlasticityReport) -> None:
    values = json.loads(json.dumps(scores.to_dict()))
    assert PlasticityReport.from_dict(values).select(top_k=2).cost == scores.select(top_k=2).cost
    values["costs"]["components"][3]["block"] = 2
    with pytest.raises(ReportError, match=r"costs\.components\.3\.block must be 0, got 2"):
        PlasticityReport.from_dict(values)
    values["costs"]["components"] = values["costs"]["components"][:3]
    with pytest.raises(ReportError, match="costs must have 4 blocks and 20 components"):
        PlasticityReport.from_dict(values)


def test_costs_that_cannot_be_counted_do_not_stop_a_measurement(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counting, "_counted", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    assert report().costs is None


def test_every_criterion_has_the_same_costs(scores: PlasticityReport) -> None:
    assert isinstance(scores.costs, Costs)
    assert report(criterion="bound").costs == report(criterion="rate_of_change").costs == scores.costs
