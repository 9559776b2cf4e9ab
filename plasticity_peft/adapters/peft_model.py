"""The adapted model, where it is more than a PeftModel: its model card.

PEFT and Trainer write model cards through `create_or_update_model_card`, and `push_to_hub` uploads a folder through
`_upload_modified_files`, after it has put another card there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from transformers.utils import logging

from plasticity_peft.adapters.config import PlasticityConfig
from plasticity_peft.card import complete_card
from plasticity_peft.errors import PlasticityError
from plasticity_peft.hub import PROCESSOR_NAME
from plasticity_peft.report.report import PlasticityReport
from plasticity_peft.saved.record import digest, present_results
from plasticity_peft.saved.trained import TrainedAdapter

logger = logging.get_logger(f"transformers.{__name__}")


class PlasticityPeftModel(PeftModel):
    """A PeftModel whose model cards tell what was measured, chosen and trained; made by `peft.get_peft_model`."""

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Writes README.md as PEFT does, then adds what is known of the adapters of this package.

        The card is written before the weights are: what goes wrong here is logged, and costs nobody a training.
        """
        super().create_or_update_model_card(output_dir)  # type: ignore[no-untyped-call]
        configs = {name: one for name, one in self.peft_config.items() if isinstance(one, PlasticityConfig)}
        try:
            complete_card(output_dir, [self._trained(*item, output_dir) for item in configs.items()])
        except (PlasticityError, OSError) as error:
            logger.warning("The model card in %s lacks what was measured and trained: %s", output_dir, error)
        except Exception:
            logger.warning("The model card in %s lacks what was measured and trained.", output_dir, exc_info=True)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        # push_to_hub has just put the card of the repository, or an empty one, in the place of ours.
        self.create_or_update_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _trained(self, name: str, config: PlasticityConfig, output_dir: str) -> TrainedAdapter:
        """Returns what the card describes of an adapter, with the results of its present weights."""
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
            training=config.training,
            saved_parameters=sum(value.numel() for value in weights.values()),
            base_model=getattr(base, "name_or_path", None) or config.base_model_name_or_path,
            base_class=type(base).__name__ if type(base).__module__.startswith("transformers.") else None,
            id2label=config.id2label,
            options=config.to_dict(),
            has_image_processor=Path(folder, PROCESSOR_NAME).is_file(),
            results=results,
            name=name,
        )
