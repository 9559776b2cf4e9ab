"""The classification head in closed form: ridge regression on the features of the frozen model.

One pass over the labeled images gives sums of products, which merge over batches and processes. They determine the
head, whose accuracy is that of a linear probe. Finetuning has to beat it. A head that is fitted before training saves
steps, and makes the gradients useful: those that pass through a freshly initialized head are noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, log_softmax
from torch import nn

from plasticity_peft.arguments import check_arguments
from plasticity_peft.checks import MOST_SAMPLES, check_number
from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.calls import Call, Inputs, hooked, input_names, run, with_forward_kwargs
from plasticity_peft.components.offloading import execution_device
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.components.sharding import whole
from plasticity_peft.components.wrappers import in_use, walk
from plasticity_peft.errors import ConfigError, DataError, ModelError, NonFiniteError
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.sampler import ImageBatch, Sampler, SingleImages
from plasticity_peft.measuring.left_as_found import run_left_as_found
from plasticity_peft.measuring.passes import Passes
from plasticity_peft.measuring.processes import Share, failing_together, same, summed, this_process
from plasticity_peft.measuring.ridge import Ridge, Sums, default_penalties
from plasticity_peft.measuring.rounds import Progress
from plasticity_peft.report.head import HeadFit

MOST_HELD = 2**17
"""Largest number of images whose features are kept in memory for leave-one-out errors: the first ones drawn."""


AnySampler = TypeVar("AnySampler", bound=Sampler)


def fit_head(
    model: nn.Module,
    dataset: Any,
    *,
    penalties: Any = None,
    max_samples: int = MOST_SAMPLES,
    batch_size: int = 32,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> HeadFit:
    """Fits the head of `model` in closed form, sets its weights in place, and returns the result.

    The features are the inputs of the head's linear layer in the frozen model. The head is fitted by ridge regression
    on the standardized features, with the penalty of the smallest squared leave-one-out error. A temperature minimizes
    the cross-entropy of the leave-one-out logits. Nothing else of the model changes. Under `accelerate launch` the
    images are spread over the processes, and each process sets the same weights.

    Args:
        model: a vision transformer of transformers with a head that ends in one linear layer.
        dataset: labeled images in the forms of `measure_plasticity`. Labels are whole numbers (single-label), vectors
            of 0 and 1 (multi-label) or floating-point numbers (regression), as in the model's `config.problem_type`.
        penalties: positive numbers to choose the penalty from; 28 from 1e-6 to 1e3 times the number of images if None.
        max_samples: largest number of images to fit on, at least 2.
        batch_size: number of images in one pass on each process. It is halved if memory runs out.
        seed: seed of the drawing of images and of the dataset's own transforms.
        dtype: "bfloat16" or "float16" runs the model in that precision by autocast; None runs it in its own.
        backbone: path of the vision transformer in a model that contains several.
        forward_kwargs: arguments of each forward pass, as in `measure_plasticity`.

    Raises:
        ConfigError: an argument is out of its range.
        DataError: there are too few images, or labels are missing or do not fit the head.
        ModelError: the model has no head that ends in one linear layer.
        NonFiniteError: a feature is NaN or infinite.

    Examples:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> images = [{"pixel_values": torch.rand(3, 8, 8) + label, "labels": label} for label in (0, 1) * 8]
        >>> found = fit_head(model, images)
        >>> (found.images, found.outputs)
        (16, 2)
    """
    with whole(model) as inner:
        fitted = fitted_head(
            inner,
            dataset,
            penalties=penalties,
            max_samples=max_samples,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            backbone=backbone,
            forward_kwargs=forward_kwargs,
        )
        with fitted.kept():
            return fitted.found


@dataclass(frozen=True, eq=False)
class FittedHead:
    """Weights for the last layer of a head, which are not set yet."""

    layer: nn.Linear
    weights: np.ndarray
    """float64 of shape (outputs, features)."""
    biases: np.ndarray
    """float64 of shape (outputs,)."""
    found: HeadFit

    def set(self) -> None:
        """Sets the weights and biases of the layer, in place."""
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(self.weights))
            self.layer.bias.copy_(torch.from_numpy(self.biases))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards, the layer has the weights that it has now."""
        with ExitStack() as stack:
            stack.callback(self._restore, self._copies())
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, and afterwards, the layer is the fitted one. An exception inside takes that back."""
        copies, before = self._copies(), vars(self.layer).get(_FITTED)
        try:
            self.set()
            vars(self.layer)[_FITTED] = _Fitted(self.found, _sums_of(self.layer))
            yield
        except BaseException:
            self._restore(copies)
            vars(self.layer)[_FITTED] = before
            raise

    def _copies(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in (self.layer.weight, self.layer.bias)]

    def _restore(self, copies: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, copied in zip((self.layer.weight, self.layer.bias), copies, strict=True):
                parameter.copy_(copied)


_FITTED = "fitted_in_closed_form"


def is_fitted(module: nn.Module) -> bool:
    """Returns whether `fit_head` has fitted a layer of this module, or of the module that it was copied from."""
    return any(vars(part).get(_FITTED) is not None for part in module.modules())


def fit_of(layer: nn.Linear) -> HeadFit | None:
    """Returns what `fit_head` found for a layer; None if it was not fitted, or has other weights by now."""
    fitted: _Fitted | None = vars(layer).get(_FITTED)
    return fitted.found if fitted is not None and fitted.sums == _sums_of(layer) else None


class _Fitted(NamedTuple):
    """What a fitted layer remembers, and its copies too."""

    found: HeadFit
    sums: tuple[float, ...]
    """By which it sees whether it was changed."""


def _sums_of(layer: nn.Linear) -> tuple[float, ...]:
    """Returns numbers that change with the weights and biases."""
    values = [parameter.detach().double() for parameter in (layer.weight, layer.bias)]
    return tuple(float(each) for value in values for each in (value.sum(), value.square().sum()))


def fitted_head(
    model: nn.Module,
    dataset: Any,
    *,
    penalties: Any = None,
    max_samples: int = MOST_SAMPLES,
    batch_size: int = 32,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
) -> FittedHead:
    """Returns the head that `fit_head` sets, and changes nothing; the arguments and errors are the same.

    No weight of the model may be spread over processes: see `whole`.
    """
    options = check_arguments(
        {
            "max_samples": max_samples,
            "batch_size": batch_size,
            "seed": seed,
            "dtype": dtype,
            "backbone": backbone,
            "forward_kwargs": forward_kwargs,
        }
    )
    wanted = None if penalties is None else [_checked(penalty) for penalty in penalties]
    architecture = with_forward_kwargs(model, find_architecture(model, backbone), options["forward_kwargs"])
    share = this_process()

    def collected() -> tuple[nn.Linear, str, tuple[Any, Any, Any]]:
        with failing_together(share):
            sampler = labeled_images(model, architecture, dataset, max_samples, batch_size, seed)
            path = final_layer(model, architecture, sampler.example())
            layer = linear_at(model, path)
            count = sampler.available(max_samples)
            problem = problem_type(model, sampler)
        same(share, "number of images", count)
        return layer, problem, _collect(model, architecture, path, sampler, share, problem)

    layer, problem, seen = run_left_as_found(collected, model, seed, options["dtype"], dataset)
    sums, features, targets = seen
    fit = solve(sums, features, targets, wanted, share, problem)
    weights, biases = Ridge(sums).weights(fit.penalty)
    return FittedHead(layer, weights * fit.temperature, biases * fit.temperature, fit)


def _checked(penalty: Any) -> float:
    check_number("penalties", penalty)
    return float(penalty)


def final_layer(model: nn.Module, architecture: Architecture, example: Inputs) -> str:
    """Returns the path of the one linear layer whose output is the model's output.

    Raises:
        ModelError: there is no such layer; the message lists the parts of the head.
    """
    linears = linears_of_head(model, architecture)
    outputs: dict[str, list[torch.Tensor]] = {path: [] for path in linears}
    hooks: dict[str, nn.Module] = {path: linear_at(model, path) for path in linears}
    with hooked(hooks, lambda path, call, output: outputs[path].append(output)):
        output = run(model, architecture, example)
    logits = getattr(output, "logits", output)  # a model of timm returns them alone
    ends = [
        path
        for path, seen in outputs.items()
        if len(seen) == 1 and isinstance(logits, torch.Tensor) and seen[0].ndim == 2 and torch.equal(seen[0], logits)
    ]
    if len(ends) != 1 or not holds_plain_weights(linears[ends[0]]) or linears[ends[0]].bias is None:
        parts = ", ".join(f"{path} ({type(model.get_submodule(path)).__name__})" for path in architecture.heads)
        raise ModelError(
            f"{type(model).__name__}: a head can be fitted if it ends in one linear layer with a bias, whose output "
            f"is the logits of the model. Its head is: {parts or 'none'}. Train such a head instead."
        )
    return ends[0]


def linears_of_head(model: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    """Returns the linear layers of the head by path, as they are in the base model."""
    return {
        f"{head}.{name}" if name else head: module
        for head in architecture.heads
        for name, module in walk(model.get_submodule(head))
        if isinstance(module, nn.Linear)
    }


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """Returns the linear layer at a path of the base model, or the copy that an enabled adapter trains."""
    current: nn.Module = model
    for name in path.split("."):
        current = in_use(current).get_submodule(name)
    layer = in_use(current)
    assert isinstance(layer, nn.Linear)
    return layer


def labeled_images(
    model: nn.Module, architecture: Architecture, dataset: Any, max_samples: int, batch_size: int, seed: int
) -> SingleImages:
    """Returns a sampler of labeled images. Raises ConfigError if there are none."""
    if dataset is None:
        raise ConfigError("dataset must be labeled images to fit the head on. Got None.")
    names = input_names(model, architecture)
    images = Images(dataset, "dataset", read_at_most=max_samples, names=names, seed=seed)
    return sampler_of(SingleImages, images, model, max_samples, batch_size, seed)


def sampler_of(
    kind: type[AnySampler], images: Images, model: nn.Module, max_samples: int, batch_size: int, seed: int
) -> AnySampler:
    """Returns a sampler of images for a model. Raises DataError if there are fewer than 2."""
    if not images.has(1):
        raise DataError(f"{images.name} must contain at least 2 images. Got {len(images)}.")
    return kind(
        target=images,
        max_samples=max_samples,
        batch_size=batch_size,
        seed=seed,
        device=execution_device(model),
        dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()),
    )


def problem_type(model: nn.Module, sampler: SingleImages) -> str:
    """Returns the problem type of the config, or that of the first labels, as transformers infers it."""
    config = getattr(model, "config", None)
    named = getattr(config, "problem_type", None)
    if named is not None:
        return str(named)
    if getattr(config, "num_labels", None) == 1:
        return "regression"
    labels = sampler.labels(sampler.load(range(1)))
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _collect(
    model: nn.Module, architecture: Architecture, path: str, sampler: SingleImages, share: Share, problem: str
) -> tuple[Sums, np.ndarray, np.ndarray]:
    """Returns the sums over all processes, and the features and targets that this process keeps, as float32."""
    layer = linear_at(model, path)
    held = -(-MOST_HELD // share.world_size)
    sums, kept, count = Sums.of(np.empty((0, layer.in_features)), np.empty((0, layer.out_features))), [], 0
    numbers = share.of(range(sampler.available(sampler.max_samples)))
    with failing_together(share), Progress(sampler, share, "Fitting the head") as progress:
        passes = Passes(sampler, "fitting the head", "to fit the head")
        for batch, features in received(path, model, architecture, passes, numbers):
            check_finite(features, path)
            targets = targets_of(sampler.labels(batch), layer.out_features, problem)
            sums = sums.merge(Sums.of(features, targets))
            if count < held:
                kept.append((features[: held - count], targets[: held - count]))
            count += len(features)
            progress.advance(len(features))
        progress.end()
    sums = sums.of_all(share)
    if not kept:
        return sums, np.empty((0, layer.in_features), np.float32), np.empty((0, layer.out_features), np.float32)
    return sums, np.concatenate([x for x, _ in kept]), np.concatenate([y for _, y in kept])


def received(
    path: str, model: nn.Module, architecture: Architecture, passes: Passes[SingleImages], numbers: Sequence[int]
) -> Iterator[tuple[ImageBatch, np.ndarray]]:
    """Yields batches of images, and what the head's linear layer at `path` receives for them.

    The second value is float32 of shape (images, features). Images that differ in shape do not come in the order of
    `numbers`.
    """

    def features(few: Sequence[int]) -> tuple[ImageBatch, np.ndarray]:
        batch, found = passes.sampler.load(few), []

        def keep(_: str, call: Call, output: object) -> None:
            found.append(call.tokens)

        with hooked({path: linear_at(model, path)}, keep):
            run(model, architecture, batch.images)
        return batch, found[0].detach().float().cpu().numpy()

    for _, seen in passes.results(numbers, features):
        yield seen


def check_finite(features: np.ndarray, path: str) -> None:
    """Raises NonFiniteError, which names the layer at `path`, if a feature that it gets is NaN or infinite."""
    if not np.isfinite(features).all():
        raise NonFiniteError(
            f"The features that {path} receives are NaN or infinite. In half precision this is often overflow: run "
            "the model in float32 or bfloat16."
        )


def targets_of(labels: torch.Tensor, outputs: int, problem: str) -> np.ndarray:
    """Returns the targets, (n, outputs): -1 and 1 for labels, and the numbers themselves for a regression."""
    given = labels.cpu().numpy()
    if problem == "single_label_classification":
        if given.ndim != 1 or given.min() < 0 or given.max() >= outputs:
            raise DataError(
                f"Labels must be whole numbers from 0 to {outputs - 1}, as the model's head has {outputs} outputs. "
                f"Got {given.min()} to {given.max()}."
            )
        return np.asarray(2 * np.eye(outputs, dtype=np.float32)[given.astype(np.int64)] - 1)
    given = given.reshape(len(given), -1).astype(np.float32)
    if given.shape[1] != outputs:
        raise DataError(f"Each label must have {outputs} numbers, one per output of the head. Got {given.shape[1]}.")
    if problem == "regression":
        return np.asarray(given)
    if not np.isin(given, (0, 1)).all():
        raise DataError(f"The labels of a multi-label problem must be 0 or 1. Got {given.min()} to {given.max()}.")
    return np.asarray(2 * given - 1)


def solve(
    sums: Sums, features: np.ndarray, targets: np.ndarray, penalties: list[float] | None, share: Share, problem: str
) -> HeadFit:
    """Returns the penalty and the temperature with the smallest leave-one-out errors, and these errors."""
    ridge = Ridge(sums)

    def total(*values: float) -> list[float]:
        return list(map(float, summed(share, np.array(values))[0]))

    def squared(penalty: float) -> float:
        return float(((ridge.left_out(features, targets, penalty) - targets) ** 2).sum())

    tried = [*map(float, default_penalties(sums.count) if penalties is None else penalties)]
    errors = total(*map(squared, tried))
    penalty = tried[int(np.argmin(errors))]
    left_out, (held,) = ridge.left_out(features, targets, penalty), total(len(features))
    if problem == "regression":
        (spread,), error = total(((targets - sums.y) ** 2).sum()), min(errors)
        score, loss, temperature = 1 - error / spread if spread > 0 else 0.0, error / held / targets.shape[1], 1.0
    else:
        right, log_likelihood = _OUTCOMES[problem]
        score = total(right(left_out, targets))[0] / held

        def entropy(log_temperature: float) -> float:
            return -total(log_likelihood(left_out * np.exp(log_temperature), targets))[0] / held

        best = minimize_scalar(entropy, bounds=(-5.0, 8.0), method="bounded", options={"xatol": 1e-4})
        temperature, loss = float(np.exp(best.x)), float(best.fun)
    return HeadFit(
        problem_type=problem,
        score=score,
        loss=loss,
        penalty=penalty,
        temperature=temperature,
        images=sums.count,
        features=len(sums.x),
        outputs=len(sums.y),
    )


def _right_single(predictions: np.ndarray, targets: np.ndarray) -> float:
    return float((predictions.argmax(axis=1) == targets.argmax(axis=1)).sum())


def _right_multi(predictions: np.ndarray, targets: np.ndarray) -> float:
    return float(((predictions > 0) == (targets > 0)).mean(axis=1).sum())


def _likelihood_single(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((log_softmax(logits, axis=1) * (targets > 0)).sum())


def _likelihood_multi(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(log_expit(logits * targets).mean(axis=1).sum())


_Outcome = Callable[[np.ndarray, np.ndarray], float]
_OUTCOMES: dict[str, tuple[_Outcome, _Outcome]] = {
    "single_label_classification": (_right_single, _likelihood_single),
    "multi_label_classification": (_right_multi, _likelihood_multi),
}
"""Number of right answers and log likelihood, summed over images, by problem type."""
