"""The doctor's findings as a table on a terminal, as lines elsewhere, or as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from .finding import BROKEN, NOTE, Finding


def print_report(findings: Sequence[Finding], *, as_json: bool = False) -> int:
    """Prints the findings; returns the exit code: 1 where something is broken."""
    broken = sum(finding.state == BROKEN for finding in findings)
    if as_json:
        print(json.dumps({"broken": broken, "findings": [asdict(finding) for finding in findings]}))
    elif sys.stdout.isatty():
        _print_table(findings)
    else:
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.state:<6}  {finding.area}  {finding.name}: {finding.detail}{remedy}")
    if not as_json:
        notes = sum(finding.state == NOTE for finding in findings)
        print(f"{len(findings)} findings, {broken} broken, {notes} notes")
    return 1 if broken else 0


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "area", "what", "found", "remedy")
    colours = {BROKEN: "red", NOTE: "yellow"}
    for finding in findings:
        colour = colours.get(finding.state, "green")
        words = (finding.area, finding.name, finding.detail, finding.remedy)
        table.add_row(f"[{colour}]{finding.state}[/]", *(escape(word) for word in words))
    Console().print(table)
