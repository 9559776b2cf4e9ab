"""What the command line imports: nothing heavy for what people wait for. The times are in examples/benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.models import REPOSITORY
from tests.support.processes import environment, python

REPORT = str(next(iter(sorted(REPOSITORY.glob("tests/support/releases/*/*/lora/plasticity.json")))))
SCRIPT = """
import json, sys
from plasticity_peft.cli.app import main
sys.argv[0] = "plasticity-peft"
try:
    main()
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted({name.split(".")[0] for name in sys.modules})]), file=sys.stderr)
"""
HEAVY = {"torch", "transformers", "peft", "accelerate", "huggingface_hub", "scipy", "datasets", "matplotlib"}


def run(*arguments: str, **variables: str) -> tuple[str, set[str]]:
    """Returns what a command prints in a process of its own, and the packages that are imported at its end."""
    result = python("-c", SCRIPT, *arguments, env=environment(**variables))
    assert result.returncode == 0, result.stderr
    code, modules = json.loads(result.stderr.splitlines()[-1])
    assert code == 0, result.stderr
    return result.stdout, set(modules)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--version"], "."),
        (["--help"], "measure"),
        (["measure", "--help"], "--criterion"),
        (["show", REPORT], "| rank |"),
        (["show", REPORT, "--json"], '"scores"'),
        (["compare", REPORT, REPORT], "Spearman"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_a_quick_command_imports_nothing_heavy(arguments: list[str], text: str) -> None:
    printed, modules = run(*arguments)
    assert text in printed
    assert modules & HEAVY == set()


@pytest.mark.parametrize(
    ("words", "completed"), [("s", "show"), ("measure model images --criterion parameter_p", "parameter_plasticity")]
)
def test_completing_a_word_imports_nothing_heavy(words: str, completed: str) -> None:
    words = f"plasticity-peft {words}"
    number = str(len(words.split()) - 1)
    printed, modules = run(_PLASTICITY_PEFT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    assert completed in printed.split()
    assert modules & {*HEAVY, "numpy"} == set()


def test_a_heavy_import_would_be_seen(tmp_path: Path) -> None:
    _, modules = run("show", REPORT, "--plot", str(tmp_path / "a.png"))
    assert modules & HEAVY == {"matplotlib"}
