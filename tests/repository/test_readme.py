"""The README: short, and the way into the pages of docs/."""

from __future__ import annotations

from tests.support.pages import PAGES, README, links


def test_it_fits_on_three_screens() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_it_links_to_every_page() -> None:
    pages = {f"docs/{page.name}" for page in PAGES if page != README}
    assert pages - {"docs/index.md", "docs/changelog.md"} <= set(links(README))
    assert "CHANGELOG.md" in links(README)
