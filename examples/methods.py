"""The methods of compare_components.py: parts of a model by the paper's kinds, by criteria, and by stock PEFT's
methods.

A method prepares a pretrained model with a fresh head so that only some parameters train. The head always trains.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peft import (
    EvaConfig,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.helpers import KappaTuneSelector
from torch import nn
from torch.utils.data import DataLoader
from train import with_head_alone
from transformers import PreTrainedModel

from plasticity_peft import PlasticityConfig, PlasticityReport, find_components

KINDS = ("LN1", "MHA", "LN2", "FC1", "FC2")
MATRIX_KINDS = ("MHA", "FC1", "FC2")


@dataclass(frozen=True)
class Method:
    """One way to choose what trains."""

    group: str
    """"kind" (the paper's experiment), "blocks" (single components selected by a criterion), "default" (the default of
    this package), or "stock" (without this package)."""
    name: str
    training: str
    """"full" or "lora"."""
    adapt: Callable[[PreTrainedModel], nn.Module]
    """Returns the model in which only the selected part and the head train."""

    @property
    def folder(self) -> str:
        """Name of the folder of its runs."""
        return f"{self.group}-{self.name}-{self.training}".replace(" ", "_").replace(",", "")


def heads(model: PreTrainedModel) -> list[str]:
    """Returns the names of the modules outside the backbone."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def by_kind(report: PlasticityReport, r: int) -> list[Method]:
    """Returns the paper's experiment: the head alone, each kind alone, and everything."""

    def chosen(kinds: Iterable[str], training: str) -> Callable[[PreTrainedModel], PeftModel]:
        kinds = tuple(kinds)
        options = {"candidates": kinds, "top_k": len(kinds), "training": training, "r": r, "lora_alpha": 2 * r}
        return lambda model: get_peft_model(model, PlasticityConfig(report=report, **options))

    return [
        Method("kind", "head only", "full", with_head_alone),
        *(Method("kind", kind, "full", chosen([kind], "full")) for kind in KINDS),
        *(Method("kind", kind, "lora", chosen([kind], "lora")) for kind in MATRIX_KINDS),
        Method("kind", "everything", "full", lambda model: model),
        Method("kind", "everything", "lora", chosen(MATRIX_KINDS, "lora")),
    ]


def by_blocks(reports: dict[str, PlasticityReport], budget: int, r: int) -> tuple[list[Method], dict[str, str]]:
    """Returns a method for each different selection of the criteria at `budget`, and its name by criterion."""
    methods: dict[str, Method] = {}
    names = {}
    share = {"granularity": "component", "training": "lora", "r": r}
    for criterion, report in reports.items():
        options = {**share, "report": report, "budget": budget / report.model_parameters, "lora_alpha": 2 * r}
        selection = PlasticityConfig(**options).select(report)
        name = hashlib.sha256(" ".join(sorted(selection.units)).encode()).hexdigest()[:8]

        def adapt(model: PreTrainedModel, options: dict[str, object] = options) -> PeftModel:
            return get_peft_model(model, PlasticityConfig(**options))

        methods.setdefault(name, Method("blocks", name, "lora", adapt))
        names[criterion] = name
    return list(methods.values()), names


def by_default(report: PlasticityReport, budget: int) -> list[Method]:
    """Returns the kinds that `report` ranks first, at the rank that is closest to `budget` parameters."""
    methods = []
    for top_k in (1, 2):
        selection = report.select(top_k, r=1)
        rank = max(1, round(budget / selection.parameters["lora"]))
        options = {"report": report, "top_k": top_k, "r": rank, "lora_alpha": 2 * rank}
        name = f"{' + '.join(selection.units)} r={rank}"

        def adapt(model: PreTrainedModel, options: dict[str, object] = options) -> PeftModel:
            return get_peft_model(model, PlasticityConfig(**options))

        methods.append(Method("default", name, "lora", adapt))
    return methods


def stock(model: PreTrainedModel, budget: int, images: DataLoader) -> list[Method]:
    """Returns the methods of PEFT without this package, each as close to `budget` parameters as its ranks allow.

    Args:
        model: a model with the same names and shapes.
        budget: number of parameters to train, without the head.
        images: batches of {"pixel_values": ...} for EVA, which uses the inputs of the layers.
    """
    parts = find_components(model)
    size_of = {path: sum(f) for part in parts for path, f in zip(part.modules, part.features, strict=False)}
    modules_of = {part.id: part.modules for part in parts}
    linears = list(size_of)
    blocks = 1 + max(part.block for part in parts)

    def lora(name: str, targets: list[str], r: int | None = None, **options: object) -> Method:
        rank = r or max(1, round(budget / sum(size_of[path] for path in targets)))

        def adapt(model: PreTrainedModel) -> PeftModel:
            config = LoraConfig(
                target_modules=targets, modules_to_save=heads(model), r=rank, lora_alpha=2 * rank, **options
            )
            return get_peft_model(model, config)

        return Method("stock", f"{name} r={rank}", "lora", adapt)

    query_and_value = [path for i in range(blocks) for path in modules_of[f"{i}.MHA"][0:3:2]]
    per_block = sum(size for path, size in size_of.items()) // blocks
    last = max(1, round(budget / (8 * per_block)))
    in_last = [p for part in parts if part.block >= blocks - last and part.features for p in part.modules]
    methods = [
        lora("LoRA on query and value", query_and_value),
        lora("LoRA all-linear", linears),
        lora(f"LoRA on the last {last} blocks", in_last),
        lora("LoRA on KappaTune's targets", _kappa_targets(model, size_of, budget), r=8),
    ]
    eva = lora("EVA", linears, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))

    def adapt_with_eva(model: PreTrainedModel) -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EVA warns about each layer that got another rank
            adapted = eva.adapt(model)
            initialize_lora_eva_weights(
                adapted, images, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
            )
        return adapted

    methods.append(Method("stock", eva.name, "lora", adapt_with_eva))
    norms = [path for part in parts if not part.features for path in part.modules]
    methods.append(
        Method(
            "stock",
            "LN tuning",
            "full",
            lambda model: get_peft_model(model, LNTuningConfig(target_modules=norms, modules_to_save=heads(model))),
        )
    )
    return methods


def _kappa_targets(model: PreTrainedModel, size_of: dict[str, int], budget: int) -> list[str]:
    """Returns the linear layers that KappaTune ranks first, as many as fit into the budget at rank 8."""
    selector = KappaTuneSelector(model, show_progress=False)
    chosen: list[str] = []
    for path in selector.get_best_targets(num_modules=len(size_of) + len(heads(model))):
        if path in size_of and 8 * (sum(size_of[p] for p in chosen) + size_of[path]) <= budget:
            chosen.append(path)
    return chosen
