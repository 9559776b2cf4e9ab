"""The versions that are supported, each run by one command: `nox`, or `make matrix`.

`nox --list` shows the environments, `nox -s "tests(newest-3.13)"` runs one. An interpreter that is not on the PATH is
fetched where uv can, and else skipped, with a word. Arguments after `--` go to pytest in the place of `-n 2 --dist
worksteal`.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "uv|virtualenv"  # uv shares what it downloads between the environments

TRANSFORMERS_4 = {"transformers": "4.57.6", "datasets": "5.0.1", "peft": "0.21.0"}
"""The last release of transformers 4, and of datasets for its huggingface_hub, beside the newest torch."""

VERSIONS: dict[str, tuple[str | None, dict[str, str]]] = {
    "lowest": ("constraints-lowest.txt", {"torch": "2.6.0"}),
    "transformers4": ("constraints.txt", TRANSFORMERS_4),
    "tested": ("constraints.txt", {}),
    "newest": (None, {}),  # whatever pyproject.toml allows today
    "extras": ("constraints.txt", {}),
    "timm": ("constraints.txt", {"torch": "2.14.1", "torchvision": "0.29.1", "timm": "1.0.31"}),
}
"""Name of a set of versions: its constraints file, and what is pinned otherwise than there."""

MATRIX = [
    ("3.10", "lowest"),
    ("3.10", "tested"),
    ("3.11", "lowest"),
    ("3.11", "transformers4"),
    ("3.11", "tested"),
    ("3.12", "tested"),
    ("3.13", "tested"),
    ("3.13", "newest"),
    ("3.14", "newest"),
    ("3.12", "extras"),
    ("3.12", "timm"),
]
"""What is run. The lowest numpy, pandas and scikit-learn have no wheels for Python 3.12."""

APART = {
    "extras": ("test,html,integrations", ["-m", "slow", "tests/extras"]),
    "timm": ("test,timm", ["tests/timm"]),
}
"""The extras and the tests of sets of versions that are for a part alone: large packages, and a torch of their own."""


@nox.session
@nox.parametrize("python,versions", MATRIX, ids=[f"{versions}-{python}" for python, versions in MATRIX])
def tests(session: nox.Session, versions: str) -> None:
    """Runs the tests on one of the sets of versions."""
    file, instead = VERSIONS[versions]
    options = [] if file is None else ["-c", str(constraints(session, file, instead))]
    extras, folders = APART.get(versions, ("test", []))
    session.install(*options, "-e", f".[{extras}]")
    pip = ["uv", "pip"] if session.venv_backend == "uv" else ["python", "-m", "pip"]
    session.run(*pip, "check")
    session.run("python", "-m", "pytest", *(session.posargs or ["-n", "2", "--dist", "worksteal"]), *folders)


def constraints(session: nox.Session, file: str, instead: dict[str, str]) -> Path:
    """Returns a constraints file that is `file` but for the versions in `instead`."""
    lines = [line for line in Path(file).read_text().splitlines() if line.split("==")[0] not in instead]
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join([*lines, *(f"{name}=={version}" for name, version in instead.items())]) + "\n")
    return path.resolve()
