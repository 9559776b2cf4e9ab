"""`plasticity-peft show`: what was measured, as a table or a picture."""

from __future__ import annotations

from plasticity_peft.commands import options
from plasticity_peft.commands.reports import check_picture, print_report, read_report, save_picture

EXAMPLES = """\b
Examples:
  plasticity-peft show beans.json
  plasticity-peft show path/to/adapter --plot scores.png
  plasticity-peft show user/repo --json
"""


def show(
    report: options.Report,
    plot: options.Picture = None,
    revision: options.Revision = None,
    as_json: options.AsJson = False,
) -> None:
    """Shows the scores of a report, or of an adapter, as a table, a picture or JSON."""
    check_picture(plot)
    found = read_report(report, revision)
    if plot is not None:
        save_picture(found, plot)
    print_report(found, as_json)
