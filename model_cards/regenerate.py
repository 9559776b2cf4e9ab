"""Train the adapters of the cards in this folder again, and keep their cards and pictures without the weights.

    python model_cards/regenerate.py            # all
    python model_cards/regenerate.py digits-lora

Each is a run of examples/train.py, without a network. The same machine gives the same numbers.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAIN = HERE.parent / "examples" / "train.py"

RUNS = {
    "digits-lora": [],
    "digits-full": ["--training", "full"],
    "digits-rate-of-change": ["--criterion", "rate_of_change", "--candidates", "MHA", "FC1", "FC2", "--top_k", "2"],
    "digits-blocks": ["--granularity", "component", "--top_k", "6"],
}
"""Arguments of examples/train.py that are not the defaults, by name of the card."""


def regenerate(name: str) -> None:
    """Trains an adapter and copies its card and picture to the folder `name`."""
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder, name)
        options = ["--compare", "false", "--disable_tqdm", "true", "--output_dir", str(trained)]
        subprocess.run([sys.executable, str(TRAIN), *RUNS[name], *options], check=True)
        card = HERE / name
        card.mkdir(exist_ok=True)
        for file in ("README.md", "plasticity.png"):
            shutil.copyfile(trained / file, card / file)


def main() -> None:
    """Parses the names of the cards, and makes the cards again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"cards to make (default: {', '.join(RUNS)})")
    names = parser.parse_args().names or list(RUNS)
    if find_spec("vl_convert"):
        parser.error("the cards here have no page, which is 1 MB: uninstall vl-convert-python for this")
    for unknown in set(names) - set(RUNS):
        parser.error(f"unknown card {unknown!r}; the cards are {', '.join(RUNS)}")
    for name in names:
        regenerate(name)


if __name__ == "__main__":
    main()
