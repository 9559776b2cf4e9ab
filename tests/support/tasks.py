"""A small model of every class of transformers with a head beside a vision transformer, and a batch it learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.support.families import FAMILIES, LABELS, MLP_RATIO, PLAIN, PYRAMID, SAM, SWIN, Family, items
from tests.support.models import disturbed

Batch = dict[str, Any]
COUNT = 2
"""Images in a batch."""


@dataclass(frozen=True)
class Task:
    """A small model of one class, and what it is given."""

    model: str
    """Class in transformers."""
    config: Mapping[str, Any]
    images: Callable[[], Batch]
    """Makes what the model takes beside labels."""
    labels: Callable[[], Batch] | None = None
    """Makes what the model needs for a loss of its own; None if it has none."""
    named: tuple[str, ...] = ()
    """What is named in `modules_to_save`, because a head that takes more than images is not found."""
    backbone: str | None = None
    measured: tuple[str, ...] = ("pixel_values",)
    """The inputs that the vision transformer takes."""
    fresh: tuple[str, ...] | None = None
    """Beginnings of the names of what is drawn anew; by default all that is no part of `base_model_prefix`."""
    idle: tuple[str, ...] = ()
    """Heads that get no gradient from this batch."""
    several: bool = False
    """True if a text may have several images: `pixel_values` then have one axis more than the vision tower takes."""

    @property
    def available(self) -> bool:
        """False where the installed transformers does not have it."""
        return hasattr(transformers, self.model)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Returns the model with random weights in which no two components are alike, in evaluation mode."""
        model_class = getattr(transformers, self.model)
        torch.manual_seed(seed)
        return disturbed(model_class(model_class.config_class(**self.config)).eval(), seed=seed + 1)

    def data(self) -> list[Batch]:
        """Returns images for measuring, as a dataset."""
        images = {name: value for name, value in self.images().items() if name in self.measured}
        return items({name: value.flatten(0, 1) if self.several else value for name, value in images.items()})


# ------------------------------------------------------------------------------------------------------ inputs


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def whole(highest: int, *shape: int, seed: int = 2) -> torch.Tensor:
    """Returns whole numbers from 0, of which the first is the highest."""
    numbers = torch.randint(highest, shape, generator=torch.Generator().manual_seed(seed))
    numbers.view(-1)[0] = highest - 1
    return numbers


def pixels(size: int = 16, channels: int = 3, **others: Any) -> Callable[[], Batch]:
    return lambda: {"pixel_values": random(COUNT, channels, size, size), **_made(others)}


def given(**values: Any) -> Callable[[], Batch]:
    """Returns a function that makes the values; those that are functions are called."""
    return lambda: _made(values)


def _made(values: Mapping[str, Any]) -> Batch:
    return {name: value() if callable(value) else value for name, value in values.items()}


def text(length: int = 6, vocabulary: int = 30, end: int | None = 31) -> Batch:
    """Returns token ids that end with `end`, and their mask."""
    ids = whole(vocabulary - 5, COUNT, length) + 3
    if end is not None:
        ids[:, -1] = end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CLASSES = given(labels=torch.tensor([0, 2]))


def maps(size: int = 16, labels: int = 3) -> Callable[[], Batch]:
    return given(labels=lambda: whole(labels, COUNT, size, size))


def boxes() -> Batch:
    """Returns the objects in each image, as detectors take them."""
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])
    return {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": box} for _ in range(COUNT)]}


def boxes_with_masks() -> Batch:
    """Returns the objects in each image with their shapes."""
    return {"labels": [{**one, "masks": (random(2, 64, 64) > 0.5).float()} for one in boxes()["labels"]]}


def masks(size: int) -> Callable[[], Batch]:
    """Makes the segments of each image, as MaskFormer takes them."""

    def make() -> Batch:
        segments = [(random(2, size, size, seed=number) > 0.5).float() for number in range(COUNT)]
        return {"mask_labels": segments, "class_labels": [torch.tensor([0, 2]) for _ in range(COUNT)]}

    return make


def hidden(patches: int) -> torch.Tensor:
    """Returns which patches are hidden: half of them, as many in each image."""
    return (torch.arange(patches) % 2 == 0).expand(COUNT, -1).clone()


# ------------------------------------------------------------------------------------------------------- parts

FOUR = {**PLAIN, "num_hidden_layers": 4}
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 31,
}  # fmt: skip
SWIN_4 = {
    "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    "window_size": 2,
}  # fmt: skip
SWIN_BACKBONE = {"model_type": "swin", **SWIN_4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
FOUR_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
DINOV2 = {
    "model_type": "dinov2",
    **{**MLP_RATIO, "num_hidden_layers": 4},
    "reshape_hidden_states": True,
    **FOUR_STAGES,
}
BEIT = {**FOUR, "use_relative_position_bias": True}
DPT = {
    **FOUR, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4, 4, 4, 4], "fusion_hidden_size": 4,
    "reassemble_factors": [4, 2, 1, 0.5], "auxiliary_loss_weight": 0.4, **LABELS,
}  # fmt: skip
DEPTH = {
    "backbone_config": {**DINOV2, "reshape_hidden_states": False}, "reassemble_hidden_size": 16, "patch_size": 8,
    "neck_hidden_sizes": [4, 4, 4, 4], "fusion_hidden_size": 4, "head_hidden_size": 4,
    "depth_estimation_type": "metric",
}  # fmt: skip
GLPN = {
    **PYRAMID, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2],
    "decoder_hidden_size": 8,
}  # fmt: skip
SAPIENS = {
    **PLAIN, "head_config": {"conv_out_channels": [8], "conv_kernel_sizes": [3], "upsample_out_channels": [8]},
    "num_key_value_attention_heads": 2, **LABELS,
}  # fmt: skip
FORMER = {
    "backbone_config": SWIN_BACKBONE, "mask_feature_size": 32, "num_queries": 4, "num_attention_heads": 2,
    "decoder_layers": 2, "encoder_layers": 1, "hidden_dim": 32, "dim_feedforward": 16, "encoder_feedforward_dim": 16,
    "train_num_points": 16, **LABELS,
}  # fmt: skip
DETR = {
    "backbone_config": SWIN_BACKBONE, "use_pretrained_backbone": False, "use_timm_backbone": False, "num_queries": 4,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, **LABELS,
}  # fmt: skip
WORDS = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
LOOKING = torch.tensor([[2, 31, 31, 31, 31, 5, 6, 7], [2, 31, 31, 31, 31, 8, 9, 4]])
"""Token ids: 31 stands for a patch of an image."""
TIPS = {
    "backbone_config": {"model_type": "tipsv2_vision_model", **MLP_RATIO, "num_hidden_layers": 4, **FOUR_STAGES,
                        "reshape_hidden_states": False},
    "neck_hidden_sizes": [4, 4, 4, 4], "fusion_hidden_size": 4, "reassemble_factors": [4, 2, 1, 0.5],
    "num_depth_bins": 4, **LABELS,
}  # fmt: skip
TOWERS = {"vision_config": PLAIN, "text_config": TEXT, "projection_dim": 8}
PROJECTIONS = ("visual_projection", "text_projection")
CONTRASTIVE = given(return_loss=True)


def task(model: str, config: Mapping[str, Any], images: Any = None, labels: Any = None, **options: Any) -> Task:
    return Task(model, config, images or pixels(), labels, **options)


def of_family(name: str, labels: Callable[[], Batch] | None = CLASSES, **options: Any) -> Task:
    """Returns the task of a family that has a head of its own."""
    family: Family = FAMILIES[name]
    config = {"vision_config": family.config, **family.others} if family.vision else family.config
    measured = ("pixel_values", "pixel_values_videos", "pixel_attention_mask", "spatial_shapes")
    return Task(family.model, config, lambda: family.images(COUNT), labels, measured=measured, **options)


TASKS: dict[str, Task] = {
    **{
        name: of_family(name)
        for name in (
            "vit",
            "deit",
            "beit",
            "data2vec-vision",
            "dinov2",
            "dinov2_with_registers",
            "vit_msn",
            "ijepa",
            "clip",
            "metaclip_2",
            "siglip",
            "siglip2",
            "swin",
            "swinv2",
            "donut-swin",
            "hiera",
            "pvt",
            "pvt_v2",
            "segformer",
            "cvt",
            "mobilevit",
            "videomae",
            "vivit",
            "vjepa2",
        )
    },
    "deit-teacher": of_family("deit-teacher", None),
    "mgp-str": of_family("mgp-str", None),
    "yolos": of_family("yolos", boxes),
    "vit_mae-pretraining": of_family("vit_mae-pretraining", given(noise=lambda: random(COUNT, 4))),
    # segmentation
    "segformer-semantic": task(
        "SegformerForSemanticSegmentation",
        {**FAMILIES["segformer"].config, "decoder_hidden_size": 8},
        pixels(32),
        maps(32),
    ),
    "beit-semantic": task(
        "BeitForSemanticSegmentation",
        {**BEIT, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], **LABELS},
        None,
        maps(),
    ),
    "data2vec-semantic": task(
        "Data2VecVisionForSemanticSegmentation",
        {**BEIT, "out_indices": [0, 1, 2, 3], "pool_scales": [1, 2], **LABELS},
        None,
        maps(),
    ),
    "dpt-semantic": task("DPTForSemanticSegmentation", DPT, None, maps()),
    "mobilevit-semantic": task(
        "MobileViTForSemanticSegmentation",
        {**FAMILIES["mobilevit"].config, "aspp_out_channels": 8},
        pixels(128),
        maps(128),
    ),
    "upernet-swin": task(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": SWIN_BACKBONE,
            "hidden_size": 8,
            "pool_scales": [1, 2],
            "auxiliary_in_channels": 32,
            "auxiliary_channels": 8,
            **LABELS,
        },
        pixels(64),
        maps(64),
    ),
    "upernet-dinov2": task(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": DINOV2,
            "hidden_size": 8,
            "pool_scales": [1, 2],
            "auxiliary_in_channels": 16,
            "auxiliary_channels": 8,
            **LABELS,
        },
        None,
        maps(),
    ),
    "sapiens2-semantic": task(
        "Sapiens2ForSemanticSegmentation",
        SAPIENS,
        None,
        maps(),
    ),
    "tipsv2-semantic": task("Tipsv2DptForSemanticSegmentation", TIPS, None, maps()),
    "clipseg": task(
        "CLIPSegForImageSegmentation",
        {
            **TOWERS,
            "extract_layers": [0, 1],
            "reduce_dim": 8,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        pixels(input_ids=lambda: text()["input_ids"]),
        given(labels=lambda: random(COUNT, 16, 16)),
        named=("decoder",),
    ),
    # mask decoders
    "maskformer": task(
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": SWIN_BACKBONE,
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": {
                "model_type": "detr",
                "d_model": 32,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "num_queries": 4,
            },
            **LABELS,
        },
        pixels(64),
        masks(64),
    ),
    "mask2former": task("Mask2FormerForUniversalSegmentation", {**FORMER, "feature_size": 32}, pixels(64), masks(64)),
    "oneformer": task(
        "OneFormerForUniversalSegmentation",
        {
            **FORMER,
            "hidden_dim": 64,
            "conv_dim": 64,
            "mask_dim": 64,
            "text_encoder_width": 64,
            "text_encoder_num_layers": 1,
            "text_encoder_vocab_size": 32,
            "text_encoder_context_length": 6,
            "text_encoder_n_ctx": 2,
            "task_seq_len": 6,
            "query_dec_layers": 1,
            "is_training": True,
        },
        pixels(64, task_inputs=lambda: text()["input_ids"]),
        lambda: {**masks(64)(), "text_inputs": whole(20, COUNT, 2, 6)},
        named=("transformer_module", "criterion"),
    ),
    # detectors
    "detr": task("DetrForObjectDetection", DETR, pixels(64), boxes),
    "detr-segmentation": task(
        "DetrForSegmentation",
        {**DETR, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
        pixels(64),
        boxes_with_masks,
    ),
    "conditional_detr": task("ConditionalDetrForObjectDetection", DETR, pixels(64), boxes),
    "dab_detr": task("DabDetrForObjectDetection", {**DETR, "hidden_size": 32}, pixels(64), boxes),
    "deformable_detr": task(
        "DeformableDetrForObjectDetection",
        {**DETR, "disable_custom_kernels": True, "decoder_layers": 2},
        pixels(64),
        boxes,
    ),
    "table-transformer": task("TableTransformerForObjectDetection", DETR, pixels(64), boxes),
    "grounding-dino": task(
        "GroundingDinoForObjectDetection",
        {
            **DETR,
            "disable_custom_kernels": True,
            "decoder_layers": 2,
            "text_config": {**TEXT, "model_type": "bert"},
            "max_text_len": 8,
        },
        pixels(64, input_ids=lambda: text()["input_ids"], attention_mask=lambda: text()["attention_mask"]),
        None,
        named=("class_embed", "bbox_embed"),
    ),
    "owlvit": task(
        "OwlViTForObjectDetection",
        {**TOWERS, "projection_dim": 16},
        pixels(input_ids=lambda: text()["input_ids"]),
        None,
        named=("class_head", "box_head", "layer_norm"),
    ),
    "owlv2": task(
        "Owlv2ForObjectDetection",
        {**TOWERS, "projection_dim": 16},
        pixels(input_ids=lambda: text()["input_ids"]),
        None,
        named=("class_head", "box_head", "layer_norm", "objectness_head"),
    ),
    # depth and other maps
    "dpt-depth": task("DPTForDepthEstimation", DPT),
    "glpn": task("GLPNForDepthEstimation", GLPN, pixels(32), given(labels=lambda: random(COUNT, 32, 32) + 0.1)),
    "depth_anything": task("DepthAnythingForDepthEstimation", DEPTH),
    "prompt_depth_anything": task(
        "PromptDepthAnythingForDepthEstimation", DEPTH, pixels(prompt_depth=lambda: random(COUNT, 1, 4, 4))
    ),
    "zoedepth": task(
        "ZoeDepthForDepthEstimation",
        {
            "backbone_config": {"model_type": "beit", **BEIT, **FOUR_STAGES, "reshape_hidden_states": False},
            "neck_hidden_sizes": [4, 4, 4, 4],
            "fusion_hidden_size": 4,
            "num_relative_features": 4,
            "bottleneck_features": 4,
            "num_attractors": [2, 2, 2, 1],
            "bin_embedding_dim": 4,
            "patch_transformer_hidden_size": 8,
            "patch_transformer_intermediate_size": 8,
            "patch_transformer_num_attention_heads": 2,
            "bin_configurations": [{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
        },
    ),
    "chmv2": task(
        "CHMv2ForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "dinov3_vit",
                **FOUR,
                **FOUR_STAGES,
                "reshape_hidden_states": True,
                "return_class_token": True,
            },
            "patch_size": 8,
            "post_process_channels": [4, 4, 4, 4],
            "fusion_hidden_size": 4,
            "head_hidden_size": 4,
            "number_output_channels": 4,
            "reassemble_factors": [4, 2, 1, 0.5],
        },
    ),
    "tipsv2-depth": task("Tipsv2DptForDepthEstimation", TIPS),
    "tipsv2-normals": task("Tipsv2DptForNormalEstimation", TIPS),
    "tipsv2-dense": task("Tipsv2DptForDensePrediction", TIPS),
    "sapiens2-normals": task("Sapiens2ForNormalEstimation", SAPIENS),
    "sapiens2-points": task("Sapiens2ForPointmapEstimation", SAPIENS),
    "sapiens2-pose": task("Sapiens2ForPoseEstimation", SAPIENS, None, given(labels=lambda: random(COUNT, 3, 2, 2))),
    "sapiens2-matting": task("Sapiens2ForImageMatting", {**SAPIENS, "num_labels": 4}),
    "vitpose": task(
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                **MLP_RATIO,
                "image_size": [16, 16],
                "patch_size": [8, 8],
                "out_features": ["stage3"],
            },
            **LABELS,
        },
    ),
    "vitmatte": task(
        "VitMatteForImageMatting",
        {
            "backbone_config": {
                **FAMILIES["vitdet"].config,
                "model_type": "vitdet",
                "num_channels": 4,
                "patch_size": 16,
                "out_features": ["stage3"],
            },
            "hidden_size": 16,
            "convstream_hidden_sizes": [4, 4, 4],
            "fusion_hidden_sizes": [4, 4, 4, 4],
        },
        pixels(32, 4),
        None,
    ),
    # two towers, of which the other one trains in full
    **{
        name: task(
            model,
            {**TOWERS, **options},
            pixels(size, **{"input_ids": lambda: text()["input_ids"], **others}),
            CONTRASTIVE if contrastive else None,
            named=named,
        )
        for name, model, options, size, others, contrastive, named in (
            ("clip-towers", "CLIPModel", {}, 16, {}, True, ("text_model", *PROJECTIONS)),
            ("metaclip_2-towers", "MetaClip2Model", {}, 16, {}, True, ("text_model", *PROJECTIONS)),
            ("siglip-towers", "SiglipModel", {}, 16, {}, True, ("text_model",)),
            ("chinese_clip-towers", "ChineseCLIPModel", {}, 16, {}, True, ("text_model", *PROJECTIONS)),
            (
                "altclip-towers",
                "AltCLIPModel",
                {"text_config": {**TEXT, "project_dim": 8}},
                16,
                {},
                True,
                ("text_model", *PROJECTIONS),
            ),
            ("clipseg-towers", "CLIPSegModel", {}, 16, {}, True, ("text_model", *PROJECTIONS)),
            ("aimv2-towers", "Aimv2Model", {}, 16, {}, False, ("text_model", *PROJECTIONS)),
            ("owlvit-towers", "OwlViTModel", {}, 16, {}, True, ("text_model", *PROJECTIONS)),
            ("owlv2-towers", "Owlv2Model", {}, 16, {}, True, ("text_model", *PROJECTIONS)),
            (
                "groupvit-towers",
                "GroupViTModel",
                {"vision_config": FAMILIES["groupvit"].config, "projection_intermediate_dim": 8},
                16,
                {},
                True,
                ("text_model", *PROJECTIONS),
            ),
            ("blip-towers", "BlipModel", {}, 16, {}, True, ("text_model", "visual_projection")),
            ("tipsv2-towers", "Tipsv2Model", {"vision_config": MLP_RATIO}, 16, {}, True, ("text_model",)),
            (
                "blip-retrieval",
                "BlipForImageTextRetrieval",
                {"image_text_hidden_size": 8},
                16,
                {},
                False,
                ("text_encoder", "itm_head"),
            ),
        )
    },
    # a decoder that takes prompts
    **{
        name: task(
            model,
            {
                "vision_config": {**SAM, "num_pos_feats": 4},
                "prompt_encoder_config": {
                    "hidden_size": 8,
                    "image_size": 32,
                    "patch_size": 8,
                    "mask_input_channels": 4,
                },
                "mask_decoder_config": {
                    "hidden_size": 8,
                    "mlp_dim": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "iou_head_hidden_dim": 8,
                    **options,
                },
            },
            pixels(32, input_points=lambda: random(COUNT, 1, 2, 2) * 32),
            named=("mask_decoder",),
        )
        for name, model, options in (
            ("sam-prompts", "SamModel", {}),
            ("sam_hq-prompts", "SamHQModel", {"vit_dim": 16}),
        )
    },
    # answers in text
    **{
        name: task(
            model,
            {"vision_config": {**vision, **PLAIN}, "text_config": WORDS, **options},
            pixels(input_ids=lambda: LOOKING, attention_mask=lambda: torch.ones_like(LOOKING)),
            given(labels=lambda: LOOKING),
            named=named,
            fresh=tuple(f"model.{name}" for name in named),
        )
        for name, model, vision, options, named in (
            (
                "llava",
                "LlavaForConditionalGeneration",
                {"model_type": "clip_vision_model"},
                {"image_token_id": 31, "vision_feature_layer": -1},
                ("multi_modal_projector",),
            ),
            (
                "vipllava",
                "VipLlavaForConditionalGeneration",
                {"model_type": "clip_vision_model"},
                {"image_token_id": 31, "vision_feature_layers": [-1, -2]},
                (),
            ),
            (
                "paligemma",
                "PaliGemmaForConditionalGeneration",
                {"model_type": "siglip_vision_model"},
                {"image_token_id": 31, "projection_dim": 16, "text_config": {**WORDS, "model_type": "gemma"}},
                ("multi_modal_projector",),
            ),
        )
    },
    # heads of models that take text beside images
    "gemma3-sequence": task(
        "Gemma3ForSequenceClassification",
        {
            "vision_config": {"model_type": "siglip_vision_model", **PLAIN},
            "text_config": {**WORDS, "model_type": "gemma3_text", "sliding_window": 8},
            "mm_tokens_per_image": 4,
            "image_token_index": 31,
            "image_token_id": 31,
            **LABELS,
        },
        pixels(
            input_ids=lambda: LOOKING,
            attention_mask=lambda: torch.ones_like(LOOKING),
            token_type_ids=lambda: (LOOKING == 31).long(),
        ),
        CLASSES,
        named=("score",),
        fresh=("score",),
    ),
    "colpali": task(
        "ColPaliForRetrieval",
        {
            "vlm_config": {
                "model_type": "paligemma",
                "vision_config": {"model_type": "siglip_vision_model", **PLAIN},
                "text_config": {**WORDS, "model_type": "gemma"},
                "image_token_id": 31,
                "projection_dim": 16,
            },
            "embedding_dim": 8,
        },
        pixels(input_ids=lambda: LOOKING, attention_mask=lambda: torch.ones_like(LOOKING)),
        named=("embedding_proj_layer",),
    ),
    **{
        name: task(
            model,
            {
                "vision_config": {"model_type": "siglip_vision_model", **PLAIN},
                "text_config": {**TEXT, "model_type": "modernbert", "cls_token_id": 2, "sep_token_id": 3, **LABELS},
                "pixel_shuffle_factor": 1,
                "image_token_id": 31,
                **LABELS,
            },
            given(
                pixel_values=lambda: random(COUNT, 1, 3, 16, 16),
                input_ids=lambda: LOOKING,
                attention_mask=lambda: torch.ones_like(LOOKING),
            ),
            labels,
            named=named,
            fresh=fresh,
            several=True,
        )
        for name, model, labels, named, fresh in (
            (
                "modernvbert-masked",
                "ModernVBertForMaskedLM",
                given(labels=lambda: LOOKING),
                ("projection_head",),
                ("projection_head",),
            ),
            (
                "modernvbert-sequence",
                "ModernVBertForSequenceClassification",
                CLASSES,
                ("head", "classifier"),
                ("head", "classifier"),
            ),
            (
                "modernvbert-token",
                "ModernVBertForTokenClassification",
                given(labels=lambda: LOOKING % 3),
                ("head", "classifier"),
                ("head", "classifier"),
            ),
        )
    },
    "blip-questions": task(
        "BlipForQuestionAnswering",
        TOWERS,
        pixels(input_ids=lambda: text()["input_ids"]),
        given(labels=lambda: text()["input_ids"]),
        named=("text_decoder",),
    ),
    "blip_2-retrieval": task(
        "Blip2ForImageTextRetrieval",
        {
            "vision_config": PLAIN,
            "qformer_config": {
                **TEXT,
                "encoder_hidden_size": 16,
                "use_qformer_text_input": True,
                "num_hidden_layers": 2,
            },
            "num_query_tokens": 2,
            "image_text_hidden_size": 8,
            "image_token_index": 31,
        },
        pixels(**{name: (lambda name=name: text()[name]) for name in ("input_ids", "attention_mask")}),
        None,
        named=("itm_head", "vision_projection", "text_projection"),
        fresh=("itm_head", "vision_projection", "text_projection"),
    ),
    # images made from images
    "vit-masked": task(
        "ViTForMaskedImageModeling", {**PLAIN, "encoder_stride": 8}, None, given(bool_masked_pos=lambda: hidden(4))
    ),
    "deit-masked": task(
        "DeiTForMaskedImageModeling", {**PLAIN, "encoder_stride": 8}, None, given(bool_masked_pos=lambda: hidden(4))
    ),
    "beit-masked": task(
        "BeitForMaskedImageModeling",
        {**PLAIN, "vocab_size": 8, "use_mask_token": True},
        pixels(bool_masked_pos=lambda: hidden(4)),
        given(labels=lambda: whole(8, 4)),
        named=("layernorm",),
    ),
    "swin-masked": task(
        "SwinForMaskedImageModeling",
        {**SWIN, "encoder_stride": 8},
        pixels(32),
        given(bool_masked_pos=lambda: hidden(64)),
    ),
    "swinv2-masked": task(
        "Swinv2ForMaskedImageModeling",
        {**SWIN, "encoder_stride": 8},
        pixels(32),
        given(bool_masked_pos=lambda: hidden(64)),
    ),
    "videomae-pretraining": task(
        "VideoMAEForPreTraining",
        {
            **FAMILIES["videomae"].config,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        lambda: {**FAMILIES["videomae"].images(COUNT), "bool_masked_pos": hidden(4)},
        measured=("pixel_values", "bool_masked_pos"),
        fresh=("encoder_to_decoder", "decoder"),  # mask_token, a parameter, is named by a warning if it is new
    ),
    "hiera-pretraining": task(
        "HieraForPreTraining",
        {**FAMILIES["hiera"].config, "decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 2},
        pixels(32, noise=lambda: random(COUNT, 16)),
    ),
    "swin2sr": task("Swin2SRForImageSuperResolution", FAMILIES["swin2sr"].config, pixels(8)),
}

STOCK_REFUSES = ("dab_detr", "deformable_detr", "grounding-dino")
"""Those that stock PEFT cannot adapt: it asks for input embeddings, and the class has no `get_input_embeddings`."""
LORA_IS_LOST = ("maskformer",)
"""Those whose LoRA weights PEFT does not find again when it loads them, so that only `training="full"` is allowed."""
