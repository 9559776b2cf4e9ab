"""An optimizer with a learning rate for each group of what trains, for `Trainer(optimizers=(optimizer, None))`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import logging

from plasticity_peft.checks import check_count, check_number, shown
from plasticity_peft.components.sharding import shape_of
from plasticity_peft.errors import ConfigError
from plasticity_peft.measuring.rates import LONG, Group, recommended_rates, trained_groups
from plasticity_peft.measuring.short_runs import find_rate_factor

# Below the logger of transformers, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

AUTO: Literal["auto"] = "auto"
"""Value of `rate_factor` with which short runs find it."""


def create_plasticity_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    train_dataset: Any = None,
    num_training_steps: int | None = None,
    rate_factor: float | Literal["auto"] = 1.0,
    lr: float | None = None,
    head_lr: float | None = None,
    vector_lr: float | None = None,
    matrix_lr: float | None = None,
    lora_A_lr: float | None = None,  # noqa: N803  # named as PEFT names the matrices
    lora_B_lr: float | None = None,  # noqa: N803
    weight_decay: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
    backbone: str | None = None,
    forward_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Returns an optimizer that has a group, and a learning rate, for each sort of parameter that trains.

    The groups are the head ("head"); norms, biases and embeddings ("vector"); weights of linear and convolutional
    layers that train in full ("matrix"); and the matrices of LoRA ("lora_A", "lora_B"). Rates that are not given are
    recommended. They are peak rates for Adam and its variants, with warm-up and a schedule that ends near 0.

    The rate of what trains in full follows from the gradient on `train_dataset`; without one, from the number of
    parameters, which is less reliable. The rates of LoRA and of the head follow from the sizes of their layers. If the
    head cannot be fitted in closed form, as a decoder cannot, the gradient only lowers the rate by size. Models
    without a loss of images and labels alone, such as DPT, CLIP and LLaVA, get rates by size: leave `train_dataset`
    out.
    Nothing of the model changes.

    Args:
        model: a model that was adapted by `get_peft_model`, or any model that `find_components` takes in which
            something trains.
        optimizer_cls: class of the optimizer, such as `torch.optim.AdamW`.
        train_dataset: labeled images in the forms of `measure_plasticity`; 256 of them are used for the gradient, and
            up to 1,024 to fit a head for it, unless the head is as `fit_head` left it. Under `accelerate launch` each
            process must give the same.
        num_training_steps: number of steps that will be trained. In a run of fewer than 100, what trains in full gets
            a quarter of the rates, and less below 50. By default, the rates are for longer runs.
        rate_factor: what the recommended rates are multiplied by, but for that of the head. The recommended rates are
            too large if pretrained features fit the images as they are. "auto" finds out: two copies of the model
            train everything for 16 steps, at the recommended rates and at a quarter of them, which takes the memory of
            finetuning everything. It is 0.25 if that gains clearly more, and otherwise 1, as `Forecast.rate_factor`
            is. In a run of fewer than 100 steps, what trains in full gets the smaller one of a factor below 1 and its
            share above, and "auto" is 1.
        lr: rate of every group whose own rate is not given. No rate is recommended then.
        head_lr: rate of the head.
        vector_lr: rate of what trains in full and is no matrix.
        matrix_lr: rate of matrices that train in full.
        lora_A_lr: rate of the first matrix of LoRA.
        lora_B_lr: rate of the second matrix of LoRA, and of DoRA's magnitudes.
        weight_decay: weight decay of matrices. Norms and biases have none.
        batch_size: largest number of images in one pass. It is halved if memory runs out.
        seed: seed of the drawing of images.
        backbone: path of the vision transformer in a model that contains several.
        forward_kwargs: arguments of each forward pass, as in `measure_plasticity`.
        kwargs: further arguments of `optimizer_cls`.

    Raises:
        ConfigError: nothing trains, a rate or `rate_factor` is not a number above 0, rates are to be recommended for
            an optimizer that is no variant of Adam, `rate_factor` is given beside all rates, or it is "auto" without
            `train_dataset`.
        DataError: there are too few images, or they have no labels.
        ModelError: see `find_components`; or `rate_factor` is "auto", and the model cannot train in full for a few
            steps, because of its head, its labels, or weights that are quantized or spread over processes.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from plasticity_peft import PlasticityConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ...                                             intermediate_size=64, image_size=8, patch_size=4))
        >>> model = get_peft_model(model, PlasticityConfig(target_data=torch.rand(8, 3, 8, 8), r=4))
        >>> optimizer = create_plasticity_optimizer(model, torch.optim.AdamW, head_lr=1e-3)
        >>> sorted({group["name"] for group in optimizer.param_groups})
        ['head', 'lora_A', 'lora_B']
    """
    if num_training_steps is not None:
        check_count("num_training_steps", num_training_steps, 1)
    _check_factor(rate_factor, train_dataset)
    groups = trained_groups(model)
    own = {"head": head_lr, "vector": vector_lr, "matrix": matrix_lr, "lora_A": lora_A_lr, "lora_B": lora_B_lr}
    or_lr = {name: lr if rate is None else rate for name, rate in own.items()}
    given = {name: rate for name, rate in or_lr.items() if rate is not None}
    for name, rate in given.items():
        check_number("lr" if own[name] is None else f"{name}_lr", rate)
    open_groups = [group for group in groups if group.name not in given]
    if rate_factor not in (1, AUTO) and all(group.name == "head" for group in open_groups):
        raise ConfigError(
            f"rate_factor={rate_factor} multiplies the recommended rates of all groups but the head, and there are "
            f"none: what trains is {', '.join(group.name for group in groups)}, and rates are given for "
            f"{', '.join(group.name for group in groups if group.name in given) or 'nothing'}. Leave out rate_factor, "
            "or some of the rates."
        )
    rates = dict(given)
    if open_groups:
        _check_recommended_for(optimizer_cls, open_groups)
        passes: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "backbone": backbone}
        passes |= {"forward_kwargs": forward_kwargs}
        if rate_factor == AUTO:
            matters = any(group.name != "head" for group in open_groups) and (num_training_steps or LONG) >= LONG
            rate_factor = find_rate_factor(model, train_dataset, **passes) if matters else 1.0
        options = {"num_training_steps": num_training_steps, "rate_factor": rate_factor, **passes}
        rates |= recommended_rates(model, open_groups, train_dataset, **options)
    logger.info("Learning rates: %s", _shown(groups, rates, given))
    parameters = [row for group in groups for row in _rows(group, rates[group.name], weight_decay)]
    return optimizer_cls(parameters, **kwargs)


def _check_factor(rate_factor: Any, train_dataset: Any) -> None:
    if rate_factor != AUTO:
        if isinstance(rate_factor, str):
            raise ConfigError(f'rate_factor must be a number above 0, or "auto". Got {shown(rate_factor)}.')
        check_number("rate_factor", rate_factor)
    elif train_dataset is None:
        raise ConfigError('rate_factor="auto" needs train_dataset, labeled images for short runs. Got None.')


def _check_recommended_for(optimizer_cls: type[torch.optim.Optimizer], groups: list[Group]) -> None:
    if "adam" not in optimizer_cls.__name__.lower():
        missing = ", ".join(f"{group.name}_lr" for group in groups)
        raise ConfigError(
            f"Learning rates are recommended for Adam and its variants only. Give lr, or {missing}, for "
            f"optimizer_cls={shown(optimizer_cls)}."
        )


def _rows(group: Group, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the parameter groups of torch for a group: matrices, which decay, and vectors, which do not."""
    sorts = (([p for _, p in group.parameters if len(shape_of(p)) > 1], weight_decay),
             ([p for _, p in group.parameters if len(shape_of(p)) <= 1], 0.0))  # fmt: skip
    return [{"name": group.name, "params": params, "lr": rate, "weight_decay": decay} for params, decay in sorts
            if params]  # fmt: skip


def _shown(groups: list[Group], rates: Mapping[str, float], given: Mapping[str, float]) -> str:
    return ", ".join(
        f"{group.name} {rates[group.name]:.1e} ({'given' if group.name in given else 'recommended'}, "
        f"{group.count:,} parameters)"
        for group in groups
    )
