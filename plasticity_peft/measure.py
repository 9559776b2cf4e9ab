"""The loop: pairs of images through a model, rates of change into moments, moments into a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from plasticity_peft.architectures import Architecture, find_architecture, walk
from plasticity_peft.calls import check_calls
from plasticity_peft.checks import PROTOCOLS, check_choice, check_count
from plasticity_peft.components import KINDS
from plasticity_peft.criteria import rate_of_change
from plasticity_peft.errors import DataError, NonFiniteError
from plasticity_peft.images import Images
from plasticity_peft.isolation import left_as_found
from plasticity_peft.moments import Moments
from plasticity_peft.pairs import batches, draw_pairs
from plasticity_peft.processes import Share, merge_over_processes
from plasticity_peft.report import PlasticityReport
from plasticity_peft.scores import KindScore, Score

Pairs = tuple[torch.Tensor, torch.Tensor]
PACKAGES = ("plasticity_peft", "torch", "transformers", "peft", "accelerate")


def measure_plasticity(
    model: nn.Module,
    target: Any,
    source: Any = None,
    *,
    inputs: str = "embedding",
    pairs: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
) -> PlasticityReport:
    """Returns the plasticity of every component of `model`: the mean over pairs of images of its rate of change.

        P(f) = E_(x,y) [ ||f(x) - f(y)||_F / ||x - y||_F ]        (arXiv 2602.06883)

    The model is left as it was. Under `accelerate launch` the pairs are spread over the processes, and each returns
    the same report.

    Args:
        model: a vision transformer of transformers, with or without a head, on any one device. It is run in evaluation
            mode and in its own dtype; differences and norms are taken at least in float32. Adapters that it carries
            are part of what is measured.
        target: downstream images: a datasets.Dataset or torch Dataset whose items have floating-point pixel_values of
            shape (channels, height, width), a DataLoader of such items (its dataset and collate_fn are used), a tensor
            (images, channels, height, width), or a stream, of which the first images are read.
        source: pretraining-like images, in the same forms. With them a pair is one source and one target image, as in
            the paper; without, two different target images.
        inputs: "embedding", the paper's protocol: every component is fed the tokens that enter block 0; or
            "activation": every component is fed what it receives in the running network.
        pairs: how many pairs, at least 2. Fewer are used where the images do not make as many different ones.
        batch_size: pairs (not images) in one forward pass, on each process.
        seed: of the drawing of pairs, and of whatever is random in the dataset's own transforms.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: too few images, or images that the model does not take.
        ModelError: the model is not a supported vision transformer.
        NonFiniteError: NaN or infinity in the model's weights, the images or the activations.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> report = measure_plasticity(model, torch.rand(10, 3, 8, 8), pairs=16)
        >>> report.pairs, len(report.scores)
        (16, 10)
    """
    check_choice("inputs", inputs, PROTOCOLS)
    check_count("pairs", pairs, 2)
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    architecture = find_architecture(model)

    def measure(share: Share) -> tuple[Moments, int]:
        _check_weights(model)
        images, others = _images(target, source, pairs)
        indices = draw_pairs(pairs, target=len(images), source=None if others is None else len(others), seed=seed)
        mine = indices[share.rank :: share.world_size]
        shown = _with_progress(batches(images, others, mine, batch_size), len(mine), quiet=share.rank > 0)
        return _accumulate(model, architecture, rate_of_change.PROTOCOLS[inputs], shown)

    with left_as_found(model, seed):
        moments, skipped = merge_over_processes(measure)
    if moments.count < 2:
        raise DataError(
            f"Only {moments.count} of {moments.count + skipped} pairs have a rate of change; in the others a "
            "component gets the same input for both images. Give images that differ."
        )
    return _report(architecture, moments, skipped=skipped, inputs=inputs, seed=seed, source=source is not None)


def _images(target: Any, source: Any, pairs: int) -> tuple[Images, Images | None]:
    """Returns the images to draw pairs from. Raises DataError where they are too few."""
    images = Images(target, "target", read_at_most=2 * pairs)
    others = None if source is None else Images(source, "source", read_at_most=pairs)
    for held in (images, others):
        if held is not None and len(held) < 2:
            raise DataError(f"{held.name} must hold at least 2 images. Got {len(held)}.")
    return images, others


def _with_progress(pairs: Iterable[Pairs], total: int, *, quiet: bool) -> Iterator[Pairs]:
    from transformers.utils.logging import tqdm

    with tqdm(total=total, desc="Measuring plasticity", unit="pair", disable=quiet) as progress:
        for x, y in pairs:
            yield x, y
            progress.update(len(x))


def _accumulate(
    model: nn.Module, architecture: Architecture, distances_of: rate_of_change.Protocol, pairs: Iterable[Pairs]
) -> tuple[Moments, int]:
    """Returns the moments of the rates of change of the pairs, and how many pairs were skipped.

    The columns are the components in the order of the architecture, followed by the kinds: the mean over blocks, pair
    by pair, whose spread is the uncertainty of a kind.
    """
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    moments = Moments.of(np.empty((0, len(architecture.components) + len(KINDS))))
    skipped, checked = 0, False
    for x, y in pairs:
        x, y = (images.to(parameter.device, parameter.dtype) for images in (x, y))
        if not checked:
            check_calls(model, architecture, x[:1])
            checked = True
        distances = distances_of(model, architecture, x, y)
        _check_finite(architecture, distances)
        apart = (distances.inputs > 0).all(dim=1)
        rates = (distances.outputs[apart] / distances.inputs[apart]).cpu().numpy()
        of_kinds = rates.reshape(len(rates), len(architecture.blocks), len(KINDS)).mean(axis=1)
        moments = moments.merge(Moments.of(np.concatenate([rates, of_kinds], axis=1)))
        skipped += int((~apart).sum())
    return moments, skipped


def _check_weights(model: nn.Module) -> None:
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise NonFiniteError(f"The weights of the model hold NaN or infinity: {path}.{name}.")


def _check_finite(architecture: Architecture, distances: rate_of_change.Distances) -> None:
    for what, values in zip(("outputs", "inputs"), distances, strict=True):
        columns = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
        if columns:
            component = architecture.components[columns[0]]
            raise NonFiniteError(
                f"The {what} of {component.id} ({component.path}) hold NaN or infinity. In half precision this is "
                "often overflow: measure the model in float32 or bfloat16."
            )


def _report(architecture: Architecture, moments: Moments, *, skipped: int, **settings: Any) -> PlasticityReport:
    estimates = [
        {"mean": float(mean), "std": float(std), "pairs": moments.count}
        for mean, std in zip(moments.mean, moments.std, strict=True)
    ]
    parts = architecture.components
    of_parts, of_kinds = estimates[: len(parts)], estimates[len(parts) :]
    return PlasticityReport(
        scores=tuple(Score(**vars(part), **row) for part, row in zip(parts, of_parts, strict=True)),  # type: ignore[arg-type]
        kinds=tuple(KindScore(kind=kind, **row) for kind, row in zip(KINDS, of_kinds, strict=True)),  # type: ignore[arg-type]
        model_type=architecture.model_type,
        model_parameters=architecture.parameters,
        pairs=moments.count,
        skipped=skipped,
        versions=_versions(),
        **settings,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
