"""What the package index shows, made when the package is built: the addresses, and the README with absolute links.

The address of the repository is one setting, `tool.plasticity_peft.repository` in pyproject.toml.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PLACEHOLDER = "https://example.org/"
"""Where an address begins that stands for one which nobody has chosen yet."""
RELATIVE = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)(\))")
"""A link in Markdown to a file of the repository, in three parts."""


def urls(repository: str) -> dict[str, str]:
    """Returns the addresses of a project, by the names that the index knows."""
    return {
        "Homepage": repository,
        "Documentation": f"{repository}/blob/main/docs/index.md",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        "Paper": "https://arxiv.org/abs/2602.06883",
    }


def with_absolute_links(text: str, repository: str) -> str:
    """Returns Markdown in which links to files of the repository name its address; pictures their raw content."""

    def absolute(found: re.Match[str]) -> str:
        raw = found[2].partition("#")[0].endswith((".png", ".svg"))
        return f"{found[1]}{repository}/{'raw' if raw else 'blob'}/main/{found[2]}{found[3]}"

    return RELATIVE.sub(absolute, text)


class Hook(MetadataHookInterface):
    """Fills in the dynamic fields `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Changes `metadata` in place; hatchling calls this."""
        repository = self.config["repository"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["urls"] = urls(repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(text, repository)}
