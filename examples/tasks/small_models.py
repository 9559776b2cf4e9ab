"""Small models for the scripts in this folder, for when no checkpoint is given.

The blocks and patch embeddings of their vision towers have the weights of ../fashion-mnist-vit, which was pretrained
on Fashion-MNIST. All else is random: decoders, text towers, language models. They show that a task works, on a CPU and
without a network. What a criterion is worth on a task, only a pretrained checkpoint of that task tells.
"""

from __future__ import annotations

from pathlib import Path

import torch
from scenes import CANVAS, FAR, FRAMES, MOVES, QUESTION, SIDE, names
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SegformerImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    ViTModel,
)

from plasticity_peft import find_components
from plasticity_peft.components.architecture import find_architecture

VIT = Path(__file__).resolve().parents[1] / "fashion-mnist-vit"
SIZES = {
    "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384, "patch_size": 4,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
"""Of fashion-mnist-vit."""
STAGES = ["stage2", "stage3", "stage4", "stage6"]
NORMALIZED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FIXED_POSITIONS = 5.0
"""Size of the positions that VideoMAE adds to its tokens, as a multiple of those of fashion-mnist-vit."""
WORDS = ["<pad>", "<end>", "<unknown>", "<image>", "a", "photo", "of"]


def segmenter(folder: Path) -> str:
    """Writes UperNet on a DINOv2 backbone, and returns the folder."""
    labels = dict(enumerate(["background", *names()]))
    config = UperNetConfig(
        backbone_config=dinov2(reshape_hidden_states=True),
        hidden_size=48,
        pool_scales=[1, 2],
        auxiliary_in_channels=96,
        auxiliary_channels=24,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    processor = SegformerImageProcessor(size={"height": CANVAS, "width": CANVAS}, **NORMALIZED)
    return saved(UperNetForSemanticSegmentation(config), folder, processor)


def depth_estimator(folder: Path) -> str:
    """Writes Depth Anything, of depths in meters, and returns the folder."""
    config = DepthAnythingConfig(
        backbone_config=dinov2(reshape_hidden_states=False),
        reassemble_hidden_size=96,
        patch_size=4,
        neck_hidden_sizes=[24, 24, 48, 48],
        fusion_hidden_size=24,
        head_hidden_size=16,
        depth_estimation_type="metric",
        max_depth=int(FAR),
    )
    size = {"height": CANVAS, "width": CANVAS}
    return saved(DepthAnythingForDepthEstimation(config), folder, DPTImageProcessor(size=size, **NORMALIZED))


def video_classifier(folder: Path) -> str:
    """Writes VideoMAE, and returns the folder."""
    labels = dict(enumerate(MOVES))
    config = VideoMAEConfig(
        **SIZES,
        image_size=CANVAS,
        num_frames=FRAMES,
        tubelet_size=2,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    processor = VideoMAEImageProcessor(size={"height": CANVAS, "width": CANVAS}, do_center_crop=False, **NORMALIZED)
    return saved(VideoMAEForVideoClassification(config), folder, processor, scale=FIXED_POSITIONS)


def image_and_text(folder: Path) -> str:
    """Writes SigLIP, and returns the folder."""
    words = tokenizer(8)
    text = SiglipTextConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        projection_size=96,
        vocab_size=len(words),
        max_position_embeddings=8,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
    )
    config = SiglipConfig(
        text_config=text.to_dict(), vision_config=SiglipVisionConfig(**SIZES, image_size=SIDE).to_dict()
    )
    model = SiglipModel(config)
    with torch.no_grad():  # as SigLIP was trained
        model.logit_scale.fill_(10.0).log_()
        model.logit_bias.fill_(-10.0)
    return saved(model, folder, SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, **NORMALIZED), words)


def vision_language(folder: Path) -> str:
    """Writes LLaVA, and returns the folder."""
    words = tokenizer(128)
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        initializer_range=0.125,  # or hardly anything of the image reaches the answer
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SIZES, image_size=SIDE, vision_use_head=False),
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, **NORMALIZED),
        words,
        patch_size=4,
        vision_feature_select_strategy="full",
    )
    return saved(LlavaForConditionalGeneration(config), folder, processor)


def tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the words that occur."""
    words = dict.fromkeys([*WORDS, *QUESTION.split(), *" ".join(names()).split()])
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=["<image>"],
        model_max_length=longest,
    )


def dinov2(**options: bool) -> Dinov2Config:
    """Returns the config of a backbone with the blocks of fashion-mnist-vit."""
    sizes = {name: value for name, value in SIZES.items() if name != "intermediate_size"}
    return Dinov2Config(**sizes, mlp_ratio=4, image_size=SIDE, out_features=STAGES, **options)


def saved(model: PreTrainedModel, folder: Path, *others: object, scale: float = 1.0) -> str:
    """Writes a model, with the weights of fashion-mnist-vit in its tower, and its processors; returns the folder."""
    initialize(model, scale)
    for each in (model, *others):
        each.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def initialize(model: nn.Module, scale: float) -> None:
    """Copies the weights of fashion-mnist-vit into the vision tower of a model with blocks of the same sizes.

    What is added to the tokens is multiplied by `scale`. The blocks do the same then, as they normalize the tokens.
    """
    vit = ViTModel.from_pretrained(VIT, add_pooling_layer=False)
    for part, other in zip(find_components(vit), find_components(model), strict=True):
        for path, own in zip(other.modules, part.modules, strict=True):
            # In transformers 4, the biases of VideoMAE's attention lie elsewhere, and stay zero.
            model.get_submodule(path).load_state_dict(vit.get_submodule(own).state_dict(), strict=False)
        if other.kind in ("MHA", "FC2"):
            for values in model.get_submodule(other.modules[-1]).parameters():
                values.mul_(scale)
    tower = model.get_submodule(find_architecture(model).backbone)
    patches = next(module for module in tower.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
    given = vit.embeddings.patch_embeddings.projection
    kernel = given.weight if isinstance(patches, nn.Conv2d) else given.weight[:, :, None] / patches.kernel_size[0]
    patches.weight.copy_(scale * kernel.expand_as(patches.weight))
    patches.bias.copy_(scale * given.bias)
    for name, values in tower.named_parameters():
        if name.endswith("cls_token"):
            values.copy_(vit.embeddings.cls_token)
        elif "position_embed" in name:  # SigLIP has none for a class token
            values.copy_(vit.embeddings.position_embeddings[:, -values.shape[-2] :].reshape(values.shape))
