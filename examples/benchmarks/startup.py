"""CPU seconds until Python has imported the package, and until the command line has answered.

    python examples/benchmarks/startup.py        about two minutes

The commands are started in turns, each in its own process. The user and system time of the process is measured. PEFT
is imported in the same turns for comparison.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from harness import report, vit_config
from transformers import HfArgumentParser, ViTModel

from plasticity_peft import measure_plasticity

COMPLETION = {
    "_PLASTICITY_PEFT_COMPLETE": "complete_bash",
    "COMP_WORDS": "plasticity-peft measure model images --criterion param",
    "COMP_CWORD": "5",
}
COMMAND = "import sys; sys.argv[0] = 'plasticity-peft'; from plasticity_peft.cli.app import main; main()"
CASES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "import peft": ("import peft", [], {}),
    "import plasticity_peft": ("import plasticity_peft", [], {}),
    "import peft, plasticity_peft": ("import peft, plasticity_peft", [], {}),
    "from plasticity_peft import PlasticityConfig": ("from plasticity_peft import PlasticityConfig", [], {}),
    "plasticity-peft --version": (COMMAND, ["--version"], {}),
    "plasticity-peft --help": (COMMAND, ["--help"], {}),
    "plasticity-peft measure --help": (COMMAND, ["measure", "--help"], {}),
    "completion of a word": (COMMAND, [], COMPLETION),
    "plasticity-peft show FILE": (COMMAND, ["show", "{report}"], {}),
    "plasticity-peft compare FILE FILE": (COMMAND, ["compare", "{report}", "{report}"], {}),
}
"""Code, arguments and environment of each process."""
COLUMNS = {"case": "process", "minimum": "CPU s, minimum", "median": "median", "runs": "runs"}


@dataclass
class BenchmarkArguments:
    """The settings of the benchmark."""

    rounds: int = field(default=5, metadata={"help": "Number of times that each process is started."})
    output: str = field(default="outputs/benchmarks/startup.json", metadata={"help": "JSON file to write."})


def cpu_seconds(code: str, arguments: list[str], environment: dict[str, str]) -> float:
    """Returns the user and system time of a process that runs Python code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Starts every process several times, and prints and writes the table."""
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        measure_plasticity(ViTModel(vit_config("ViT-S", 224)), criterion="random").save(path)
        for _ in range(arguments.rounds):
            for case, (code, words, environment) in CASES.items():
                given = [word.format(report=path) for word in words]
                seconds[case].append(cpu_seconds(code, given, environment))
    rows = [
        {"case": case, "minimum": min(found), "median": statistics.median(found), "runs": len(found)}
        for case, found in seconds.items()
    ]
    report("Start-up", COLUMNS, rows, arguments)


if __name__ == "__main__":
    main()
