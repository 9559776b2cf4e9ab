"""The loop: images through a model, observations of a criterion into moments, moments into a report."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from plasticity_peft.architectures import Architecture, find_architecture, walk
from plasticity_peft.calls import block_input, check_calls, input_names, why_unlike
from plasticity_peft.checks import check_count
from plasticity_peft.components import KINDS
from plasticity_peft.criteria import CRITERIA, resolve
from plasticity_peft.criteria.criterion import Criterion
from plasticity_peft.errors import ConfigError, DataError, ModelError, NonFiniteError
from plasticity_peft.images import Images, Inputs
from plasticity_peft.isolation import left_as_found
from plasticity_peft.moments import Moments
from plasticity_peft.probe import Probe
from plasticity_peft.processes import Share, merge_over_processes
from plasticity_peft.report import PlasticityReport
from plasticity_peft.scores import KindScore, Score

PACKAGES = ("plasticity_peft", "torch", "transformers", "peft", "accelerate")


def measure_plasticity(
    model: nn.Module,
    target: Any = None,
    source: Any = None,
    *,
    criterion: str | None = None,
    inputs: str | None = None,
    pairs: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    backbone: str | None = None,
) -> PlasticityReport:
    """Returns a score for every component of `model`: how much it is worth to train.

    The model is left as it was. Under `accelerate launch` the images are spread over the processes, and each returns
    the same report.

    Args:
        model: a vision transformer of transformers, with or without a head, on any one device, or a model that has one
            as a part (of a model that also needs text, only that part is run). It is run in evaluation mode and in its
            own dtype; differences and norms are taken at least in float32. Adapters that it carries are part of what
            is measured.
        target: downstream images: a datasets.Dataset or torch Dataset whose items have floating-point pixel_values of
            shape (channels, height, width), and whatever else the model takes for an image; a DataLoader of such items
            (its dataset and collate_fn are used), a tensor (images, channels, height, width), or a stream, of which
            the first images are read. Criteria that use labels need items with labels too; those that read only
            weights need no images.
        source: pretraining-like images, in the same forms. With them a pair is one source and one target image, as in
            the paper; without, two different target images. Criteria that look at single images take the target's.
        criterion: the rule that scores, by name. "parameter_plasticity", the default, is the norm of the Jacobian of
            the model's features by the component's parameters. "rate_of_change" is the paper's measure,

                P(f) = E_(x,y) [ ||f(x) - f(y)||_F / ||x - y||_F ]        (arXiv 2602.06883).

            The others are "relative_rate_of_change", "token_sensitivity", "bound", "gradient_norm",
            "relative_gradient_norm", "condition_number", "feature_norm", "inverse" and "random"; each file in
            `plasticity_peft/criteria` gives formula and source.
        inputs: what components are fed by "rate_of_change" (which it stands for if `criterion` is not given) and its
            relatives: "embedding", the paper's protocol: every component gets the tokens that enter block 0; or
            "activation": every component gets what it receives in the running network.
        pairs: how many pairs of images, or images where a criterion looks at them one by one; at least 2. Fewer are
            used where the images do not make as many different ones.
        batch_size: pairs or images in one pass, on each process.
        seed: of the drawing of images, of what a criterion draws, and of the dataset's own transforms.
        backbone: path of the vision transformer in a model that holds several, such as "model.vision_tower".

    Raises:
        ConfigError: an argument is out of its range.
        DataError: too few images, images that the model does not take, or labels that are missing.
        ModelError: the model is not a supported vision transformer, or lacks what the criterion needs.
        NonFiniteError: NaN or infinity in the model's weights, the images, the activations or the scores.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> images = torch.rand(10, 3, 8, 8)
        >>> measure_plasticity(model, images).criterion
        'parameter_plasticity'
        >>> report = measure_plasticity(model, images, criterion="rate_of_change", pairs=16)
        >>> report.inputs, report.pairs, len(report.scores)
        ('embedding', 16, 10)
    """
    criterion, inputs = resolve(criterion, inputs)
    rule = CRITERIA[criterion]
    check_count("pairs", pairs, 2)
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    check_target(rule, target)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    architecture = find_architecture(model, backbone)
    spread: list[float] = []

    def measure(share: Share) -> tuple[Moments, int]:
        _check_weights(model)
        probe = _probe(
            model, architecture, target, source, pairs, share, inputs=inputs or "", batch_size=batch_size, seed=seed
        )
        example = probe.example(model, architecture)
        check_calls(model, architecture, example)
        if inputs == "embedding":
            _check_alike(model, architecture, example)
        if rule.protocols:
            tokens = block_input(model, architecture, example).tokens.float()
            spread.append(float(tokens.std(dim=-1, correction=0).mean()))
        return _accumulate(model, architecture, rule, probe)

    with left_as_found(model, seed):
        # What reads only weights gives the same in every process: there is nothing to merge.
        moments, skipped = measure(Share(0, 1)) if rule.observed == "weights" else merge_over_processes(measure)
    if rule.observed != "weights" and moments.count < 2:
        raise DataError(
            f"Only {moments.count} of {moments.count + skipped} pairs have a rate of change; in the others a "
            "component gets the same input for both images. Give images that differ."
        )
    return _report(
        architecture,
        rule,
        moments,
        skipped=skipped,
        inputs=inputs,
        input_std=spread[0] if spread else None,
        seed=seed,
        source=source is not None and rule.protocols,
    )


def _check_alike(model: nn.Module, architecture: Architecture, example: Inputs) -> None:
    """Raises ModelError unless one and the same input can be fed to all components, as the paper's protocol does."""
    reason = why_unlike(model, architecture, example)
    if reason:
        raise ModelError(
            f'inputs="embedding" feeds the tokens that enter the first block to every component, and {reason} '
            f'({type(model).__name__}, model type {architecture.model_type}). Use inputs="activation".'
        )


def check_target(criterion: Criterion, target: Any) -> None:
    """Raises ConfigError where the criterion looks at images and there are none."""
    if target is None and criterion.observed != "weights":
        raise ConfigError(
            f"criterion={criterion.name!r} has nothing to rank by: give images to measure on (target_data in a "
            "PlasticityConfig, or a report measured before)."
        )


def _probe(
    model: nn.Module, architecture: Architecture, target: Any, source: Any, count: int, share: Share, **settings: Any
) -> Probe:
    """Returns what a criterion may look at. Raises DataError where there are too few images."""
    names = input_names(model, architecture)
    images = None if target is None else Images(target, "target", read_at_most=2 * count, names=names)
    others = None if source is None else Images(source, "source", read_at_most=count, names=names)
    for held in (images, others):
        if held is not None and len(held) < 2:
            raise DataError(f"{held.name} must hold at least 2 images. Got {len(held)}.")
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return Probe(
        target=images,
        source=others,
        count=count,
        share=share,
        device=parameter.device,
        dtype=parameter.dtype,
        **settings,
    )


def _accumulate(model: nn.Module, architecture: Architecture, rule: Criterion, probe: Probe) -> tuple[Moments, int]:
    """Returns the moments of what the criterion observes, and how many pairs were skipped.

    The columns are the components in the order of the architecture, followed by the kinds: the mean over blocks,
    observation by observation, whose spread is the uncertainty of a kind.
    """
    moments = Moments.of(np.empty((0, len(architecture.components) + len(KINDS))))
    skipped = 0
    for values, left_out in rule.observe(model, architecture, probe):
        _check_finite(architecture, rule, values)
        seen = values.detach().cpu().numpy()
        of_kinds = seen.reshape(len(seen), len(architecture.blocks), len(KINDS)).mean(axis=1)
        moments = moments.merge(Moments.of(np.concatenate([seen, of_kinds], axis=1)))
        skipped += left_out
    return moments, skipped


def _check_weights(model: nn.Module) -> None:
    for path, module in walk(model):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise NonFiniteError(f"The weights of the model hold NaN or infinity: {path}.{name}.")


def _check_finite(architecture: Architecture, rule: Criterion, values: torch.Tensor) -> None:
    columns = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
    if columns:
        part = architecture.components[columns[0]]
        raise NonFiniteError(
            f"The {rule.name} of {part.id} ({part.path}) is NaN or infinite. In half precision this is often "
            "overflow: measure the model in float32 or bfloat16."
        )


def _report(
    architecture: Architecture, rule: Criterion, moments: Moments, *, skipped: int, **settings: Any
) -> PlasticityReport:
    parts = architecture.components
    exact = rule.observed == "weights"
    spread = np.zeros_like(moments.mean) if exact else moments.std
    names = [*(part.id for part in parts), *KINDS]
    if not moments.mean.any():
        raise ModelError(f"The {rule.name} of every component is 0: there is nothing to rank by.")
    estimates = []
    for name, mean, std in zip(names, moments.mean, spread, strict=True):
        if mean == 0 and rule.power < 0:
            raise NonFiniteError(f"The {rule.name} of {name} is infinite: 1 / 0.")
        # The spread of mean ** power, to first order.
        slope = abs(rule.power) * mean ** (rule.power - 1) if mean > 0 else 0.0
        estimates.append(
            {"mean": float(mean**rule.power), "std": float(slope * std), "pairs": 0 if exact else moments.count}
        )
    of_parts, of_kinds = estimates[: len(parts)], estimates[len(parts) :]
    return PlasticityReport(
        scores=tuple(Score(**vars(part), **row) for part, row in zip(parts, of_parts, strict=True)),  # type: ignore[arg-type]
        kinds=tuple(KindScore(kind=kind, **row) for kind, row in zip(KINDS, of_kinds, strict=True)),  # type: ignore[arg-type]
        model_type=architecture.model_type,
        model_parameters=architecture.parameters,
        criterion=rule.name,
        title=rule.title,
        observed=rule.observed,
        pairs=0 if exact else moments.count,
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
