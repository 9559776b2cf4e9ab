"""The README and the pages of docs/: their blocks of code, their links, and the headings that links lead to."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support.models import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = (README, *sorted((REPOSITORY / "docs").glob("*.md")))

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    language: str
    text: str
    line: int
    """Line of the page on which the text begins."""
    reason: str | None
    """Why it is not run, from `<!-- not run: ... -->` on the line before it; None if it is run."""


def blocks(page: Path) -> list[Block]:
    """Returns the blocks of a page in order."""
    text = page.read_text()
    return [
        Block(one["language"], one["text"], text.count("\n", 0, one.start("text")) + 1, one["reason"])
        for one in BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[list[str]]:
    """Returns the commands of a block for the shell, split into words, without comments."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def without_blocks(page: Path) -> str:
    """Returns the prose and the tables of a page."""
    return BLOCK.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """Returns what stands between backticks in the prose and the tables of a page."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def links(page: Path) -> list[str]:
    """Returns the targets of the links and pictures of a page that lie within the repository."""
    found = LINK.findall(without_blocks(page))
    return [target for target in found if not target.startswith(("http://", "https://"))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
