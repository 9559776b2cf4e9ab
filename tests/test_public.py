"""What users import, and what it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields

import plasticity_peft
from plasticity_peft import PlasticityConfig
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "plasticity_peft"
ORDER = """
    errors extras components moments checks precision files hub formatting selection description settling scores
    provenance measurement summary plotting believable report checkpoints results trained snippets adapter_options
    card_part card
    quantised recomputing base_modules layouts stacks structure offloading isolation architectures images calls pairs
    processes probe gradients
    criteria.criterion criteria.distances criteria.embedding criteria.activation criteria.rate_of_change
    criteria.relative_rate_of_change criteria.token_sensitivity
    criteria.parameter_plasticity criteria.bound criteria.gradient_norm criteria.relative_gradient_norm
    criteria.condition_number criteria.feature_norm criteria.inverse criteria.chance criteria config rounds
    measure peft_model tuner renames adapter_weights adapter_report loading pretrained callback
    image_datasets
    commands commands.options commands.reports commands.models commands.measure commands.show commands.select
    commands.compare commands.card cli __main__
""".split()  # noqa: SIM905


def test_the_public_names() -> None:
    assert plasticity_peft.__all__ == sorted(plasticity_peft.__all__)
    assert plasticity_peft.__all__ == [
        "BlockLayout",
        "PlasticityCallback",
        "PlasticityConfig",
        "PlasticityError",
        "PlasticityReport",
        "find_components",
        "load_adapter",
        "load_pretrained",
        "measure_plasticity",
        "register_architecture",
    ]
    for name in plasticity_peft.__all__:
        assert inspect.getdoc(getattr(plasticity_peft, name))


def test_every_option_of_the_config_is_described_once() -> None:
    own = [field for field in fields(PlasticityConfig) if field.metadata.get("help")]
    assert {"target_data", "report", "top_k", "training", "r", "lora_alpha"} <= {field.name for field in own}
    assert len(own) == len(fields(PlasticityConfig))


def imports(path: str) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_imports_flow_one_way() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert set(ORDER) == {name.removesuffix(".__init__") for name in files - {"__init__"}}
    for index, name in enumerate(ORDER):
        path = name.replace(".", "/")
        for module in imports(f"{path}/__init__.py" if (PACKAGE / path).is_dir() else f"{path}.py"):
            if module.startswith("plasticity_peft."):
                needed = module.removeprefix("plasticity_peft.")
                assert needed in ORDER[:index], f"{name} imports {needed}"


def test_one_file_touches_private_parts_of_peft() -> None:
    private = ("peft.mapping", "peft.utils", "peft.tuners", "peft.auto")
    files = {path.name for path in PACKAGE.rglob("*.py") if any(m.startswith(private) for m in imports(str(path)))}
    assert files == {"tuner.py"}


def test_importing_brings_in_nothing_heavy_beside_peft() -> None:
    script = (
        "import sys, peft\n"
        "before = set(sys.modules)\n"
        "import plasticity_peft\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert new - {'transformers'} == {'plasticity_peft'}, new\n"  # more files of transformers, nobody else's
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
