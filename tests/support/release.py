"""Checks what is about to be published: python tests/support/release.py v0.2.0 build/dist

It ends with an error if the tag is not the version of the package, if the changelog has no dated entry for it, if a
file is missing, or if the address of the repository is still the placeholder.
"""

from __future__ import annotations

import email
import re
import sys
import zipfile
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "https://example.org/"


def metadata(wheel: Path) -> Message:
    """Returns the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def faults(tag: str, folder: Path) -> list[str]:
    """Returns the reasons against publishing the files of a folder."""
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if (len(wheels), len(sources)) != (1, 1):
        return [f"{folder} must contain one wheel and one source distribution. It contains {len(wheels)} and "
                f"{len(sources)}."]  # fmt: skip
    found = []
    about = metadata(wheels[0])
    version = about["Version"]
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, and the version of the package is {version}.")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M):
        found.append(f"CHANGELOG.md has no entry with a date for {version}.")
    if any(PLACEHOLDER in address for address in about.get_all("Project-URL", [PLACEHOLDER])):
        found.append(
            f"The address of the repository is a placeholder, {PLACEHOLDER}. Set repository under "
            "[tool.hatch.metadata.hooks.custom] in pyproject.toml."
        )
    return found


if __name__ == "__main__":
    sys.exit("\n".join(faults(sys.argv[1], Path(sys.argv[2]))) or None)
