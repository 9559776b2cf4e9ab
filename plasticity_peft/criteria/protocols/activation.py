"""The protocol "activation": each component gets what it receives in the running network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Call, Inputs, first_tensor, hooked, per_image, run
from plasticity_peft.criteria.protocols.distances import Distance, Distances, euclidean, together


class ActivationProtocol:
    """Distances between the inputs and between the outputs of the components in a forward pass. No tokens are kept."""

    def __init__(self, model: nn.Module, architecture: Architecture, distance: Distance = euclidean) -> None:
        self._model, self._architecture, self._distance = model, architecture, distance
        self._paths = [
            (part.path,) if part.kind == "MHA" else part.modules  # a gated FC1 returns the outputs of all its layers
            for part in architecture.components
        ]
        self._modules = {path: model.get_submodule(path) for paths in self._paths for path in paths}

    def __call__(self, both: Inputs) -> Distances:
        """Returns the distances of some pairs: `both` contains the first images of all pairs, then the second ones."""
        images = len(next(iter(both.values())))
        outputs: dict[str, torch.Tensor] = {}
        inputs: dict[str, torch.Tensor] = {}
        last: list[tuple[torch.Tensor, int, torch.Tensor]] = []

        def distance(tokens: torch.Tensor) -> torch.Tensor:
            # The output of one component is often the input of the next one, unless it was changed in place (ReLU).
            version = -1 if tokens.is_inference() else tokens._version
            if not (last and last[0][0] is tokens and last[0][1] == version >= 0):
                last[:] = [(tokens, version, self._distance(per_image(tokens, images)))]
            return last[0][2]

        def reduce(name: str, call: Call, output: Any) -> None:
            inputs[name] = distance(call.tokens)
            outputs[name] = distance(first_tensor(output))

        with hooked(self._modules, reduce):
            run(self._model, self._architecture, both)
        device = next(iter(both.values())).device
        return Distances(
            torch.stack([together([outputs[path] for path in paths]).to(device) for paths in self._paths], dim=1),
            torch.stack([inputs[paths[0]].to(device) for paths in self._paths], dim=1),
        )
