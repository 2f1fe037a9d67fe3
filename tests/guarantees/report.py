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


@dataclass(frozen=True)
class Trials:
    """What the checker found under one fault with a mechanism in place, and what without it."""

    control: Finding
    without: Finding

    @property
    def violations(self) -> int:
        """What was found with the mechanism; and one if its absence was not noticed."""
        return self.control.violations + (not self.without.violations)


@dataclass
class Report:
    """Findings by rule, added up over runs.

    Attributes:
        answers: answers checked.
        notes: what a reader should know besides, such as plain Feast's share of torn reads.
        trials: by mechanism.
    """

    answers: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trials: dict[str, Trials] = field(default_factory=dict)

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
        return sum(part.violations for part in (*self.findings.values(), *self.trials.values()))

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
        if self.trials:
            off = Table("mechanism", "violations with it", "violations without it")
            for name, trials in self.trials.items():
                off.add_row(name, str(trials.control.violations), str(trials.without.violations), style="red" if trials.violations else "")
            out.print(off)
        for note in self.notes:
            out.print(note, markup=False, highlight=False)
        controls = {f"control of {name}": trials.control for name, trials in self.trials.items()}
        for rule, finding in (self.findings | controls).items():
            for excerpt in finding.excerpts:
                out.print(f"{rule}: {excerpt}", style="red", markup=False, highlight=False)
