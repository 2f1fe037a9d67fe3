"""`concord train --since-last`: trains a challenger from the active model, compares, publishes, and activates it if it wins."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.activation import move_pointer
from features.settings import Settings

if TYPE_CHECKING:
    from training.update import Plan, Report

_out = Console()


def since_last(settings: Settings, policy: Mapping[str, Any], *, values: Mapping[str, str], dry_run: bool) -> None:
    """Updates the active model, or says why there is nothing to do.

    Args:
        settings: the shop.
        policy: fields of ``training.update.UpdatePolicy``.
        values: fields of the active model's training configuration to change.
        dry_run: only say what would be done.
    """
    from training.dataset import TrainingDataError
    from training.update import Idle, UpdatePolicy, prepare, update

    try:
        plan = prepare(settings, UpdatePolicy(**policy), values=values)
    except (TrainingDataError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if isinstance(plan, Idle):
        _out.print(f"Nothing done: {plan.reason}.", highlight=False)
        return
    _out.print(plan_table(plan))
    if dry_run:
        _out.print("Dry run: nothing was trained, published or activated.")
        return
    report = update(settings, plan)
    if report is None:  # a process of torchrun that is not the first
        return
    _show(report)
    if report.verdict.wins:
        move_pointer(settings, report.challenger)


def plan_table(plan: "Plan") -> Table:
    """Returns what an update will do as a table."""
    from training.update import moment

    split, counts = plan.warm.split, plan.counts
    periods = {name: f"{moment(value):%Y-%m-%d %H:%M} UTC" for name, value in vars(split).items()}
    table = Table(title=f"update of {plan.champion}", show_header=False)
    table.add_row("new events", str(counts.new_events))
    table.add_row("tower trains on", f"{counts.new_visits} new visits before {periods['ranker_start']}, {counts.replayed_visits} replayed")
    table.add_row("ranker trains on", f"{counts.ranker_visits} visits from then to {periods['cut']}")
    table.add_row("compared on", f"{counts.customers} customers, first purchase visit from {periods['cut']} to {periods['end']}")
    table.add_row("activated if", needed(plan.policy))
    return table


def needed(policy: Any) -> str:
    """Returns in words what a challenger has to achieve."""
    what = f"the lower end of the {policy.confidence:.0%} interval" if policy.certain else "the mean difference"
    return f"{what} of NDCG@10 is above {policy.margin:g}"


def _show(report: "Report") -> None:
    from training.update import TRAINED, told

    table = Table("on the holdout", "champion", "refreshed", "trained on")
    for name, value in report.champion_metrics.items():
        table.add_row(name, f"{value:.4f}", f"{report.refreshed_metrics[name]:.4f}", f"{report.trained_metrics[name]:.4f}")
    _out.print(table)
    verdict, policy = report.verdict, report.policy
    _out.print(f"training on against fitting the item-to-item weights anew: {told(verdict.training_gain, policy)}", highlight=False)
    what = "what was trained on" if verdict.kept == TRAINED else "the champion with weights fitted anew"
    _out.print(f"{what} against the champion: {told(verdict.gain, policy)}, {report.counts.customers} customers", highlight=False)
    end = "wins" if verdict.wins else f"stays published and inactive, because it takes that {needed(policy)}"
    _out.print(f"published {report.challenger}: it {end}; report in {report.run_dir}", highlight=False)
