"""The names of the components in each architecture of transformers, and in the models of timm, as rows of data.

A family whose modules were renamed has one row per naming. The modules of a model decide which row applies, not a
version number. `structure.py` validates a row against the structure of the model.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass, replace

from plasticity_peft.checks import shown
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """The names of the layers in a block of a vision transformer, as paths relative to the block.

    Examples:
        >>> layout = BlockLayout(
        ...     blocks="encoder.layers.*", LN1="norm1", MHA="attn", projections=("attn.qkv", "attn.proj"), LN2="norm2",
        ...     FC1="mlp.fc1", FC2="mlp.fc2",
        ... )
        >>> layout.weights("MHA")
        ('attn.qkv', 'attn.proj')
    """

    blocks: str
    """The end of the path of a block, with `*` for an index: `encoder.layers.*`. In a hierarchical model there are two
    `*`, and the first is the stage: `encoder.stages.*.layers.*`. Block ids are then "stage.block"."""
    LN1: str
    """The norm that belongs to the attention: before it, or after it if `post_norm`."""
    MHA: str
    """The attention module, which maps tokens to tokens and contains the projections."""
    projections: tuple[str, ...]
    """The linear layers of the attention: query, key, value and output, or the fused query-key-value and output."""
    LN2: str
    """The norm that belongs to the MLP."""
    FC1: str | tuple[str, ...]
    """The input layer of the MLP. In a gated MLP (SwiGLU), both input layers, the gate first."""
    FC2: str
    """The output layer of the MLP."""
    post_norm: bool = False
    """True if the norms come after the attention and the MLP (Swin V2)."""
    others: tuple[str, ...] = ()
    """Further linear layers and norms of a block. They belong to no component, and are neither measured nor
    trained."""
    random_masking: bool = False
    """True if a forward pass hides patches by random numbers, `noise` (ViTMAE). While measuring, the same patches are
    hidden in all images."""

    def path(self, kind: str) -> str:
        """Returns the path of the module that computes the component of this kind. A gated FC1 has two: the first."""
        return self.MHA if kind == "MHA" else self.weights(kind)[0]

    def weights(self, kind: str) -> tuple[str, ...]:
        """Returns the paths of the modules with the weights of the component of this kind."""
        if kind == "MHA":
            return self.projections
        names: str | tuple[str, ...] = getattr(self, kind)
        return (names,) if isinstance(names, str) else names

    @property
    def order(self) -> tuple[str, ...]:
        """The kinds in the order in which a block calls them."""
        return ("MHA", "LN1", "FC1", "FC2", "LN2") if self.post_norm else KINDS

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the path of a block in a model. Group 1 is the path before `blocks`; the others are the indices."""
        return re.compile(r"((?:.+\.)?)" + re.escape(self.blocks).replace(r"\*", r"(\d+)"))


def _split(attention: str, output: str, names: str = "query key value") -> tuple[str, ...]:
    return (*(f"{attention}.{name}" for name in names.split()), output)


_Q_PROJ = "q_proj k_proj v_proj"

_VIT = BlockLayout(
    blocks="layers.*",
    LN1="layernorm_before",
    MHA="attention",
    projections=_split("attention", "attention.o_proj", _Q_PROJ),
    LN2="layernorm_after",
    FC1="mlp.fc1",
    FC2="mlp.fc2",
)
_VIT_UNTIL_5_8 = replace(
    _VIT,
    blocks="encoder.layer.*",
    projections=_split("attention.attention", "attention.output.dense"),
    FC1="intermediate.dense",
    FC2="output.dense",
)
_DINOV2 = replace(_VIT, blocks="encoder.layer.*", LN1="norm1", LN2="norm2")
_DINOV2_GATED = replace(_DINOV2, FC1=("mlp.gate_proj", "mlp.up_proj"), FC2="mlp.down_proj")
_DINOV2_UNTIL_5_17 = replace(_DINOV2, projections=_VIT_UNTIL_5_8.projections)
_DINOV2_GATED_UNTIL_5_17 = replace(_DINOV2_UNTIL_5_17, FC1="mlp.weights_in", FC2="mlp.weights_out")
_DINOV3 = replace(_DINOV2, blocks="layer.*", FC1="mlp.up_proj", FC2="mlp.down_proj")
_DINOV3_GATED = replace(_DINOV3, FC1=("mlp.gate_proj", "mlp.up_proj"))
_CLIP = BlockLayout(
    blocks="encoder.layers.*",
    LN1="layer_norm1",
    MHA="self_attn",
    projections=_split("self_attn", "self_attn.out_proj", _Q_PROJ),
    LN2="layer_norm2",
    FC1="mlp.fc1",
    FC2="mlp.fc2",
)
_BLIP = replace(_CLIP, projections=("self_attn.qkv", "self_attn.projection"))
_SAM = replace(
    _BLIP, blocks="layers.*", MHA="attn", projections=("attn.qkv", "attn.proj"), FC1="mlp.lin1", FC2="mlp.lin2"
)
_AIMV2 = BlockLayout(
    blocks="encoder.layers.*",
    LN1="rms_norm1",
    MHA="attention",
    projections=_split("attention", "attention.out_proj", _Q_PROJ),
    LN2="rms_norm2",
    FC1=("ffn.gate_proj", "ffn.up_proj"),
    FC2="ffn.down_proj",
)
_INTERNVL = replace(
    _VIT,
    blocks="encoder.layer.*",
    projections=_split("attention", "attention.projection_layer", _Q_PROJ),
    others=("attention.q_norm", "attention.k_norm"),
)
_SWIN = replace(_VIT, blocks="encoder.layers.*.blocks.*")
_SWIN_UNTIL_5_8 = replace(
    _VIT_UNTIL_5_8, blocks=_SWIN.blocks, projections=_split("attention.self", "attention.output.dense")
)
_SWINV2 = replace(
    _SWIN_UNTIL_5_8,
    post_norm=True,
    others=tuple(f"attention.self.continuous_position_bias_mlp.{index}" for index in (0, 2)),
)
_HIERA = replace(
    _VIT, blocks="encoder.stages.*.layers.*", MHA="attn", projections=("attn.qkv", "attn.proj"), others=("proj",)
)
_PVT = BlockLayout(
    blocks="encoder.block.*.*",
    LN1="layer_norm_1",
    MHA="attention",
    projections=_split("attention.self", "attention.output.dense"),
    LN2="layer_norm_2",
    FC1="mlp.dense1",
    FC2="mlp.dense2",
    others=("attention.self.layer_norm",),
)
_PVT_V2 = replace(
    _PVT,
    blocks="encoder.layers.*.blocks.*",
    projections=_split("attention", "attention.proj"),
    others=("attention.layer_norm",),
)
_SEGFORMER = replace(_VIT, blocks="stages.*.blocks.*", others=("attention.sequence_reduction.layer_norm",))
_CVT = replace(
    _VIT_UNTIL_5_8,
    blocks="encoder.stages.*.layers.*",
    projections=_split(
        "attention.attention", "attention.output.dense", "projection_query projection_key projection_value"
    ),
)

_TIMM_VIT = BlockLayout(
    blocks="blocks.*",
    LN1="norm1",
    MHA="attn",
    projections=("attn.qkv", "attn.proj"),
    LN2="norm2",
    FC1="mlp.fc1",
    FC2="mlp.fc2",
    others=(
        *(f"attn.{name}" for name in ("q_norm", "k_norm", "norm", "gate", "rel_pos.mlp.fc1", "rel_pos.mlp.fc2")),
        "mlp.norm",
        "proj",
    ),
)
_TIMM_SWIN = replace(_TIMM_VIT, blocks="layers.*.blocks.*", others=())
_TIMM_SWINV2 = replace(_TIMM_SWIN, post_norm=True, others=("attn.cpb_mlp.0", "attn.cpb_mlp.2"))
_TIMM_SWINV2_CR = replace(
    _TIMM_SWINV2, blocks="stages.*.blocks.*", others=("attn.meta_mlp.fc1", "attn.meta_mlp.fc2", "norm3")
)


def _of_timm() -> tuple[BlockLayout, ...]:
    """Returns the rows of the models of timm, which have no model type: all are tried on each."""
    split = replace(_TIMM_VIT, projections=_split("attn", "attn.proj", _Q_PROJ))
    gated = [replace(row, FC1=("mlp.fc1_g", "mlp.fc1_x")) for row in (_TIMM_VIT, split)]
    plain = [_TIMM_VIT, split, *gated, replace(_TIMM_VIT, FC1="mlp.layers.0", FC2="mlp.layers.1")]
    swins = [_TIMM_SWIN, _TIMM_SWINV2, _TIMM_SWINV2_CR]
    flat = [replace(row, blocks=row.blocks.replace(".*.", "_*.")) for row in swins]  # features_only=True
    return (*plain, *(replace(row, post_norm=True) for row in plain), *swins, *flat)


TIMM = "timm"
"""The model type under which the names of timm's models are known. They have none of their own."""
TIMM_TYPES = (TIMM, "timm_wrapper", "timm_backbone")
"""The same, with those of the classes of transformers that run a model of timm."""

_BUILT_IN: dict[str, tuple[BlockLayout, ...]] = {
    **dict.fromkeys(("beit", "deit", "ijepa", "pixio", "vit", "vit_msn", "vivit"), (_VIT, _VIT_UNTIL_5_8)),
    "vit_mae": (replace(_VIT, random_masking=True), replace(_VIT_UNTIL_5_8, random_masking=True)),
    **dict.fromkeys(("data2vec-vision", "dpt", "flava_image_model", "videomae", "yolos"), (_VIT_UNTIL_5_8,)),
    "qianfan_ocr_vision": (replace(_INTERNVL, blocks="layers.*"),),
    "mgp-str": (
        replace(
            _VIT,
            blocks="encoder.blocks.*",
            LN1="norm1",
            LN2="norm2",
            MHA="attn",
            projections=("attn.qkv", "attn.proj"),
        ),
    ),
    "vjepa2": (replace(_DINOV2, projections=_split("attention", "attention.proj")),),
    "vitpose_backbone": (replace(_VIT_UNTIL_5_8, FC1="mlp.fc1", FC2="mlp.fc2"),),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers", "radio", "tipsv2_vision_model"),
        (_DINOV2, _DINOV2_GATED, _DINOV2_UNTIL_5_17, _DINOV2_GATED_UNTIL_5_17),
    ),
    "dinov3_vit": (_DINOV3, _DINOV3_GATED),
    **dict.fromkeys(
        (
            "altclip_vision_model",
            "chinese_clip_vision_model",
            "clip_vision_model",
            "clipseg_vision_model",
            "git_vision_model",
            "idefics3_vision",
            "kosmos_2_vision_model",
            "metaclip_2_vision_model",
            "mlcd_vision_model",
            "owlv2_vision_model",
            "owlvit_vision_model",
            "siglip2_vision_model",
            "siglip_vision_model",
            "smolvlm_vision",
        ),
        (_CLIP,),
    ),
    **dict.fromkeys(
        ("blip_2_vision_model", "blip_vision_model", "instructblip_vision_model", "instructblipvideo_vision_model"),
        (_BLIP,),
    ),
    "groupvit_vision_model": (replace(_CLIP, blocks="encoder.stages.*.layers.*"),),
    "janus_vision_model": (replace(_CLIP, projections=_split("self_attn", "self_attn.projection_layer", _Q_PROJ)),),
    "aimv2_vision_model": (_AIMV2,),
    "sapiens2": (
        replace(_DINOV3_GATED, others=("attention.q_norm", "attention.k_norm")),
        replace(_DINOV3, others=("attention.q_norm", "attention.k_norm")),
    ),
    **dict.fromkeys(("sam_hq_vision_model", "sam_vision_model"), (_SAM,)),
    "sam3_vit_model": (replace(_VIT, LN1="layer_norm1", LN2="layer_norm2"),),
    "vitdet": (replace(_DINOV2, projections=("attention.qkv", "attention.proj")),),
    "internvl_vision": (_INTERNVL,),
    "swin": (_SWIN, _SWIN_UNTIL_5_8),
    **dict.fromkeys(("donut-swin", "maskformer-swin"), (_SWIN_UNTIL_5_8,)),
    "swin2sr": (replace(_SWINV2, blocks="encoder.stages.*.layers.*"),),
    "swinv2": (_SWINV2,),
    "hiera": (_HIERA,),
    **dict.fromkeys(("glpn", "pvt"), (_PVT,)),
    "pvt_v2": (_PVT_V2,),
    "segformer": (_SEGFORMER, _PVT),
    "cvt": (_CVT,),
    "mobilevit": (replace(_VIT_UNTIL_5_8, blocks="encoder.layer.*.transformer.layer.*"),),
    **dict.fromkeys(TIMM_TYPES, _of_timm()),
}

LAYOUTS: ChainMap[str, tuple[BlockLayout, ...]] = ChainMap({}, _BUILT_IN)
"""The namings of the blocks of each supported `config.model_type`, newest first. `del LAYOUTS[model_type]` removes
registered namings and restores the built-in ones."""


def register_architecture(model_type: str, *layouts: BlockLayout, replace: bool = False) -> None:
    """Adds the names of the components of a vision transformer that plasticity_peft does not know.

    The names are validated against each model. All linear layers and norms of a block must be named, their widths must
    fit, and a forward pass must call each layer once in the usual order. Every process of a distributed run must
    register them.

    Args:
        model_type: `config.model_type` of the model, or of the part of it that contains the blocks.
        layouts: one for each naming of the blocks. Several calls for one `model_type` add up: a model may have any of
            the namings, and a built-in model type keeps its own.
        replace: whether `layouts` replace the known namings of `model_type` instead, for example to correct a mistake.

    Raises:
        ConfigError: `model_type` is not a name, or a layout is missing or not valid.

    Examples:
        >>> register_architecture("my_vit", BlockLayout(
        ...     blocks="encoder.layers.*", LN1="norm1", MHA="attn", projections=("attn.qkv", "attn.proj"), LN2="norm2",
        ...     FC1="mlp.fc1", FC2="mlp.fc2",
        ... ))
        >>> "my_vit" in LAYOUTS
        True
        >>> del LAYOUTS["my_vit"]
    """
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(f"model_type must be a name, as in config.model_type. Got {shown(model_type)}.")
    if not layouts:
        raise ConfigError("Give at least one BlockLayout.")
    for layout in layouts:
        _check_layout(layout)
    known = () if replace else LAYOUTS.get(model_type, ())
    LAYOUTS[model_type] = tuple(dict.fromkeys((*known, *layouts)))


def _check_layout(layout: BlockLayout) -> None:
    if not isinstance(layout, BlockLayout):
        raise ConfigError(f"A layout must be a BlockLayout. Got {shown(layout)}.")
    stars = layout.blocks.split(".").count("*")
    if stars not in (1, 2) or not layout.blocks.endswith("*"):
        raise ConfigError(
            "blocks must be the end of the path of a block, with * for its index and, if there are stages, another * "
            f'before it for the stage: "encoder.layers.*", "stages.*.blocks.*". Got {layout.blocks!r}.'
        )
    if not isinstance(layout.projections, tuple) or len(layout.projections) not in (2, 4):
        raise ConfigError(
            "projections must be (query, key, value, output), or (fused query-key-value, output). Got "
            f"{layout.projections!r}."
        )
    names = [name for kind in KINDS for name in layout.weights(kind)]
    if len(set(names)) != len(names):
        repeated = _repeated(names)
        raise ConfigError(f"A layer can belong to one component only. Named more than once: {', '.join(repeated)}.")


def _repeated(names: Iterable[str]) -> list[str]:
    names = list(names)
    return sorted({name for name in names if names.count(name) > 1})
