"""Small vision transformers with the names, and the ways to call their layers, of timm's; timm is not needed.

They stand for plain ViTs (DINOv2 among them), DeiT, SigLIP, BEiT, EVA-02, DINOv3, Swin and Swin V2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.support.models import disturbed

WIDTH, HEADS, SIZE, LABELS = 16, 2, 16, 3


@dataclass(frozen=True)
class Style:
    """What tells one architecture of timm from another."""

    biases_apart: bool = False
    """Whether query and value have biases beside the fused layer, whose weight is then used without calling it."""
    calls_layer: bool = False
    """Whether the layer is called in spite of its biases (`qkv_bias_separate=True`): the same numbers."""
    split: bool = False
    """Whether query, key and value are layers of their own."""
    gated: bool = False
    post_norm: bool = False
    swin: bool = False
    distilled: bool = False
    pooled: bool = False
    """Whether attention pools the tokens, as in SigLIP."""


STYLES = {
    "vit": Style(),
    "deit": Style(distilled=True),
    "siglip": Style(pooled=True),
    "vit-post-norm": Style(post_norm=True),
    "beit": Style(biases_apart=True),
    "eva02": Style(biases_apart=True, gated=True),
    "eva02-split": Style(split=True, gated=True),
    "dinov3": Style(gated=True),
    "swin": Style(swin=True),
    "swinv2": Style(swin=True, post_norm=True, biases_apart=True),
}
UNCALLED = tuple(name for name, style in STYLES.items() if style.biases_apart)


class Attention(nn.Module):
    """Attention over all tokens that it gets."""

    def __init__(self, width: int, style: Style) -> None:
        super().__init__()
        self.calls_layer = style.calls_layer or not style.biases_apart
        if style.split:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(width, width, bias=bias) for bias in (True, False, True)
            )
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=not (style.biases_apart or style.gated))
        self.q_bias = nn.Parameter(torch.zeros(width)) if style.biases_apart else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if style.biases_apart else None
        if style.swin and style.post_norm:
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, HEADS, bias=False))
        self.proj = nn.Linear(width, width)

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "q_proj"):
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.qkv(x) + bias if self.calls_layer else F.linear(x, weight=self.qkv.weight, bias=bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        count, tokens, width = x.shape
        parts = self.inputs(x).reshape(count, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        if hasattr(self, "cpb_mlp"):
            place = torch.stack([torch.arange(tokens).outer(torch.ones(tokens, dtype=int)).T / tokens] * 2, dim=-1)
            mask = self.cpb_mlp(place.to(x)).permute(2, 0, 1)
        x = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(count, tokens, width))


class Mlp(nn.Module):
    """Two layers; with a gate and a norm between them, as in EVA-02, if it is gated."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        if gated:
            self.fc1_g = nn.Linear(width, 2 * width)
            self.fc1_x = nn.Linear(width, 2 * width)
            self.norm = nn.LayerNorm(2 * width)
        else:
            self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "fc1"):
            return self.fc2(F.gelu(self.fc1(x)))
        gate = self.fc1_g(x)
        return self.fc2(self.norm(F.silu(gate) * self.fc1_x(x)))


class Block(nn.Module):
    """A block that gets (images, tokens, features), or (images, rows, columns, features) in Swin."""

    def __init__(self, width: int, style: Style) -> None:
        super().__init__()
        self.style = style
        layers = {"norm1": nn.LayerNorm(width), "attn": Attention(width, style), "norm2": nn.LayerNorm(width)}
        layers["mlp"] = Mlp(width, style.gated)
        for name in ("attn", "norm1", "mlp", "norm2") if style.post_norm else layers:
            self.add_module(name, layers[name])

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        if not self.style.swin:
            return self.attn(x)
        images, rows, columns, width = x.shape  # in windows of 2 x 2 tokens
        windows = x.reshape(images, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        attended = self.attn(windows.reshape(-1, 4, width), mask=None)
        attended = attended.reshape(images, rows // 2, columns // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return attended.reshape(images, rows, columns, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.style.post_norm:
            x = x + self.norm1(self.attend(x))
            return x + self.norm2(self.mlp(x))
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Patches of 4 x 4 pixels: a grid of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = (SIZE, SIZE)
        self.proj = nn.Conv2d(3, WIDTH, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Pool(nn.Module):
    """Pools tokens by a learnt query; it belongs to the pretrained model, and is no head."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key, value = self.kv(x).chunk(2, dim=-1)
        return F.scaled_dot_product_attention(self.latent.expand(len(x), -1, -1), key, value)[:, 0]


class VisionTransformer(nn.Module):
    """A plain one: the blocks lie beside the patches and the head."""

    def __init__(self, style: Style, num_classes: int = LABELS, depth: int = 2) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 2 * SIZE, 2 * SIZE), "classifier": "head"}
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIZE // 4) ** 2, WIDTH))
        self.patch_embed = Patches()
        self.blocks = nn.Sequential(*(Block(WIDTH, style) for _ in range(depth)))
        self.norm = nn.LayerNorm(WIDTH)
        self.attn_pool = Pool() if style.pooled else None
        self.head = nn.Linear(WIDTH, num_classes) if num_classes else nn.Identity()
        if style.distilled:
            self.head_dist = nn.Linear(WIDTH, num_classes)

    def get_classifier(self) -> Any:
        return (self.head, self.head_dist) if hasattr(self, "head_dist") else self.head

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(1, 2)], dim=1)
        return self.norm(self.blocks(x + self.pos_embed))

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, 0] if self.attn_pool is None else self.attn_pool(x)
        return (self.head(x) + self.head_dist(x)) / 2 if hasattr(self, "head_dist") else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class Stage(nn.Module):
    """The blocks of a stage, after a layer that makes one token of four."""

    def __init__(self, style: Style, width: int, depth: int, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else nn.Linear(2 * width, width)
        self.blocks = nn.Sequential(*(Block(width, style) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.downsample, nn.Linear):
            images, rows, columns, width = x.shape
            x = x.reshape(images, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
            x = self.downsample(x.reshape(images, rows // 2, columns // 2, 4 * width))
        return self.blocks(x)


class ClassifierHead(nn.Module):
    """Pools, then classifies."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean(dim=(1, 2)))


class SwinTransformer(nn.Module):
    """A hierarchical one, with two stages."""

    def __init__(self, style: Style, num_classes: int = LABELS, depth: int = 2) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "classifier": "head.fc"}
        self.patch_embed = Patches()
        self.layers = nn.Sequential(Stage(style, WIDTH, depth, True), Stage(style, 2 * WIDTH, 1, False))
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.head = ClassifierHead(2 * WIDTH, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layers(self.patch_embed(x)))

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def timm_like(style: str | Style, **options: Any) -> nn.Module:
    """Returns a small model with fixed weights in which no two components are alike, in evaluation mode."""
    found = STYLES[style] if isinstance(style, str) else style
    torch.manual_seed(0)
    model = (SwinTransformer if found.swin else VisionTransformer)(found, **options)
    return disturbed(model.eval(), seed=1)


def images(count: int = 6) -> torch.Tensor:
    """Returns images for the small models: float32 of shape (count, 3, 16, 16)."""
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
