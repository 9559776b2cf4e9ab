"""Large models: measuring and injection in 1.3 times the memory of the model itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticity_peft.components.architecture import find_architecture
from plasticity_peft.criteria.gradients import GradientsByImage
from plasticity_peft.criteria.parameter_plasticity import features
from plasticity_peft.measuring.left_as_found import LeftAsFound
from tests.support.families import each_kind_of_family, family
from tests.support.forking import run_code
from tests.support.measures import MEASURES

MOST = 1.3
"""Peak of the process above what the libraries take, as a multiple of the model's weights."""

SIZES = {
    # 101 million parameters, of which a block has as large a share as what is kept for it.
    "8 blocks of ViT-L": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "patch_size": 16},
    "ViT-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 16},
    "ViT-H": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
}
SCRIPT = """
import gc, json, os, sys
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification
from plasticity_peft import PlasticityConfig

size, image_size, all_options = json.loads(sys.argv[1])
torch.set_num_threads(1)

def kibibytes(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1])

def adapted(size, image_size, options):
    torch.manual_seed(0)
    config = ViTConfig(**size, intermediate_size=4 * size["hidden_size"], image_size=image_size, num_labels=10)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers takes longer for its weights than all the rest
            parameter.uniform_(-0.03, 0.03)
    bytes_ = sum(parameter.nbytes for parameter in model.parameters())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts from here
    config = PlasticityConfig(
        training="lora",
        target_data=torch.rand(4, 3, image_size, image_size), max_samples=2, batch_size=1, settle=None, **options
    )
    get_peft_model(model, config)
    return bytes_

# What libraries load when they are first used belongs to no model.
small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
for options in all_options:
    adapted(small, 8, options)
gc.collect()
for options in all_options:
    if os.fork() == 0:
        before = kibibytes("VmRSS")
        bytes_ = adapted(size, image_size, options)
        print((kibibytes("VmHWM") - before) * 1024 / bytes_, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def memory(name: str, image_size: int, all_options: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Returns the peak of measuring and injecting over the memory of the model, by options, in processes of their own.

    One image is in a pass, a pair where the measure takes pairs.
    """
    arguments = json.dumps([SIZES[name], image_size, all_options])
    result = run_code(SCRIPT, arguments, folder=folder, timeout=1800)
    assert result.returncode == 0, result.stderr
    found = dict(zip(map(str, all_options), map(float, result.stdout.split()), strict=True))
    print(name, image_size, {options: round(ratio, 3) for options, ratio in found.items()})
    return found


@each_kind_of_family
def test_blocks_that_are_computed_again_give_the_same_numbers(name: str) -> None:
    found = family(name)
    model, images = found.build(), found.images(2)
    architecture = find_architecture(model)
    blocks = [model.get_submodule(path) for path in architecture.blocks]
    with LeftAsFound(model, 0):
        gradients = GradientsByImage(model, architecture, {key: value[:1] for key, value in images.items()})
        found = [
            gradients(2, lambda: features(model, architecture, images).sum(), recompute=recompute)
            for recompute in (False, True)
        ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-12)
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in blocks)


needs_linux = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measured by Linux's /proc")


def check(name: str, image_size: int, all_options: list[dict[str, Any]], folder: Path) -> None:
    """Fails where measuring takes more memory than it may."""
    for options, ratio in memory(name, image_size, all_options, folder).items():
        assert ratio < MOST, (name, options, ratio)


@pytest.mark.slow
@needs_linux
def test_a_part_of_a_large_model_is_measured_in_little_memory(tmp_path: Path) -> None:
    check("8 blocks of ViT-L", 112, [MEASURES["parameter_plasticity"]], tmp_path)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size"), [("8 blocks of ViT-L", 112), ("ViT-L", 224), ("ViT-H", 224)])
def test_a_large_model_is_measured_in_little_memory(name: str, image_size: int, tmp_path: Path) -> None:
    check(name, image_size, [*MEASURES.values(), {"criterion": "feature_norm"}], tmp_path)
