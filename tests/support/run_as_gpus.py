"""Runs a script as if each process had a GPU: see `as_gpus`.

python -m torch.distributed.run --nproc_per_node 2 tests/support/run_as_gpus.py examples/train.py ...
"""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    from tests.support.as_gpus import take_cpus_for_gpus

    take_cpus_for_gpus()
    warnings.simplefilter("ignore")  # DeepSpeed and Accelerate use what torch has renamed
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
