"""What an audit found: a table for people, a line of JSON for machines."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from tests.guarantees.rules import Finding

# Which findings a number of the last line counts; "violations" counts all.
_TORN = ("whole profiles",)
_MISSED = ("C2",)
_MIXED = ("C4 one", "C4 no answer")
_PRICES = ("C1 one price", "C1 prices", "C1 no offers", "C5 concord audit: prices")


@dataclass
class Report:
    """Findings by rule, added up over runs.

    Attributes:
        answers: answers checked.
        notes: what a reader should know besides, such as plain Feast's share of torn reads.
        caught: mechanism → violations that were found when it was switched off.
    """

    answers: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    caught: dict[str, int] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        """Adds findings up by rule; those that looked at nothing are left out."""
        for finding in findings:
            if finding.checked or finding.violations:
                total = self.findings.setdefault(finding.rule, Finding(finding.rule))
                total.checked += finding.checked
                total.violations += finding.violations
                total.excerpts += finding.excerpts

    @property
    def violations(self) -> int:
        """All violations; a mechanism whose absence nobody noticed is one too."""
        return sum(finding.violations for finding in self.findings.values()) + sum(not count for count in self.caught.values())

    def counted(self, rules: tuple[str, ...]) -> int:
        """Violations of the rules that begin with one of these words."""
        return sum(finding.violations for rule, finding in self.findings.items() if rule.startswith(rules))

    def last_line(self) -> str:
        """Returns the line of JSON."""
        numbers = {
            "answers": self.answers,
            "violations": self.violations,
            "torn_reads": self.counted(_TORN),
            "token_misses": self.counted(_MISSED),
            "mixed_models": self.counted(_MIXED),
            "price_mismatches": self.counted(_PRICES),
        }
        return json.dumps(numbers)

    def show(self, out: Console) -> None:
        """Prints tables, notes, and what broke which rule."""
        table = Table("guarantee", "checked", "violations")
        for rule, finding in sorted(self.findings.items()):
            table.add_row(rule, f"{finding.checked:,}", str(finding.violations), style="red" if finding.violations else "")
        out.print(table)
        if self.caught:
            off = Table("mechanism switched off", "violations found then")
            for name, count in self.caught.items():
                off.add_row(name, str(count), style="" if count else "red")
            out.print(off)
        for note in self.notes:
            out.print(note, markup=False, highlight=False)
        for rule, finding in self.findings.items():
            for excerpt in finding.excerpts:
                out.print(f"{rule}: {excerpt}", style="red", markup=False, highlight=False)
