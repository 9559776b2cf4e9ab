"""The methods of compare_components.py: which modules of a vision transformer train, and in which way.

Each method starts from a pretrained model with a fitted head, which always trains along.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.helpers import KappaTuneSelector
from torch import nn
from transformers import PreTrainedModel

from plasticity_peft import PlasticityReport, find_components
from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.components.component import Component
from plasticity_peft.measuring.forecast import EARLY, usual_sets

KINDS = ("LN1", "MHA", "LN2", "FC1", "FC2")
MATRIX_KINDS = ("MHA", "FC1", "FC2")
EVERYTHING = "everything"
GROUPS = {
    "kinds": "each kind alone, the norms, and pairs of kinds, in full and by LoRA; everything",
    "depth": "blocks from the first or to the last one, and the output projections of attention",
    "stock": "stock PEFT: LoRA on all linear layers or on query and value, LoRA+, EVA, KappaTune's layers",
    "components": "single components in full, at each of the shares: those that each criterion ranks first, and "
    "random ones",
    "budgets": "single components in full that a forecast finds within each budget",
}


@dataclass(frozen=True)
class Method:
    """One way to choose what trains beside the head."""

    group: str
    """One of `GROUPS`."""
    name: str
    modules: tuple[str, ...]
    """Paths of the modules that train, or that LoRA adapts; empty: the whole model trains."""
    units: tuple[str, ...] = ()
    """The components that consist of these modules, such as "0.MHA"; empty if they are no whole components."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Options of LoraConfig; empty: the modules train in full."""
    b_over_a: float = 1.0
    """Rate of the second matrix of LoRA, as a multiple of the rate of the first one."""
    lowest_factor: float = 0.4
    """Where the search for the best learning rate begins, as a multiple of the recommended one."""

    @property
    def training(self) -> str:
        """ "lora" or "full"."""
        return "lora" if self.lora else "full"

    @property
    def file(self) -> str:
        """Name of the file of its results, without suffix."""
        return re.sub(r"[^\w.=+-]+", "_", f"{self.group}-{self.name}-{self.training}")

    def adapt(self, model: PreTrainedModel, images: torch.Tensor) -> nn.Module:
        """Returns the model, with only the chosen modules and the head to train.

        Args:
            model: a model with a fitted head. It is changed.
            images: training images, (images, channels, height, width). EVA uses what the layers receive.
        """
        heads = list(find_architecture(model).heads)
        if not self.lora:
            model.requires_grad_(not self.modules)
            for path in (*self.modules, *heads):
                model.get_submodule(path).requires_grad_(True)
            return model
        config = LoraConfig(target_modules=list(self.modules), modules_to_save=heads, **self.lora)
        eva = config.init_lora_weights == "eva"
        adapted = get_peft_model(model, config, low_cpu_mem_usage=eva)
        if eva:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # EVA warns about each layer that got another rank
                initialize_lora_eva_weights(
                    adapted,
                    [{"pixel_values": batch} for batch in images.split(64)],
                    prepare_model_inputs_fn=None,
                    prepare_layer_inputs_fn=None,
                    show_progress_bar=False,
                )
        return adapted


class Catalog:
    """The methods for one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        reports: Mapping[str, PlasticityReport],
        shares: Sequence[float],
        found: Mapping[str, Sequence[str]],
    ) -> None:
        """Prepares the methods.

        Args:
            model: the model.
            reports: the reports of the criteria, by name.
            shares: shares of the weights of all components.
            found: the ids of the components that a forecast found within each budget, by the name of the set.
        """
        self.parts = find_components(model)
        self.blocks = sorted({(part.stage or 0, part.block) for part in self.parts})
        self.kappa = KappaTuneSelector(model, show_progress=False)
        self.reports, self.shares, self.found = reports, shares, found
        self.linears = [path for part in self.parts if part.features for path in part.modules]

    def methods(self) -> tuple[list[Method], dict[str, str]]:
        """Returns all methods, and by which method's name each of them is trained.

        Methods that train the same modules in the same way are trained once.
        """
        found: dict[tuple[Any, ...], Method] = {}
        names = {}
        for method in (*self.kinds(), *self.depth(), *self.stock(), *self.components(), *self.budgets()):
            same = found.setdefault((method.modules, str(method.lora), method.b_over_a), method)
            names[method.name] = same.name
        return list(found.values()), names

    def _full(self, group: str, name: str, parts: Iterable[Component]) -> Method:
        parts = sorted(parts, key=self.parts.index)
        modules = tuple(path for part in parts for path in part.modules)
        return Method(group, name, modules, tuple(part.id for part in parts))

    def _of_kinds(self, *kinds: str) -> list[Component]:
        return [part for part in self.parts if part.kind in kinds]

    def kinds(self) -> list[Method]:
        """Returns the experiment of the paper, and pairs of kinds."""
        pairs = [("LN1", "LN2"), ("MHA", "FC1"), ("MHA", "FC2"), ("FC1", "FC2")]
        full = [self._full("kinds", " + ".join(kinds), self._of_kinds(*kinds)) for kinds in [*zip(KINDS), *pairs]]
        lora = [
            Method("kinds", f"{kind}, LoRA r=8", tuple(path for part in self._of_kinds(kind) for path in part.modules),
                   lora={"r": 8, "lora_alpha": 16})
            for kind in MATRIX_KINDS
        ]  # fmt: skip
        return [Method("kinds", EVERYTHING, ()), *full, *lora]

    def depth(self) -> list[Method]:
        """Returns parts of the depth, and the output projections of attention."""
        found = []
        count = len(self.blocks)
        for blocks in sorted({count // 2, max(1, count // 4)}):
            last = [part for part in self.parts if (part.stage or 0, part.block) in self.blocks[-blocks:]]
            found.append(self._full("depth", f"last {blocks} blocks", last))
        for name, blocks in (("first", self.blocks[: count // 2]), ("last", self.blocks[-(count // 2) :])):
            parts = [part for part in self._of_kinds("MHA") if (part.stage or 0, part.block) in blocks]
            found.append(self._full("depth", f"MHA of the {name} half", parts))
        found.append(self._full("depth", EARLY, usual_sets(self.parts)[EARLY]))
        outputs = tuple(part.modules[-1] for part in self._of_kinds("MHA") if len(part.modules) > 1)
        return [*found, Method("depth", "attention output", outputs)] if outputs else found

    def stock(self) -> list[Method]:
        """Returns the methods of PEFT without this package."""
        query_and_value = tuple(path for part in self._of_kinds("MHA") for path in part.modules[0:3:2])
        linears = tuple(self.linears)
        ranked = [path for path in self.kappa.get_best_targets() if path in set(linears)]
        kappa = tuple(ranked[: max(1, len(linears) // 5)])  # a fifth of the layers, as PEFT's documentation advises
        r8 = {"r": 8, "lora_alpha": 16}
        return [
            Method("stock", "LoRA on all linear layers, r=8", linears, lora=r8),
            Method("stock", "LoRA on all linear layers, r=2", linears, lora={"r": 2, "lora_alpha": 16}),
            Method("stock", "LoRA on query and value, r=8", query_and_value, lora=r8),
            Method("stock", "LoRA+ on all linear layers, r=8", linears, lora=r8, b_over_a=16.0, lowest_factor=0.064),
            Method(
                "stock",
                "EVA on all linear layers, r=8",
                linears,
                lora={**r8, "init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
                lowest_factor=0.064,
            ),
            Method("stock", "LoRA on KappaTune's layers, r=8", kappa, lora=r8),
        ]

    def components(self) -> list[Method]:
        """Returns single components: those that each criterion ranks first, and random ones."""
        total = sum(part.parameters for part in self.parts)
        rankings = {name: [row.unit for row in report.ranking("component")] for name, report in self.reports.items()}
        names = [part.id for part in self.parts]
        rankings |= {f"random {seed}": random.Random(seed).sample(names, len(names)) for seed in range(2)}
        return [
            self._full("components", f"{name}, {share:.2f}", self._first(ranking, share * total))
            for share in self.shares
            for name, ranking in rankings.items()
        ]

    def budgets(self) -> list[Method]:
        """Returns the components that a forecast found."""
        by_id = {part.id: part for part in self.parts}
        return [self._full("budgets", name, [by_id[each] for each in ids]) for name, ids in self.found.items()]

    def _first(self, ranking: Sequence[str], limit: float) -> list[Component]:
        """Returns the components of a ranking that fit into a number of parameters, in turn."""
        by_id = {part.id: part for part in self.parts}
        chosen: list[Component] = []
        for name in ranking:
            if sum(part.parameters for part in chosen) + by_id[name].parameters <= limit:
                chosen.append(by_id[name])
        return chosen or [by_id[ranking[0]]]
