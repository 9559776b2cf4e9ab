"""The measurement: a model and images in, a report out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from logging import INFO, WARNING
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from plasticity_peft.arguments import check_arguments
from plasticity_peft.checks import check_flag
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import (
    Inputs,
    block_input,
    check_calls,
    input_names,
    label_names,
    projections_called,
    why_unlike,
    with_forward_kwargs,
)
from plasticity_peft.components.component import KINDS
from plasticity_peft.components.offloading import execution_device, onloaded
from plasticity_peft.components.sharding import whole
from plasticity_peft.components.wrappers import walk
from plasticity_peft.criteria.criterion import AnyCriterion, Criterion, WeightCriterion
from plasticity_peft.criteria.registry import CRITERIA, resolve
from plasticity_peft.deprecation import renamed_arguments
from plasticity_peft.errors import ConfigError, DataError, ModelError, NonFiniteError
from plasticity_peft.images.blank import blank_image
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.items import LABELS
from plasticity_peft.images.sampler import Batches, Pairs, Sampler
from plasticity_peft.measuring.costs import costs_of
from plasticity_peft.measuring.forecast import MOST_IMAGES, forecast_finetuning
from plasticity_peft.measuring.left_as_found import run_left_as_found
from plasticity_peft.measuring.processes import Share, failing_together, same, this_process
from plasticity_peft.measuring.rounds import Columns, Seen, observe_until_settled
from plasticity_peft.measuring.settling import Settling, error_factor, looks
from plasticity_peft.measuring.sharing import Observed
from plasticity_peft.report.confidence import tied
from plasticity_peft.report.cost import Costs
from plasticity_peft.report.provenance import Provenance, provenance_of
from plasticity_peft.report.report import PlasticityReport, warn_if_not_settled
from plasticity_peft.report.scores import Ending, KindScore, Score
from plasticity_peft.report.selection import Choice, SelectionRule, mode
from plasticity_peft.report.text import how_it_ended

# A child of the logger of transformers, so that its verbosity applies here too.
logger = logging.get_logger(f"transformers.{__name__}")

PACKAGES = ("plasticity_peft", "torch", "transformers", "peft", "accelerate")


@renamed_arguments(target="target_data", source="source_data", pairs="max_samples")
def measure_plasticity(
    model: nn.Module,
    target_data: Any = None,
    source_data: Any = None,
    *,
    criterion: str | None = None,
    inputs: str | None = None,
    max_samples: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    settle: float | None = 0.95,
    top_k: int | None = None,
    budget: float | str | None = None,
    granularity: str = "kind",
    candidates: Iterable[str] = KINDS,
    training: str | None = None,
    r: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    lora_bias: bool = False,
    dtype: str | torch.dtype | None = None,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    forecast: bool = False,
) -> PlasticityReport:
    """Returns a score for every component of `model`: how promising it is to train the component.

    The model is left as it was. Under `accelerate launch` the images are spread over the processes, and each process
    returns the same report.

    Args:
        model: a vision transformer of transformers, with or without a head, or a model that contains one. If the model
            also needs text, only its vision part is run. The model may be on any device or, with a `device_map`, on
            several. It is run in evaluation mode and, without `dtype`, in its own dtype; differences and norms are
            computed at least in float32. Adapters on the model are measured as a part of it.
        target_data: downstream images: a datasets.Dataset or torch Dataset whose items have floating-point
            pixel_values of shape (channels, height, width), and any other inputs that the model takes for an image; a
            DataLoader of such items; a tensor of shape (images, channels, height, width); or a stream. Criteria that
            use the model's loss need items with labels, in any form that the loss takes. Criteria that read only
            weights need no images. Of a DataLoader, the images that its sampler yields are used. If it has a
            collate_fn of its own, which may pad or mix images, its batches are used as they come, also by criteria
            that look at batches, instead of `batch_size`. A stream is shuffled through a buffer of 1,000 images or 1
            GiB.
        source_data: pretraining-like images, in the same forms. With them, a pair is one source and one target image,
            as in the paper. Without them, it is two different target images. Criteria that look at single images use
            the target images.
        criterion: name of the criterion. "parameter_plasticity", the default, is the norm of the Jacobian of the
            model's features with respect to the component's parameters. "rate_of_change" is the paper's measure,

                P(f) = E_(x,y) [ ||f(x) - f(y)||_F / ||x - y||_F ]        (arXiv 2602.06883).

            The others are "relative_rate_of_change", "token_sensitivity", "bound", "gradient_norm",
            "relative_gradient_norm", "condition_number", "feature_norm", "inverse", "random" and those of
            `register_criterion`. The files in `plasticity_peft/criteria` give formulas and sources.
        inputs: what "rate_of_change" and its relatives feed to the components: "embedding", the paper's protocol,
            feeds every component the tokens that enter block 0; "activation" feeds each component what it receives in
            the running network. If `criterion` is not given, `inputs` selects "rate_of_change".
        max_samples: largest number of samples, at least 2. A sample is a pair of images, an image or a batch of
            images, depending on the criterion. There are fewer if the images make fewer different samples.
        batch_size: number of pairs or images in one pass on each process. It is halved if memory runs out.
        seed: seed of the drawing of images, of the criterion's random numbers and of the dataset's own transforms.
        settle: confidence for early stopping. Measuring stops once the units that would be selected are statistically
            separated from the others. None uses all samples. `report.ending` contains the outcome.
        top_k: number of units you plan to select, as in `PlasticityReport.select`. This and the next arguments only
            affect when measuring stops; you can select differently later. Without `top_k` and `budget` it is 1.
        budget: see `top_k`.
        granularity: see `top_k`.
        candidates: see `top_k`.
        training: see `top_k`.
        r: rank of LoRA, as in `peft.LoraConfig`, by default 8. This and the next three arguments affect how a `budget`
            is counted.
        rank_pattern: see `r`.
        use_dora: see `r`.
        lora_bias: see `r`.
        dtype: "bfloat16" or "float16" runs the model in that precision by autocast; None runs it in its own.
            Differences, norms and scores always have at least float32.
        backbone: path of the vision transformer in a model that contains several, such as "model.vision_tower".
        forward_kwargs: further arguments of each forward pass, such as {"interpolate_pos_encoding": True} for images
            of another size than the model was made for. Values are numbers, strings, True, False, None, or lists and
            dictionaries of them.
        forecast: True also forecasts, from the labels of up to `max_samples` (at most 4,096) of the target images, the
            accuracy that finetuning each kind, pairs of kinds and everything will give. `report.forecast` contains it,
            with costs, learning rates and one recommended set; see `forecast_finetuning`. With a `budget`, and
            training in full, it also contains the set of candidates that promises most within it.

    Note: Only one model is measured at a time: another thread that measures waits. Other threads may run the model
    meanwhile, and may have hooks on it. They do not affect the scores, and their results change only in that the model
    is in evaluation mode. If a thread changes weights meanwhile, a ModelError is raised.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: there are too few images, the model does not take them, or labels are missing.
        ModelError: the model is not a supported vision transformer, or lacks what the criterion needs.
        NonFiniteError: there is NaN or infinity in the model's weights, the images, the activations or the scores.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> images = torch.rand(10, 3, 8, 8)
        >>> measure_plasticity(model, images).criterion
        'parameter_plasticity'
        >>> report = measure_plasticity(model, images, criterion="rate_of_change", max_samples=16)
        >>> report.inputs, report.samples, len(report.scores)
        ('embedding', 16, 10)
    """
    rule = SelectionRule(
        top_k=top_k,
        budget=budget,
        granularity=granularity,
        candidates=candidates,  # type: ignore[arg-type]  # the rule makes it a tuple
        training=mode(r, rank_pattern, use_dora, lora_bias) if training is None else training,
        r=8 if r is None else r,
        rank_pattern=rank_pattern,
        use_dora=use_dora,
        lora_bias=lora_bias,
    )
    settings = Settings(
        *resolve(criterion, inputs),
        max_samples=max_samples,
        batch_size=batch_size,
        seed=seed,
        settle=settle,
        dtype=dtype,  # type: ignore[arg-type]  # Settings replaces a torch.dtype by its name
        backbone=backbone,
        forward_kwargs=forward_kwargs,
    )
    if not check_flag("forecast", forecast):
        return measure_by(rule, settings, model, target_data, source_data)
    shared = {name: getattr(settings, name) for name in ("batch_size", "seed", "dtype", "backbone", "forward_kwargs")}
    # A forecast is of training in full. A budget for LoRA counts other parameters.
    shared |= {"budget": budget, "candidates": rule.candidates} if rule.training == "full" else {}
    # First, because it refuses more models and images.
    expected = forecast_finetuning(model, target_data, max_samples=min(max_samples, MOST_IMAGES), **shared)
    return replace(measure_by(rule, settings, model, target_data, source_data), forecast=expected)


@dataclass(frozen=True)
class Settings:
    """How a model is measured: the validated arguments of `measure_plasticity` with these names.

    Raises:
        ConfigError: a field is out of its range.
    """

    criterion: str
    inputs: str | None
    max_samples: int
    batch_size: int
    seed: int
    settle: float | None
    dtype: str | None
    backbone: str | None
    forward_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, value in check_arguments(vars(self)).items():
            object.__setattr__(self, name, value)


def measure_by(
    rule: SelectionRule, settings: Settings, model: nn.Module, target_data: Any, source_data: Any
) -> PlasticityReport:
    """Returns the report of a measurement that stops when what `rule` selects is settled; see `measure_plasticity`."""
    check_target(CRITERIA[settings.criterion], target_data)
    with whole(model) as inner:
        architecture = find_architecture(inner, settings.backbone)
        architecture = with_forward_kwargs(inner, architecture, settings.forward_kwargs)
        _check_device(inner)
        rule.check_possible(architecture.components, architecture.parameters)
        measuring = _Measuring(inner, architecture, rule, settings, target_data, source_data)
        return run_left_as_found(measuring.report, inner, settings.seed, settings.dtype, target_data, source_data)


@dataclass(frozen=True)
class _Measuring:
    """One measurement of one model."""

    model: nn.Module
    architecture: Architecture
    rule: SelectionRule
    settings: Settings
    target_data: Any
    source_data: Any
    contexts: ExitStack = field(default_factory=ExitStack)
    """Ends with the measurement."""

    def report(self) -> PlasticityReport:
        """Returns the report by the criterion of the settings."""
        criterion = CRITERIA[self.settings.criterion]
        with self.contexts:
            return self.weights(criterion) if isinstance(criterion, WeightCriterion) else self.images(criterion)

    def weights(self, criterion: WeightCriterion) -> PlasticityReport:
        """Returns the scores of a criterion that reads only weights, without samples."""
        _check_weights(self.model)
        target = None if self.target_data is None else self._images(self.target_data, "target_data", 1)
        image = blank_image(self.model, self.architecture, target)
        self._check_calls(image)
        costs = costs_of(self.model, self.architecture, image)
        columns = Columns(self.architecture, criterion, Settling(self._choice(costs), 0.0, looks=1))
        values = criterion.score(self.model, self.architecture, image=image, seed=self.settings.seed)[None]
        columns.check_finite(values)
        observed = columns.observed(values, np.empty((1, 0), dtype=np.int64))
        return self._report(columns, Seen(observed, skipped=0), costs, observed="weights")

    def _choice(self, costs: Costs | None) -> Choice:
        choice = self.rule.choice(self.architecture.components, self.architecture.parameters, lambda: costs)
        choice.check_ever_possible()
        return choice

    def images(self, criterion: Criterion) -> PlasticityReport:
        """Returns the scores of a criterion that looks at images, spread over all processes."""
        share = this_process()
        with failing_together(share):
            _check_weights(self.model)
            sampler = self._sampler(criterion)
            _log_order(sampler, share)
            example = sampler.example()
            self._check_calls(example)
            if self.settings.inputs == "embedding":
                _check_alike(self.model, self.architecture, example)
            costs = costs_of(self.model, self.architecture, example)
            choice = self._choice(costs)
            spread = _spread(self.model, self.architecture, example) if criterion.protocols else None
            observe = criterion.prepare(self.model, self.architecture, sampler)
            planned = sampler.planned()
        size = (planned, len(self.architecture.components), self.architecture.model_type)
        same(share, "number of images, or model", size)
        confidence = self.settings.settle
        number = 1 if confidence is None else len(looks(planned, sampler.first_look))
        settling = Settling(choice, confidence or 0.0, looks=number)
        columns = Columns(self.architecture, criterion, settling)
        seen = observe_until_settled(observe, columns, sampler, share, stop_early=confidence is not None)
        _check_enough(seen)
        ending = None
        if confidence is not None:
            chosen = choice.chosen(columns.ranking(seen.observed))
            if chosen:  # or the best unit does not fit into the budget
                ending = Ending(seen.settled, chosen, self.rule.granularity, confidence, planned)
        report = self._report(columns, seen, costs, observed=sampler.plural, ending=ending, input_std=spread)
        if share.rank == 0:
            _log(report, choice)
        return replace(
            report,
            target_provenance=_of_those_drawn(report.target_provenance, sampler),
            batch_size=sampler.images_per_batch if isinstance(sampler, Batches) else None,
        )

    def _check_calls(self, example: Inputs) -> None:
        """Raises ModelError unless a forward pass calls all layers, or attention can be made to call the others."""
        uncalled = check_calls(self.model, self.architecture, example)
        self.contexts.enter_context(projections_called(self.model, self.architecture, uncalled))

    def _images(self, data: Any, name: str, per_sample: int, whole_batches: bool = False) -> Images:
        """Returns images by index. Raises DataError if there are too few."""
        images = Images(
            data,
            name,
            read_at_most=per_sample * self.settings.max_samples,
            names=input_names(self.model, self.architecture),
            seed=self.settings.seed,
            label_names=label_names(self.model, self.architecture) or LABELS,
            whole_batches=whole_batches,
        )
        if not images.has(1):
            raise DataError(f"{name} must contain at least 2 images. Got {len(images)}.")
        return images

    def _sampler(self, criterion: Criterion) -> Sampler:
        source = None if self.source_data is None else self._images(self.source_data, "source_data", 1)
        return criterion.sampler(
            target=self._images(self.target_data, "target_data", 2, issubclass(criterion.sampler, Batches)),
            source=source,
            max_samples=self.settings.max_samples,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            device=execution_device(self.model),
            dtype=next(p.dtype for p in self.model.parameters() if p.is_floating_point()),
            inputs=self.settings.inputs,
        )

    def _report(
        self,
        columns: Columns,
        seen: Seen,
        costs: Costs | None,
        *,
        observed: str,
        ending: Ending | None = None,
        input_std: float | None = None,
    ) -> PlasticityReport:
        components = self.architecture.components
        exact, paired = observed == "weights", observed == Pairs.plural
        estimates = _estimates(columns, seen.observed, observed)
        of_components, of_kinds = estimates[: len(components)], estimates[len(components) :]
        return PlasticityReport(
            scores=tuple(Score(**vars(c), **row) for c, row in zip(components, of_components, strict=True)),  # type: ignore[arg-type]
            kinds=tuple(KindScore(kind=kind, **row) for kind, row in zip(KINDS, of_kinds, strict=True)),  # type: ignore[arg-type]
            model_type=self.architecture.model_type,
            model_parameters=self.architecture.parameters,
            criterion=columns.criterion.name,
            title=columns.criterion.title,
            inputs=self.settings.inputs,
            observed=observed,
            samples=0 if exact else seen.observed.moments.count,
            skipped=seen.skipped,
            seed=self.settings.seed,
            uses_source=paired and self.source_data is not None,
            versions=_versions(),
            input_std=input_std,
            ending=ending,
            target_provenance=None if exact else provenance_of(self.target_data),
            source_provenance=provenance_of(self.source_data) if paired else None,
            separation=columns.separation(seen.observed, selecting=ending is not None),
            costs=costs,
        )


def _estimates(columns: Columns, found: Observed, observed: str) -> list[dict[str, float | None]]:
    """Returns the fields of the score of each component and each kind."""
    criterion, means = columns.criterion, found.moments.mean
    if not means.any():
        raise ModelError(f"The {criterion.name} of every component is 0, so they cannot be ranked.")
    exact = observed == "weights"
    spreads = np.zeros_like(means) if exact else found.moments.std
    errors = None if exact else _errors(columns, found)
    estimates: list[dict[str, float | None]] = []
    for number, (name, mean) in enumerate(zip(columns.names, means, strict=True)):
        if mean == 0 and criterion.power < 0:
            raise NonFiniteError(f"The {criterion.name} of {name} is infinite: 1 / 0.")
        # The spread of mean ** power, to first order.
        slope = abs(criterion.power) * mean ** (criterion.power - 1) if mean > 0 else 0.0
        row = {"mean": float(mean**criterion.power), "std": float(slope * spreads[number])}
        error = None if errors is None else float(slope * errors[number])
        estimates.append({**row, "samples": 0 if exact else found.moments.count, "error": error})
    return estimates


def _errors(columns: Columns, found: Observed) -> np.ndarray:
    """Returns the standard errors of means; the mean itself if the samples do not contain how it varies."""
    variance, freedom = columns.spread(found).of_means()
    known = freedom > 0
    factors = error_factor(np.where(known, freedom, 1.0))
    return np.where(known, np.sqrt(variance) * factors, found.moments.mean)


def _check_enough(seen: Seen) -> None:
    """Raises DataError if there are too few samples to estimate their spread."""
    count = seen.observed.moments.count
    if count < 2:
        raise DataError(
            f"Only {count} of {count + seen.skipped} pairs have a rate of change; in the others a component gets the "
            "same input for both images. Give images that differ."
        )


def _spread(model: nn.Module, architecture: Architecture, example: Inputs) -> float:
    """Returns the standard deviation of the features of a token that enters block 0, mean over the tokens."""
    tokens = block_input(model, architecture, example).tokens.float()
    return float(tokens.std(dim=-1, correction=0).mean())


def _of_those_drawn(provenance: Provenance | None, sampler: Sampler) -> Provenance | None:
    """Returns the origin of the target images, with the number of images that the sampler of a DataLoader yields."""
    known = sampler.target.known
    return provenance if provenance is None or not known else replace(provenance, images=known)


def _log_order(sampler: Sampler, share: Share) -> None:
    """Logs that a stream is shuffled through a buffer; as a warning if it is sorted by class, or may be."""
    for images in (sampler.target, sampler.source):
        if share.rank == 0 and images is not None and images.order:
            logger.log(WARNING if images.looks_sorted else INFO, images.order)


def _log(report: PlasticityReport, choice: Choice) -> None:
    """Logs how the measurement ended; as a warning, if the selection is not settled."""
    ending = report.ending
    if ending is None:
        return
    if ending.settled:
        logger.info("%s", how_it_ended(report))
    else:
        reached = None if report.separation is None else report.separation.reached
        ranking = [row for row in report.ranking(ending.granularity) if row.unit in choice.units]
        warn_if_not_settled(report, ending.units, reached, tied(choice, ranking))


def _check_device(model: nn.Module) -> None:
    """Raises ModelError on a device without double precision, which sums need."""
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        raise ModelError(
            "The model is on an Apple GPU (mps), which has no float64. Measure it on the CPU, model.to('cpu'), and "
            "move it back to train."
        )


def _check_alike(model: nn.Module, architecture: Architecture, example: Inputs) -> None:
    """Raises ModelError unless the same input can be fed to all components, as the paper's protocol does."""
    reason = why_unlike(model, architecture, example)
    if reason:
        raise ModelError(
            f'inputs="embedding" feeds the tokens that enter the first block to every component, and {reason} '
            f'({type(model).__name__}, model type {architecture.model_type}). Use inputs="activation".'
        )


def check_target(criterion: AnyCriterion, target_data: Any) -> None:
    """Raises ConfigError if the criterion looks at images and there are none."""
    if target_data is None and isinstance(criterion, Criterion):
        raise ConfigError(
            f"criterion={criterion.name!r} needs images to measure on. Give target_data, or a report measured before."
        )


def _check_weights(model: nn.Module) -> None:
    for path, module in walk(model):
        with onloaded(module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    raise ModelError(f"The model has no weights yet: {path}.{name} is on the meta device. Load them.")
                plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
                if plain and not torch.isfinite(parameter).all():
                    raise NonFiniteError(f"The weights of the model contain NaN or infinity: {path}.{name}.")


@cache
def _version(package: str) -> str:
    """Returns the version of a package, "" if it is not installed. Its metadata are parsed once."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _versions() -> dict[str, str]:
    return {package: _version(package) for package in PACKAGES if _version(package)}
