"""The README: short, and the way into the pages of docs/."""

from __future__ import annotations

import re

from tests.repository.test_versions import PROJECT, PYTHONS
from tests.support.pages import PAGES, README, links

BADGE = re.compile(r"\[!\[(.*?)\]\(https://img\.shields\.io/badge/(.*?)\)\]\((.*?)\)")
"""The words of a badge, what its picture says, and where it leads."""


def test_its_badges_are_true() -> None:
    badges = {link: (words, picture) for words, picture, link in BADGE.findall(README.read_text())}
    first, last = PYTHONS[0], PYTHONS[-1]
    words, picture = badges["pyproject.toml"]
    assert (words, picture.split("-")[1]) == (f"Python {first} to {last}", f"{first}_to_{last}")
    words, picture = badges["LICENSE"]
    assert words == f"License: {PROJECT['license']}"
    assert picture.startswith(f"license-{PROJECT['license'].replace('-', '--')}-")
    assert "runs_in_Colab" in badges["examples/quickstart.ipynb"][1]  # tests/repository/test_notebook.py shows it
    (paper,) = set(badges) - {"pyproject.toml", "LICENSE", "examples/quickstart.ipynb"}
    assert badges[paper][1].startswith(f"arXiv-{paper.removeprefix('https://arxiv.org/abs/')}-")


def test_it_fits_on_three_screens() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_it_links_to_every_page() -> None:
    pages = {f"docs/{page.name}" for page in PAGES if page != README}
    assert pages - {"docs/index.md", "docs/changelog.md"} <= set(links(README))
    assert "CHANGELOG.md" in links(README)
