"""A small model of every supported architecture, with images for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tests.support.models import disturbed

FIVE = int(transformers.__version__.split(".")[0]) >= 5
NEVER_CALLED = () if FIVE else ("videomae",)
"""Families whose attention uses weights without calling the layers, so that LoRA on them is refused."""

PLAIN: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MLP_RATIO = {**{key: value for key, value in PLAIN.items() if key != "intermediate_size"}, "mlp_ratio": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
PYRAMID = {"image_size": 32, "depths": [1, 2], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}

SAM = {
    **PLAIN, "image_size": 32, "output_channels": 8, "global_attn_indexes": [1], "mlp_dim": 32, "num_pos_feats": 8,
    "window_size": 2,
}  # fmt: skip


_BUILT: dict[str, PreTrainedModel] = {}
"""One model of each family that was asked for, to be copied: a copy takes half the time of a new one."""


@dataclass(frozen=True)
class Family:
    """How to make a small model of a family."""

    model: str
    """Class in transformers."""
    config: Mapping[str, Any]
    shape: tuple[int, ...] = (3, 16, 16)
    embedding: bool = True
    """Whether the paper's protocol is defined."""
    vision: bool = False
    """True where the options belong to `vision_config`."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Options of the config beside those of `vision_config`."""

    @property
    def available(self) -> bool:
        """False where the installed transformers does not have it."""
        return hasattr(transformers, self.model)

    def build(self, **options: Any) -> PreTrainedModel:
        """Returns the model with random weights in which no two components are alike, in evaluation mode."""
        key = repr((self, options))
        if key not in _BUILT:
            _BUILT[key] = self._new(**options)
        torch.manual_seed(1)
        return copy.deepcopy(_BUILT[key])

    def _new(self, **options: Any) -> PreTrainedModel:
        model_class = getattr(transformers, self.model)
        own = {**self.config, **options}
        settings = {"vision_config": own, **self.others} if self.vision else own
        torch.manual_seed(0)
        return disturbed(model_class(model_class.config_class(**settings)).eval(), seed=1)

    def images(self, count: int = 4, *, seed: int = 1) -> dict[str, torch.Tensor]:
        """Returns what the model takes for `count` images."""
        generator = torch.Generator().manual_seed(seed)
        name = getattr(getattr(transformers, self.model), "main_input_name", "pixel_values")
        name = name if name.startswith("pixel_values") else "pixel_values"
        images = {name: torch.rand(count, *self.shape, generator=generator)}
        if self.model.startswith("Siglip2"):
            # Images of 2 x 3 and of 2 x 2 patches, padded to 6.
            wide = torch.arange(count) % 2 == 0
            images["pixel_attention_mask"] = torch.ones(count, 6, dtype=torch.int32)
            images["pixel_attention_mask"][~wide, 4:] = 0
            images["pixel_values"][~wide, 4:] = 0
            images["spatial_shapes"] = torch.tensor([[2, 3] if is_wide else [2, 2] for is_wide in wide.tolist()])
        return images


def items(images: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Returns a batch as a dataset: a list of images."""
    count = len(next(iter(images.values())))
    return [{name: values[number] for name, values in images.items()} for number in range(count)]


VIDEO = (2, 3, 16, 16)
LABELS = {"num_labels": 3}
FAMILIES = {
    "vit": Family("ViTForImageClassification", {**PLAIN, **LABELS}),
    "deit": Family("DeiTForImageClassification", {**PLAIN, **LABELS}),
    "deit-teacher": Family("DeiTForImageClassificationWithTeacher", {**PLAIN, **LABELS}),
    "beit": Family(
        "BeitForImageClassification",
        {**PLAIN, **LABELS, "use_relative_position_bias": True, "layer_scale_init_value": 0.5},
    ),
    "beit-shared": Family(
        "BeitForImageClassification", {**PLAIN, **LABELS, "use_shared_relative_position_bias": True}
    ),
    "data2vec-vision": Family(
        "Data2VecVisionForImageClassification", {**PLAIN, **LABELS, "use_relative_position_bias": True}
    ),
    "dinov2": Family("Dinov2ForImageClassification", {**MLP_RATIO, **LABELS}),
    "dinov2-swiglu": Family("Dinov2ForImageClassification", {**MLP_RATIO, **LABELS, "use_swiglu_ffn": True}),
    "dinov2_with_registers": Family("Dinov2WithRegistersForImageClassification", {**MLP_RATIO, **LABELS}),
    "dinov3_vit": Family("DINOv3ViTModel", PLAIN),
    "dinov3_vit-gated": Family("DINOv3ViTModel", {**PLAIN, "use_gated_mlp": True}),
    "vit_mae": Family("ViTMAEModel", PLAIN),
    "vit_mae-pretraining": Family(
        "ViTMAEForPreTraining",
        {**PLAIN, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
         "decoder_intermediate_size": 32},
    ),
    "vit_msn": Family("ViTMSNForImageClassification", {**PLAIN, **LABELS}),
    "ijepa": Family("IJepaForImageClassification", {**PLAIN, **LABELS}),
    "pixio": Family("PixioModel", {**PLAIN, "n_cls_tokens": 2}),
    "clip": Family("CLIPForImageClassification", PLAIN, vision=True, others=LABELS),
    "clip-vision": Family("CLIPVisionModel", PLAIN),
    "metaclip_2": Family("MetaClip2ForImageClassification", PLAIN, vision=True, others=LABELS),
    "siglip": Family("SiglipForImageClassification", PLAIN, vision=True, others=LABELS),
    "siglip2": Family(
        "Siglip2ForImageClassification", {**PLAIN, "num_patches": 16}, (6, 192), vision=True, others=LABELS
    ),
    "aimv2": Family("Aimv2VisionModel", PLAIN),
    "mlcd": Family("MLCDVisionModel", {**PLAIN, "num_key_value_groups": 1}),
    "altclip": Family("AltCLIPVisionModel", PLAIN),
    "chinese_clip": Family("ChineseCLIPVisionModel", PLAIN),
    "clipseg": Family("CLIPSegVisionModel", PLAIN),
    "git": Family("GitVisionModel", PLAIN),
    "owlvit": Family("OwlViTVisionModel", PLAIN),
    "owlv2": Family("Owlv2VisionModel", PLAIN),
    "blip": Family("BlipVisionModel", PLAIN),
    "blip_2": Family("Blip2VisionModel", PLAIN),
    "instructblip": Family("InstructBlipVisionModel", PLAIN),
    "instructblipvideo": Family("InstructBlipVideoVisionModel", PLAIN),
    "internvl": Family(
        "InternVLVisionModel", {**PLAIN, "image_size": [16, 16], "patch_size": [8, 8], "use_qk_norm": True}
    ),
    "janus": Family("JanusVisionModel", {**MLP_RATIO, "mlp_ratio": 2.0}),
    "qianfan_ocr": Family("QianfanOCRVisionModel", {**PLAIN, "image_size": [16, 16], "patch_size": [8, 8]}),
    "flava": Family("FlavaImageModel", PLAIN),
    "dpt": Family("DPTModel", PLAIN),
    "vitpose": Family("VitPoseBackbone", {**MLP_RATIO, "image_size": [16, 16], "patch_size": [8, 8]}),
    "mgp-str": Family(
        "MgpstrForSceneTextRecognition",
        {**MLP_RATIO, "image_size": [16, 16], "patch_size": 8, "num_character_labels": 5, "num_bpe_labels": 5,
         "num_wordpiece_labels": 5, "max_token_length": 4},
    ),
    "radio": Family("RadioModel", {**MLP_RATIO, "mlp_ratio": 2.0}),
    "tipsv2": Family("Tipsv2VisionModel", {**MLP_RATIO}),
    "videomae": Family(
        "VideoMAEForVideoClassification", {**PLAIN, **LABELS, "num_frames": 2, "tubelet_size": 2}, VIDEO
    ),
    "vivit": Family(
        "VivitForVideoClassification", {**PLAIN, **LABELS, "num_frames": 2, "tubelet_size": [2, 8, 8]}, VIDEO
    ),
    "vjepa2": Family(
        "VJEPA2ForVideoClassification",
        {**MLP_RATIO, **LABELS, "crop_size": 16, "frames_per_clip": 2, "hidden_size": 24, "pred_hidden_size": 24,
         "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2, "num_pooler_layers": 1},
        VIDEO,
    ),
    "sapiens2": Family("Sapiens2Model", {**PLAIN}),
    "sam": Family("SamVisionModel", SAM, (3, 32, 32), embedding=False),
    "sam_hq": Family("SamHQVisionModel", SAM, (3, 32, 32), embedding=False),
    "sam3": Family(
        "Sam3ViTModel",
        {**PLAIN, "image_size": 32, "window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 32},
        (3, 32, 32), embedding=False,
    ),
    "vitdet": Family(
        "VitDetModel",
        {**MLP_RATIO, "image_size": 32, "pretrain_image_size": 32, "window_size": 2, "window_block_indices": [0, 2],
         "use_relative_position_embeddings": True},
        (3, 32, 32), embedding=False,
    ),
    "idefics3": Family("Idefics3VisionTransformer", PLAIN),
    "smolvlm": Family("SmolVLMVisionTransformer", PLAIN),
    "yolos": Family(
        "YolosForObjectDetection",
        {**PLAIN, **LABELS, "image_size": [16, 16], "num_detection_tokens": 3, "use_mid_position_embeddings": False},
    ),
    "swin": Family("SwinForImageClassification", {**SWIN, **LABELS}, (3, 32, 32), embedding=False),
    "swinv2": Family("Swinv2ForImageClassification", {**SWIN, **LABELS}, (3, 32, 32), embedding=False),
    "donut-swin": Family("DonutSwinForImageClassification", {**SWIN, **LABELS}, (3, 32, 32), embedding=False),
    "maskformer-swin": Family("MaskFormerSwinModel", {**SWIN}, (3, 32, 32), embedding=False),
    "swin2sr": Family(
        "Swin2SRModel", {**SWIN, "patch_size": 1, "image_size": 8, "num_heads": [3, 3]}, (3, 8, 8), embedding=False
    ),
    "hiera": Family(
        "HieraForImageClassification",
        {**LABELS, "image_size": [32, 32], "patch_stride": [4, 4], "patch_size": [7, 7], "patch_padding": [3, 3],
         "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "num_query_pool": 1,
         "masked_unit_attention": [True, False], "masked_unit_size": [2, 2], "query_stride": [2, 2], "mlp_ratio": 2.0},
        (3, 32, 32), embedding=False,
    ),
    "pvt": Family(
        "PvtForImageClassification",
        {**PYRAMID, **LABELS, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2],
         "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2], "strides": [4, 2]},
        (3, 32, 32), embedding=False,
    ),
    "pvt_v2": Family(
        "PvtV2ForImageClassification",
        {**PYRAMID, **LABELS, "num_encoder_blocks": 2, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2],
         "patch_sizes": [7, 3], "strides": [4, 2]},
        (3, 32, 32), embedding=False,
    ),
    "segformer": Family(
        "SegformerForImageClassification",
        {**PYRAMID, **LABELS, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "patch_sizes": [7, 3],
         "strides": [4, 2]},
        (3, 32, 32), embedding=False,
    ),
    "glpn": Family(
        "GLPNModel",
        {**PYRAMID, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2]},
        (3, 32, 32), embedding=False,
    ),
    "cvt": Family(
        "CvtForImageClassification",
        {**LABELS, "embed_dim": [8, 16], "depth": [1, 2], "num_heads": [1, 2], "patch_sizes": [7, 3],
         "patch_stride": [4, 2], "patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0],
         "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0],
         "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
         "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2],
         "padding_q": [1, 1], "stride_q": [1, 1]},
        (3, 32, 32), embedding=False,
    ),
    "mobilevit": Family(
        "MobileViTForImageClassification",
        {**LABELS, "image_size": 128, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 16],
         "num_attention_heads": 2, "mlp_ratio": 2.0, "initializer_range": 1.0},
        (3, 128, 128), embedding=False,
    ),
    "groupvit": Family(
        "GroupViTVisionModel",
        {**PLAIN, "depths": [2, 1], "num_group_tokens": [4, 0], "num_output_groups": [2, 0], "num_hidden_layers": 3},
        embedding=False,
    ),
}  # fmt: skip

REPRESENTATIVES = {
    "vit": "plain: a norm before the attention and one before the MLP, and a projection each for query, key and value",
    "beit": "tables of position biases, and layer scale",
    "dinov2-swiglu": "a gated MLP, whose input layers are packed in one in transformers 4, and layer scale",
    "dinov3_vit": "rotary embeddings, which arrive as arguments",
    "vit_mae-pretraining": "patches hidden at random, and a decoder for a head",
    "clip": "a vision tower, whose config is a part of the model's",
    "siglip2": "masks, and images of several sizes in a batch",
    "aimv2": "RMS norms, and layers without biases",
    "vjepa2": "videos, under another name than pixel_values, and a head with attention of its own",
    "blip": "query, key and value packed in one layer",
    "sam": "the same, in windows of a grid of tokens",
    "swin": "stages, and windows that are shifted",
    "swinv2": "norms after the attention and the MLP, and position biases that layers compute",
    "hiera": "queries that are pooled, and layers that belong to no component",
    "cvt": "convolutions before the projections, and batch norms",
}
"""One family for each difference that matters to the package, and what it is.

What takes long is tried on these by default, and on the other families by the slow tests: none of the others has a
block of a kind that none of these has. What is cheap is tried on all by default, such as
`test_rates_of_change_are_those_of_the_definition`.
"""


KINDS_OF_FAMILY = [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in FAMILIES]
"""All families, of which the slow tests try those that are no representatives; also an axis of `crossed`."""
every_family = pytest.mark.parametrize("name", FAMILIES)
"""Runs a test on all families: for what is cheap, and for slow tests."""
each_kind_of_family = pytest.mark.parametrize("name", KINDS_OF_FAMILY)
"""Runs a test on the representatives, and on the other families if slow tests are asked for."""
FEW = ("vit", "dinov2-swiglu", "swin", "clip")
few_families = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in FAMILIES]
)
"""Runs a test on a plain, a gated, a windowed and a wrapped family, and on the others if slow tests are asked for: for
what takes seconds with each, and goes through the same code with all, such as failures at many places."""


def defined(name: str, measure: str, *_: object) -> bool:
    """Returns whether a measure of `MEASURES` can be taken of a family: the paper's protocol needs an embedding."""
    return measure != "embedding" or FAMILIES[name].embedding


def family(name: str) -> Family:
    """Returns a family; skips the test where the installed transformers does not have it, or it is refused."""
    found = FAMILIES[name]
    if not found.available:
        pytest.skip(f"transformers {transformers.__version__} has no {found.model}")
    if name in NEVER_CALLED:
        pytest.skip(f"transformers {transformers.__version__} does not call its projections")
    return found
