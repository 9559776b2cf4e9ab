"""The adapted model, a PeftModel with a model card of its own and support for adapters without LoRA layers.

PEFT and Trainer write model cards through `create_or_update_model_card`. `push_to_hub` uploads a folder through
`_upload_modified_files`, after it has written another card into the folder.

With `training="full"`, an adapter has no LoRA layers, only `modules_to_save`. PEFT considers only LoRA layers when it
deletes an adapter, unloads a model, or runs a batch that mixes adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.utils import logging

from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.adapters.originals import keep_originals_away
from plasticity_peft.card import complete_card
from plasticity_peft.errors import PlasticityError
from plasticity_peft.hub import PROCESSOR_NAME
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.record import digest, present_results
from plasticity_peft.saved.trained import TrainedAdapter

logger = logging.get_logger(f"transformers.{__name__}")


class PlasticityPeftModel(PeftModel):
    """A PeftModel whose model card describes what was measured, selected and trained. `get_peft_model` makes it."""

    def train(self, mode: bool = True) -> PlasticityPeftModel:
        """Sets training or evaluation mode; batch norms that are frozen stay in evaluation mode.

        They would change their running statistics, which no adapter contains: the model that is saved would not be
        the model that was trained.
        """
        super().train(mode)
        for module in self.modules() if mode else ():
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved adapter, as PEFT does. Originals of what it trains in full wait in CPU memory."""
        loaded = super().load_adapter(*args, **kwargs)
        keep_originals_away(self)
        return loaded

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. Other active adapters stay active, also if they have no LoRA layers.

        If it was the only active one, the first of the others becomes active and trainable, as with LoRA layers.
        """
        before = self.active_adapters
        super().delete_adapter(adapter_name)  # type: ignore[no-untyped-call]
        active = [name for name in before if name != adapter_name]
        if active:
            flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
            self._activate(active)
            for parameter, required in flags:
                parameter.requires_grad_(required)
        elif adapter_name in before and self.peft_config and not self.active_adapters:
            active = list(self.peft_config)[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
            self._activate(active)

    def _activate(self, names: list[str]) -> None:
        """Activates adapters in all layers that have them."""
        for module in self._adapter_layers():
            here = [name for name in names if name in module._get_available_adapters()]
            if here and list(module.active_adapters) != here:
                module.set_adapter(here)
        self.base_model.active_adapter = names  # type: ignore[assignment]
        self.active_adapter = names[0]

    def _adapter_layers(self) -> list[Any]:
        return [each for each in self.modules() if isinstance(each, (LoraLayer, AuxiliaryTrainingWrapper))]

    def unload(self) -> nn.Module:
        """Returns the base model without adapters. The components have the weights from before training.

        PEFT keeps the trained weights of all `modules_to_save`. As with LoRA, the head keeps its trained weights.
        """
        selections = [config.selection for config in self._chosen_configs().values()]
        components = {path for selection in selections if selection for path in selection.modules}
        base: nn.Module = self.get_base_model()  # type: ignore[no-untyped-call]
        for path, module in base.named_modules():
            if path in components and isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter([])
        unloaded: nn.Module = self.base_model.unload()  # type: ignore[operator]
        return unloaded

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, layers = kwargs.get("adapter_names") or (), self._adapter_layers()
        of_lora = {name for each in layers if isinstance(each, LoraLayer) for name in each.lora_A}
        if not {name for name in names if name in self.peft_config and name not in of_lora}:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        self._check_mixed_batch(names)
        handles = [each.register_forward_pre_hook(_naming_adapters(names), with_kwargs=True) for each in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_mixed_batch(self, names: Sequence[str]) -> None:
        """Raises ValueError, as PEFT does, for a batch whose images cannot have an adapter each."""
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(names) - {*self.peft_config, "__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def _chosen_configs(self) -> dict[str, PlasticityConfig]:
        """Returns the configs of the adapters that train the selected components, by name."""
        configs = {name: one for name, one in self.peft_config.items() if isinstance(one, PlasticityConfig)}
        return {name: one for name, one in configs.items() if one.is_as_chosen}

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes README.md as PEFT does, then adds a section about each adapter of this package.

        The card is written before the weights, so errors are only logged. An error must not prevent saving.
        """
        super().create_or_update_model_card(output_dir)  # type: ignore[no-untyped-call]
        try:
            complete_card(output_dir, [self._trained(*item, output_dir) for item in self._chosen_configs().items()])
        except (PlasticityError, OSError) as error:
            logger.warning("The model card in %s has no section about the training: %s", output_dir, error)
        except Exception:
            logger.warning("The model card in %s has no section about the training.", output_dir, exc_info=True)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # push_to_hub has just replaced the card by that of the repository, or by an empty one.
        self.create_or_update_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _trained(self, name: str, config: PlasticityConfig, output_dir: str) -> TrainedAdapter:
        """Returns the facts about an adapter for the card, with the results of its present weights."""
        assert isinstance(config.report, PlasticityReport)
        assert config.selection is not None
        weights = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
        base = self.get_base_model()  # type: ignore[no-untyped-call]
        folder = Path(output_dir, "" if name == "default" else name)
        results = present_results(folder)
        if results:
            content = save({key: value.contiguous() for key, value in weights.items()}, metadata={"format": "pt"})
            results = tuple(one for one in results if one.weights == digest(content))
        return TrainedAdapter(
            report=config.report,
            selection=config.selection,
            training=str(config.training),
            saved_parameters=sum(value.numel() for value in weights.values()),
            base_model=getattr(base, "name_or_path", None) or config.base_model_name_or_path,
            base_class=type(base).__name__ if type(base).__module__.startswith("transformers.") else None,
            id2label=config.id2label,
            options=config.to_dict(),
            has_image_processor=Path(folder, PROCESSOR_NAME).is_file(),
            results=results,
            name=name,
        )


def _naming_adapters(names: Sequence[str]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Returns a hook that passes a layer the adapter of each image, or "__base__" if the layer does not have it."""

    def hook(layer: Any, inputs: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        here = layer._get_available_adapters()
        return inputs, {**given, "adapter_names": [name if name in here else "__base__" for name in names]}

    return hook
