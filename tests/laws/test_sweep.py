"""Every vision class of the installed transformers, at its default size: found, or refused for a reason that is known.

The models are built on the meta device, so that real widths, head counts and depths are looked at: small ones hide
mistakes.
"""

from __future__ import annotations

import inspect
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.layouts import LAYOUTS
from plasticity_peft.errors import ModelError

REFUSED = {
    "no self-attention, or none with linear layers": """
        align_vision_model bit convnext convnextv2 dinov3_convnext efficientnet emu3_vqgan flava_image_codebook
        focalnet hgnet_v2 janus_vqgan mobilenet_v1 mobilenet_v2 mobilevitv2 poolformer pp_lcnet pp_lcnet_v3 pp_lcnet_v4
        pp_ocrv5_mobile_det regnet resnet rt_detr_resnet slanet superpoint swiftformer textnet uvdoc uvdoc_backbone
        upernet van pp_ocrv6_small_det
    """,
    "attention and MLP are residual layers of their own, or only some blocks have attention": """
        efficientformer levit pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_rec pp_ocrv6_tiny_rec slanext
    """,
    "more than one attention in a block": """
        efficientloftr florence_vision lightglue timesformer xclip_vision_model
    """,
    "a detector, matcher or decoder on a backbone without transformer blocks": """
        d_fine deimv2 edgetam_video pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 PPDocLayoutV2ReadingOrder
        pp_formulanet_text rt_detr rt_detr_v2 superglue
    """,
    "a transformer for text": "sam3_lite_text_text_model",
    "not images alone: audio as well": "tvlt",
    "two stacks of blocks, one after the other": "videoprism videoprism_vision_model",
    "the blocks of a stage differ in width inside (Hiera of SAM 2), or attend in groups of windows": """
        lw_detr lw_detr_vit rf_detr rf_detr_dinov2 sam2 sam2_hiera_det_model sam2_video sam2_vision_model
    """,
    "a forward pass takes pairs of images": "seggpt",
    "all images of a batch lie in one sequence, so that pairs cannot be told apart": """
        cosmos3_edge_vision dots3_note_vision_encoder glm_image_vision hunyuan_vl_vision inkling2_vision
        minicpm_ocr_vision minicpmv4_7_vision minimax_m3_vl_vision molmo2_vision muse_glimmer_vision muse_spark_vision
        paddleocr_vl_vision phi4_multimodal_vision pixtral video_llama_3_vision
    """,
    "the head lies among the parts of the backbone": "eomt eomt_dinov3 videomt",
    "blocks that are not described yet": "pp_formulanet pp_formulanet_vision",
    "more than one vision transformer: backbone= says which": "depth_pro",
}
TYPES = {model_type: reason for reason, types in REFUSED.items() for model_type in types.split()}
CLASSES = {"SegformerDecodeHead": "a head alone"}
NOT_BUILT = (
    "requires the", "can only concatenate list", "argument 'size'", "is not subscriptable", "has no attribute",
    "out_indices", "cannot be instantiated", "couldn't connect", "empty() received an invalid combination",
)  # fmt: skip
"""What a class says that cannot be built from its default config here: a library is missing, or an option."""
DEPTHS = ("depths", "num_hidden_layers", "depth")


EVERY = 24
"""Of the models, the default run looks at one in so many: importing and building all takes a minute."""


def vision_classes(every: int) -> Iterator[type[PreTrainedModel]]:
    """Yields the vision classes of one in `every` models of transformers."""
    for name in sorted(set(dir(transformers))):
        if not name[0].isupper() or name.endswith("PreTrainedModel"):
            continue
        # Such as "models.vit.modeling_vit": known before that is imported.
        where = transformers._class_to_module.get(name, "").split(".")
        if where[0] != "models" or zlib.crc32(where[1].encode()) % every:
            continue
        try:
            found = getattr(transformers, name)
        except Exception:  # a class whose library is missing
            continue
        if not (inspect.isclass(found) and issubclass(found, PreTrainedModel) and found.config_class):
            continue
        if found.__module__.startswith("transformers.") and "pixel_values" in str(found.main_input_name):
            yield found


def build(model_class: type[PreTrainedModel]) -> PreTrainedModel | None:
    """Returns a model of the default size without weights; None where that cannot be had here."""
    try:
        with torch.device("meta"):
            return model_class(model_class.config_class())
    except Exception as error:
        if not any(text in str(error) for text in NOT_BUILT):
            raise
        return None


@pytest.mark.filterwarnings("ignore")
def test_some_vision_classes_are_found_or_refused_for_a_known_reason() -> None:
    counts = looked_at(EVERY)
    assert counts["found"] >= 125 // EVERY // 2, counts
    assert counts["refused"] >= 75 // EVERY // 2, counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_vision_class_is_found_or_refused_for_a_known_reason(
    record_property: Callable[[str, object], None],
) -> None:
    counts = looked_at(every=1)
    newest = not transformers.__version__.startswith("4.")
    assert counts["found"] >= (150 if newest else 125), counts
    assert counts["refused"] >= 75
    assert counts["not built"] <= 45
    record_property("vision classes", dict(counts))


def looked_at(every: int) -> Counter[str]:
    """Returns how many classes were found, refused and not built; fails where one was not as is known."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    wrong = []
    try:
        for model_class in vision_classes(every):
            name = model_class.__name__
            model = build(model_class)
            if model is None:
                counts["not built"] += 1
                continue
            try:
                architecture = find_architecture(model)
            except ModelError as error:
                counts["refused"] += 1
                model_type = model_class.config_class.model_type
                if not (name in CLASSES or model_type in TYPES or name in TYPES):
                    wrong.append(f"{name} ({model_type}) was refused: {error}")
                continue
            counts["found"] += 1
            if model_class.config_class.model_type in TYPES:
                wrong.append(f"{name} was expected to be refused: {TYPES[model_class.config_class.model_type]}")
            wrong += [f"{name}: {text}" for text in disagreements(model, architecture)]
    finally:
        transformers.logging.set_verbosity(level)
    assert not wrong, "\n".join(wrong)
    return counts


def disagreements(model: nn.Module, architecture: Architecture) -> Iterator[str]:
    """Yields where what was found is not what the config of the backbone says."""
    config: PretrainedConfig = model.get_submodule(architecture.backbone).config
    config = getattr(config, "vision_config", config)
    if config.model_type != architecture.model_type and architecture.backbone:
        yield f"the config of the backbone is of {config.model_type}"
    depth = next((getattr(config, key) for key in DEPTHS if getattr(config, key, None)), None)
    if depth is None:
        return
    blocks = sum(depth) if isinstance(depth, (list, tuple)) else depth
    if architecture.model_type == "mobilevit":
        blocks = 2 + 4 + 3  # fixed in the code of the model
    if blocks != len(architecture.blocks):
        yield f"{len(architecture.blocks)} blocks were found, and the config says {blocks}"
    width, hidden = getattr(config, "hidden_size", None), getattr(config, "intermediate_size", None)
    if architecture.hierarchical or not width:
        return
    for part in architecture.components:
        if part.kind == "MHA" and part.features[-1][1] != width:
            yield f"{part.id} has outputs of {part.features[-1][1]}, and the config says {width}"
        if part.kind == "FC1" and hidden and part.features[0] != (width, hidden):
            yield f"{part.id} is {part.features[0]}, and the config says {(width, hidden)}"
        if part.kind in ("LN1", "LN2") and part.parameters not in (width, 2 * width):
            yield f"{part.id} has {part.parameters} parameters, and the config says {width} features"


def test_no_type_is_both_known_and_refused() -> None:
    assert not set(TYPES) & set(LAYOUTS)
