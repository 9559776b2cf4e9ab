"""Hooks of mkdocs: adds the files of the repository to which pages link.

It also refuses a page for which a browser would load something from another host.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
"""A link to a file that is not in docs/, written as GitHub resolves it."""

LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon)[^>]*"
    r"\shref=[\"']?(?:https?:)?//[^>]*>"
)
"""An element that a browser loads from another host when it shows the page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to, under `repository/`."""
    root = Path(str(config.config_file_path)).parent
    for page in list(files.documentation_pages()):
        for path in OUTSIDE.findall(page.content_string):
            place = root / path
            if not place.is_file():
                raise PluginError(f"{page.src_uri}: the file ../{path} does not exist.")
            uri = f"repository/{path}"
            if files.get_file_from_path(uri) is None:
                files.append(added(config, uri, place))
    return files


def added(config: MkDocsConfig, uri: str, place: Path) -> File:
    """Returns the file of the repository at `place` as a file of the site."""
    if place.suffix != ".md":
        return File.generated(config, uri, abs_src_path=str(place))
    text = place.read_text(encoding="utf-8")
    # Without front matter, mkdocs takes a first line such as "full: points" for it.
    return File.generated(
        config, uri, content=text if text.startswith("---") else f"\n{text}"
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns the page with links to the added files."""
    return OUTSIDE.sub(r"](repository/\1", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Returns the page unchanged. Raises PluginError if it needs another host."""
    found = LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads {found[0]} from another host.")
    return output
