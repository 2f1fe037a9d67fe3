"""Trains on a public set by its published protocol and writes the rankings for the judge, where the set is one of rankings.

python -m training.quality beauty --seed 0 --out rankings.jsonl
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from training.card import render_html, render_markdown
from training.quality import faq, intents, next_item, online_retail, search, sentiment
from training.quality.result import QualityResult

_PARTS = f"{', '.join(next_item.PARTS)}; of the intents {', '.join(intents.PARTS)}"
_SETS = (
    "beauty, cold (beauty with items held out), online_retail, search, faq, sentiment, intents, "
    "or intents_5 and intents_20 (of so many examples each)."
)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Set(StrEnum):
    """The sets."""

    BEAUTY = "beauty"
    COLD = "cold"
    ONLINE_RETAIL = "online_retail"
    FAQ = "faq"
    SEARCH = "search"
    SENTIMENT = "sentiment"
    INTENTS = "intents"
    INTENTS_5 = "intents_5"
    INTENTS_20 = "intents_20"


_EXAMPLES = {Set.INTENTS: None, Set.INTENTS_5: 5, Set.INTENTS_20: 20}


@app.command()
def main(
    name: Annotated[Set, typer.Argument(metavar="SET", help=_SETS)],
    *,
    data: Annotated[Path, typer.Option(help="Folder of the public sets.", envvar="CONCORD_TEST_DATA")] = Path("../shared/data"),
    out: Annotated[Path, typer.Option(help="Rankings: one JSON line {user, items} for each customer.")] = Path("rankings.jsonl"),
    seed: Annotated[int, typer.Option(help="Of every random choice of the run.")] = 0,
    cut: Annotated[str, typer.Option(help="Online Retail only: rank for what follows this day; tune on an earlier one.")] = "2011-11-01",
    without: Annotated[str, typer.Option(help=f"Parts left out, for the ablation: {_PARTS}.")] = "",
    card: Annotated[
        Path | None, typer.Option(help="Beauty and cold: also write the model card there, as HTML, and as Markdown beside it.")
    ] = None,
    towers: Annotated[
        Path | None, typer.Option(help="Beauty and cold: keep trained towers there; read back those of the same settings and data.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 means PyTorch's choice, one per core.")] = 0,
) -> None:
    """Train on a public set by its published protocol and write the rankings for the judge.

    Prints the validation metrics and the run's details, and as the last line the metrics as JSON. The last items (beauty) and the
    baskets after the cut (online_retail) are never looked at; the judge scores the rankings. Example:

        python -m training.quality online_retail --cut 2011-10-01 --without recency
    """
    parts = frozenset(part.strip() for part in without.split(",") if part.strip())
    if unknown := parts - set(intents.PARTS if name in _EXAMPLES else next_item.PARTS):
        raise typer.BadParameter(f"unknown part {', '.join(sorted(unknown))}", param_hint="--without")
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    result = _run(name, data, seed=seed, cut=cut, without=parts, towers=towers)
    if result.rankings:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w") as lines:
            lines.writelines(json.dumps({"user": user, "items": items}) + "\n" for user, items in result.rankings.items())
    if card is not None and result.card is not None:
        card.parent.mkdir(parents=True, exist_ok=True)
        card.with_suffix(".html").write_text(render_html(result.card))
        card.with_suffix(".md").write_text(render_markdown(result.card))
    typer.echo(json.dumps(result.details, indent=2))
    test = result.details.get("test")
    figures = {f"validation_{key}": value for key, value in result.validation.items()} | (test if isinstance(test, dict) else {})
    typer.echo(json.dumps({"set": name, "seed": seed, "seconds": round(result.seconds, 1)} | _rounded(figures)))


def _run(name: Set, data: Path, *, seed: int, cut: str, without: frozenset[str], towers: Path | None) -> QualityResult:
    try:
        if name is Set.FAQ:
            return faq.run(data, seed=seed)
        if name in _EXAMPLES:
            return intents.run(data, seed=seed, examples=_EXAMPLES[name], without=without)
        if name is Set.SENTIMENT:
            return sentiment.run(data, seed=seed)
        if name is Set.ONLINE_RETAIL:
            return online_retail.run(data, seed=seed, cut=cut, without=without)
        if name is Set.SEARCH:
            return search.run(data, seed=seed)
        return next_item.run(data, seed=seed, without=without, cold=name is Set.COLD, kept=towers)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from None


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in figures.items()}


if __name__ == "__main__":
    app()
