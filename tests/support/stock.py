"""A process in which this package cannot be imported: what users of stock PEFT have."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.forking import STOCK, run_code

WITHOUT_US = """
import sys
sys.modules["plasticity_peft"] = None
try:
    import plasticity_peft
except ImportError:
    pass
else:
    raise SystemExit("plasticity_peft could be imported")
"""
"""Code that makes this package impossible to import, and fails if it can be imported all the same."""

SCRIPT = (
    WITHOUT_US
    + """
import pathlib, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

folder = pathlib.Path(sys.argv[1])
images = load_file(folder / "images.safetensors")["images"]
logits = {}
for case in sys.argv[2:]:
    name, num_labels = case.split(":")
    options = {"num_labels": int(num_labels)} if num_labels else {}
    base = AutoModelForImageClassification.from_pretrained(folder / name / "base", **options)
    models = {
        "peft": PeftModel.from_pretrained(base, folder / name / "adapter"),
        "auto": AutoModelForImageClassification.from_pretrained(folder / name / "adapter", **options),
    }
    for how, model in models.items():
        with torch.no_grad():
            logits[f"{name}/{how}"] = model.eval()(pixel_values=images).logits
save_file(logits, folder / "logits.safetensors")
"""
)


def run_stock(folder: Path, cases: dict[str, int | None], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the logits of adapters that stock code loads in a process of its own: "<case>/peft" and "<case>/auto".

    `folder` has a subfolder for each case, with "base" and "adapter" in it; the value of a case is the `num_labels`
    that the loader needs, if any. Warnings are errors there, and no message may speak of unexpected or ignored keys.
    """
    save_file({"images": images}, folder / "images.safetensors")
    names = [f"{name}:{num_labels or ''}" for name, num_labels in cases.items()]
    result = run_code(SCRIPT, folder, *names, folder=folder, parent=STOCK)
    assert result.returncode == 0, result.stderr
    for word in ("unexpected", "ignor", "not used"):
        assert word not in result.stderr.lower(), result.stderr
    return load_file(folder / "logits.safetensors")
