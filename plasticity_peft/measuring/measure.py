"""The loop: images through a model, observations of a criterion into moments, moments into a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from plasticity_peft.checks import HIGHEST_SEED, MOST_PAIRS, check_count, check_path, check_settle
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import Inputs, block_input, check_calls, input_names, why_unlike
from plasticity_peft.components.component import KINDS
from plasticity_peft.components.offloading import execution_device, onloaded
from plasticity_peft.components.quantized import trainable_after
from plasticity_peft.components.wrappers import uncompiled, walk
from plasticity_peft.criteria import CRITERIA, resolve
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.precision import check_dtype
from plasticity_peft.errors import ConfigError, DataError, ModelError, NonFiniteError
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.sampler import Probe
from plasticity_peft.measuring.left_as_found import left_as_found
from plasticity_peft.measuring.processes import Share, in_step, this_process
from plasticity_peft.measuring.rounds import Seen, Table, check_finite, check_same, observe_until_settled
from plasticity_peft.measuring.settling import Settling, looks
from plasticity_peft.report.provenance import provenance_of
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.report.scores import Ending, KindScore, Score
from plasticity_peft.report.selection import choice_of

# Below the logger of transformers, so that its verbosity, set once, holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

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
    settle: float | None = 0.95,
    top_k: int | None = None,
    budget: float | None = None,
    granularity: str = "kind",
    candidates: Iterable[str] = KINDS,
    training: str = "lora",
    dtype: str | torch.dtype | None = None,
    backbone: str | None = None,
    **lora: Any,
) -> PlasticityReport:
    """Returns a score for every component of `model`: how much it is worth to train.

    The model is left as it was. Under `accelerate launch` the images are spread over the processes, and each returns
    the same report.

    Args:
        model: a vision transformer of transformers, with or without a head, on any device or, with a `device_map`, on
            several, or a model that has one as a part (of a model that also needs text, only that part is run). It is
            run in evaluation mode and, without `dtype`, in its own dtype; differences and norms are taken at least in
            float32. Adapters that it carries are part of what is measured.
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
        pairs: how many pairs of images at most, or images where a criterion looks at them one by one; at least 2.
            There are fewer where the images do not make as many different ones.
        batch_size: pairs or images in one pass, on each process. Where memory does not suffice it is halved.
        seed: of the drawing of images, of what a criterion draws, and of the dataset's own transforms.
        settle: ends as soon as the units that would be chosen differ from the rest at this confidence (see
            `plasticity_peft/settling.py`); None looks at all `pairs`. `report.ending` tells how it went.
        top_k: what is to be chosen, as in `PlasticityReport.select`, so that it is settled what to settle; with
            neither this nor `budget`, the best unit. The report may be cut elsewhere all the same.
        budget: see `top_k`.
        granularity: see `top_k`.
        candidates: see `top_k`.
        training: see `top_k`.
        dtype: "bfloat16" or "float16" runs the model in that precision by autocast; None in its own. Differences,
            norms and scores are float32 or more in any case.
        backbone: path of the vision transformer in a model that holds several, such as "model.vision_tower".
        lora: `r`, `rank_pattern`, `use_dora`, `lora_bias`, which count in a `budget`.

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
    check_count("pairs", pairs, 2, MOST_PAIRS)
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0, HIGHEST_SEED)
    check_settle(settle)
    check_path("backbone", backbone)
    dtype = check_dtype(dtype)
    check_target(rule, target)
    model = uncompiled(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    architecture = find_architecture(model, backbone)
    _check_device(model)
    cut = {"granularity": granularity, "candidates": candidates, "training": training, **lora}
    choice = choice_of(architecture.components, architecture.parameters, top_k, budget, **cut)
    # What reads only weights gives the same in every process: there is nothing to merge.
    share = Share(0, 1) if rule.observed == "weights" else this_process()
    ready: list[_Ready] = []

    def get_ready() -> tuple[int, int, str]:
        _check_weights(model)
        names = input_names(model, architecture)
        probe = _probe(model, target, source, pairs, names, inputs=inputs or "", batch_size=batch_size, seed=seed)
        example = probe.example(model, architecture)
        check_calls(model, architecture, example)
        if inputs == "embedding":
            _check_alike(model, architecture, example)
        spread = _spread(model, architecture, example) if rule.protocols else None
        ready.append(_Ready(probe, rule.prepare(model, architecture, probe), spread))
        planned = 1 if rule.observed == "weights" else probe.planned(rule.observed)
        return planned, len(architecture.components), architecture.model_type

    with left_as_found(model, seed, dtype), trainable_after(model):
        planned, *_ = check_same("number of images, or model", in_step(share, get_ready))
        (at,) = ready
        settling = Settling(choice, confidence=settle or 0.0, looks=_number_of_looks(rule, planned))
        table = Table(architecture, rule, settling)
        if rule.observed == "weights":
            values, _ = at.observe(None)
            check_finite(table, values)
            seen = Seen(table.moments(values), skipped=0)
        else:
            seen = observe_until_settled(at.observe, table, at.probe, share, stop_early=settle is not None)
            _check_enough(seen)
    ending = None
    if settle is not None and rule.observed != "weights":
        chosen = choice.chosen(table.ranking(seen.moments))
        ending = Ending(seen.settled, chosen, granularity, settle, planned)
        _tell(ending, rule, seen, share)
    return _report(
        table,
        seen,
        ending=ending,
        inputs=inputs,
        input_std=at.spread,
        seed=seed,
        source=source is not None and rule.protocols,
        target_data=None if rule.observed == "weights" else provenance_of(target),
        source_data=provenance_of(source) if rule.protocols else None,
    )


class _Ready(NamedTuple):
    """What is made before the first round."""

    probe: Probe
    observe: Callable[[Any], Observations]
    spread: float | None


def _number_of_looks(rule: Criterion, planned: int) -> int:
    return 1 if rule.observed == "weights" else len(looks(planned, rule.observed))


def _check_enough(seen: Seen) -> None:
    """Raises DataError where there are too few pairs to tell how far they spread."""
    count = seen.moments.count
    if count < 2:
        raise DataError(
            f"Only {count} of {count + seen.skipped} pairs have a rate of change; in the others a component gets the "
            "same input for both images. Give images that differ."
        )


def _spread(model: nn.Module, architecture: Architecture, example: Inputs) -> float:
    """Returns the spread of the features of a token that enters block 0, mean over the tokens of an image."""
    tokens = block_input(model, architecture, example).tokens.float()
    return float(tokens.std(dim=-1, correction=0).mean())


def _tell(ending: Ending, rule: Criterion, seen: Seen, share: Share) -> None:
    if share.rank > 0:
        return
    units, count = ", ".join(ending.units) or "nothing", seen.moments.count
    if ending.settled:
        logger.info("Settled after %s of %s %s: %s", count, ending.most, rule.observed, units)
    else:
        logger.warning(
            "Not settled: after %s %s, the choice of %s does not stand out from the rest at a confidence of %s. More "
            "images (pairs=...), or another top_k, may settle it; the standard errors tell how close it is.",
            count, rule.observed, units, ending.confidence,
        )  # fmt: skip


def _check_device(model: nn.Module) -> None:
    """Raises ModelError on a device that has no double precision, in which sums are taken."""
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        raise ModelError(
            "The model is on a GPU of Apple (mps), which has no float64. Measure it on the CPU, model.to('cpu'), and "
            "move it back to train."
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


def _probe(model: nn.Module, target: Any, source: Any, count: int, names: tuple[str, ...], **settings: Any) -> Probe:
    """Returns what a criterion may look at. Raises DataError where there are too few images."""
    seed = settings["seed"]
    images = None if target is None else Images(target, "target", read_at_most=2 * count, names=names, seed=seed)
    others = None if source is None else Images(source, "source", read_at_most=count, names=names, seed=seed)
    for held in (images, others):
        if held is not None and not held.has(1):
            raise DataError(f"{held.name} must hold at least 2 images. Got {len(held)}.")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return Probe(target=images, source=others, count=count, device=execution_device(model), dtype=dtype, **settings)


def _check_weights(model: nn.Module) -> None:
    for path, module in walk(model):
        with onloaded(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    raise ModelError(f"The model has no weights yet: {path}.{name} is on the meta device. Load them.")
                plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
                if plain and not torch.isfinite(parameter).all():
                    raise NonFiniteError(f"The weights of the model hold NaN or infinity: {path}.{name}.")


def _report(table: Table, seen: Seen, **settings: Any) -> PlasticityReport:
    architecture, rule, moments, names = table.architecture, table.rule, seen.moments, table.names
    parts = architecture.components
    exact = rule.observed == "weights"
    means = moments.mean[: len(names)]
    spread = np.zeros_like(means) if exact else moments.std[: len(names)]
    if not means.any():
        raise ModelError(f"The {rule.name} of every component is 0: there is nothing to rank by.")
    estimates = []
    for name, mean, std in zip(names, means, spread, strict=True):
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
        skipped=seen.skipped,
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
