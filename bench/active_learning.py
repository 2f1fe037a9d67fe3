"""Which labels teach most: learning curves of every strategy of `concord label-next` beside random choice.

    python bench/active_learning.py --plot active.png            # the sample shop, 10 seeds
    python bench/active_learning.py --intents FILE.parquet       # a table with the columns utterance and intent

(customer, item) pairs of the sample shop as the click classifier reads them: a visit's purchase against four items drawn as
often as items are bought. Pool and test set hold different customers. So that dozens of curves take minutes, the learner is a
logistic regression on vectors of the frozen BERT instead of a fine-tuned classifier; the strategies are the command's own.
Each strategy starts from the same random labels and buys batches of equal size; a seed changes pool, start and choice.
Prints a table and a last line of JSON: the mean area under the learning curve, and how many labels random needs for the same.
"""

import argparse
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from features.behaviour import Activity, Behaviour, behaviour_text
from features.sample_shop import Event, generate
from training.active import Strategy, choose
from training.encode import pretrained_vectors
from training.events import to_micros
from training.metrics import area_under_curve
from training.progress import bar

Floats = npt.NDArray[np.float32]
_NEGATIVES = 4
_VISITS = 2  # a customer at the most
_END = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Examples:
    """Features float32[n, f] of n examples, their class int64[n], and the group (a customer) each belongs to."""

    features: Floats
    classes: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]

    def __getitem__(self, rows: npt.NDArray[np.integer]) -> "Examples":
        return Examples(self.features[rows], self.classes[rows], self.groups[rows])


def pairs_of_the_sample_shop(users: int) -> Examples:
    """Returns pairs of behaviours and candidates: product and distance of their vectors, by component."""
    shop = generate(7, end=_END, users=users)
    titles = {item.item_id: item.title for item in shop.items}
    rng = np.random.default_rng(0)
    events: dict[str, list[Event]] = {}
    for event in shop.events:
        events.setdefault(event.user_id, []).append(event)
    bought = [event.item_id for event in shop.events if event.action == "purchase" and event.item_id]
    texts, candidates, clicked, groups = [], [], [], []
    for group, mine in enumerate(events.values()):
        for at in _visits(mine, rng):
            past = tuple(Behaviour(e.item_id or "", e.action, e.channel, to_micros(e.occurred_at), e.text or "") for e in mine[:at][::-1])
            text = behaviour_text(Activity(len(past), past), titles.get)
            known = {event.item_id for event in mine}
            others = [item for item in rng.choice(bought, _NEGATIVES).tolist() if item not in known]
            for item, label in [(_first_purchase(mine, at), 1), *((item, 0) for item in others)]:
                texts.append(text)
                candidates.append(titles[item])
                clicked.append(label)
                groups.append(group)
    left, right = vectors(texts), vectors(candidates)
    return Examples(np.concatenate([left * right, np.abs(left - right)], 1), np.array(clicked), np.array(groups))


def _visits(events: list[Event], rng: np.random.Generator) -> list[int]:
    """Returns places of the first events of some visits that hold a purchase and have a past of five events."""
    starts = [k for k in range(1, len(events)) if events[k].session_id != events[k - 1].session_id]
    useful = [k for k in starts if k >= 5 and _first_purchase(events, k)]
    return sorted(rng.choice(useful, min(_VISITS, len(useful)), replace=False).tolist()) if useful else []


def _first_purchase(events: list[Event], start: int) -> str:
    """Returns the first new item bought on the visit that begins at ``start``, empty when there is none."""
    before = {event.item_id for event in events[:start] if event.action == "purchase"}
    visit = [event for event in events[start:] if event.session_id == events[start].session_id]
    return next((e.item_id for e in visit if e.action == "purchase" and e.item_id and e.item_id not in before), "")


def intents(path: Path, rows: int) -> Examples:
    """Returns messages and their intents from a Parquet file with the columns ``utterance`` and ``intent``."""
    frame = pd.read_parquet(path).sample(rows, random_state=0)
    codes, _ = pd.factorize(frame["intent"])
    return Examples(vectors(frame["utterance"].tolist()), np.asarray(codes, np.int64), np.arange(len(frame)))


def vectors(texts: list[str]) -> Floats:
    """Returns unit vectors of texts by the frozen, pretrained encoder; equal texts are read once."""
    distinct = list(dict.fromkeys(texts))
    place = {text: k for k, text in enumerate(distinct)}
    return pretrained_vectors(distinct)[[place[text] for text in texts]]


class Learner:
    """Multinomial logistic regression with an L2 penalty, on standardised features."""

    def __init__(self, pool: Floats, classes: int, *, penalty: float = 1.0) -> None:
        self._mean, self._scale = pool.mean(0), pool.std(0) + 1e-6
        self._classes, self._penalty = classes, penalty
        self._weights = np.zeros((pool.shape[1] + 1, classes))

    def fit(self, features: Floats, labels: npt.NDArray[np.int64]) -> "Learner":
        """Fits from zero; the standardisation is the unlabelled pool's, so it knows no label."""
        x, wanted = self.read(features), np.eye(self._classes)[labels]

        def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            weights = flat.reshape(self._weights.shape)
            logits = x @ weights
            kept = weights * np.r_[np.ones(len(weights) - 1), 0.0][:, None]  # the intercept is free
            gradient = x.T @ (softmax(logits, axis=1) - wanted) + self._penalty * kept
            value = -(log_softmax(logits, axis=1) * wanted).sum() + 0.5 * self._penalty * (kept**2).sum()
            return float(value), gradient.ravel()

        found = minimize(loss, np.zeros(self._weights.size), jac=True, method="L-BFGS-B", options={"maxiter": 200})
        self._weights = found.x.reshape(self._weights.shape)
        return self

    def read(self, features: Floats) -> npt.NDArray[np.float64]:
        """Returns standardised features scaled to a squared length near 1, and a constant."""
        x = (features - self._mean) / self._scale / np.sqrt(features.shape[1])
        return np.concatenate([x, np.ones((len(x), 1))], 1)

    def probabilities(self, features: Floats) -> Floats:
        """Returns float32[n, c]."""
        return np.asarray(softmax(self.read(features) @ self._weights, axis=1), np.float32)


def curve(strategy: Strategy, pool: Examples, test: Examples, *, classes: int, sizes: list[int], seed: int) -> list[float]:
    """Returns the score on the test set after each number of labels."""
    rng = np.random.default_rng(seed)
    labelled = rng.choice(len(pool.classes), sizes[0], replace=False)
    learner = Learner(pool.features, classes)
    embeddings = np.asarray(learner.read(pool.features), np.float32)
    scores = []
    for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
        learner.fit(pool.features[labelled], pool.classes[labelled])
        scores.append(score(learner.probabilities(test.features), test.classes))
        if following:
            left = np.setdiff1d(np.arange(len(pool.classes)), labelled)
            probabilities = learner.probabilities(pool.features[left])
            bought = choose(strategy, probabilities, embeddings[left], count=following - size, labelled=embeddings[labelled], rng=rng)
            labelled = np.concatenate([labelled, left[bought]])
    return scores


def score(probabilities: Floats, classes: npt.NDArray[np.int64]) -> float:
    """Returns the AUC with two classes, the accuracy with more."""
    if probabilities.shape[1] == 2:
        return area_under_curve(probabilities[:, 1], classes == 1)
    return float((probabilities.argmax(1) == classes).mean())


def split(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Divides examples by group into pool and test set, half and half."""
    groups = np.random.default_rng(seed).permutation(np.unique(examples.groups))
    inside = np.isin(examples.groups, groups[: len(groups) // 2])
    return examples[np.flatnonzero(inside)], examples[np.flatnonzero(~inside)]


def labels_saved(random: Floats, other: Floats, sizes: list[int]) -> float:
    """Returns the share of labels that a strategy saves: where its curve reaches what random has at its end."""
    reached = np.flatnonzero(other >= random[-1])
    if not len(reached):
        return 0.0
    k = int(reached[0])
    if k == 0:
        return 1.0 - sizes[0] / sizes[-1]
    share = (random[-1] - other[k - 1]) / (other[k] - other[k - 1])
    return float(1.0 - (sizes[k - 1] + share * (sizes[k] - sizes[k - 1])) / sizes[-1])


def draw(curves: dict[Strategy, Floats], sizes: list[int], what: str, path: Path) -> None:
    """Plots the mean curves with their standard errors."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for strategy, values in curves.items():
        mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
        (line,) = axes.plot(sizes, mean, label=strategy.value, lw=2.5 if strategy is Strategy.RANDOM else 1.5)
        axes.fill_between(sizes, mean - error, mean + error, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="labels", ylabel=what, title=f"mean and standard error of {len(values)} seeds")
    axes.legend()
    figure.savefig(path, dpi=110)


def report(curves: dict[Strategy, Floats], sizes: list[int], what: str) -> dict[str, object]:
    """Prints the table and returns the line of JSON: the area under each curve is its mean height over the labels."""
    area = {s: np.trapezoid(values, sizes, axis=1) / (sizes[-1] - sizes[0]) for s, values in curves.items()}
    table = Table("strategy", f"area under the curve of {what}", "± s.e.", "seeds above random", "labels saved", f"at {sizes[-1]} labels")
    figures: dict[str, object] = {}
    random = curves[Strategy.RANDOM]
    for strategy in sorted(curves, key=lambda s: -area[s].mean()):
        error = area[strategy].std(ddof=1) / np.sqrt(len(random))
        wins = int((area[strategy] > area[Strategy.RANDOM]).sum())
        saved = labels_saved(random.mean(0), curves[strategy].mean(0), sizes)
        final = curves[strategy][:, -1].mean()
        table.add_row(
            strategy.value, f"{area[strategy].mean():.4f}", f"{error:.4f}", f"{wins}/{len(random)}", f"{saved:.0%}", f"{final:.4f}"
        )
        figures[strategy.value] = {
            "area": round(float(area[strategy].mean()), 4),
            "wins": wins,
            "labels_saved": round(saved, 3),
            "final": round(float(final), 4),
        }
    Console().print(table)
    return {"measure": what, "labels": sizes, "seeds": len(random), **figures}


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000, help="customers of the sample shop")
    parser.add_argument("--intents", type=Path, help="messages with intents (Parquet: utterance, intent) instead of the sample shop")
    parser.add_argument("--rows", type=int, default=4000, help="messages taken of that file")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--start", type=int, default=20, help="labels to begin with")
    parser.add_argument("--batch", type=int, default=20, help="labels bought at a time")
    parser.add_argument("--batches", type=int, default=14)
    parser.add_argument("--plot", type=Path, help="write the learning curves there (PNG)")
    options = parser.parse_args()
    examples = intents(options.intents, options.rows) if options.intents else pairs_of_the_sample_shop(options.users)
    classes = int(examples.classes.max()) + 1
    sizes = [options.start + k * options.batch for k in range(options.batches + 1)]
    curves: dict[Strategy, list[list[float]]] = {strategy: [] for strategy in Strategy}
    for seed in bar(range(options.seeds), "seeds"):
        pool, test = split(examples, seed)
        for strategy, found in curves.items():
            found.append(curve(strategy, pool, test, classes=classes, sizes=sizes, seed=seed))
    measured = {strategy: np.array(found, np.float32) for strategy, found in curves.items()}
    what = "AUC" if classes == 2 else "accuracy"
    if options.plot:
        draw(measured, sizes, what, options.plot)
    print(json.dumps(report(measured, sizes, what)))


if __name__ == "__main__":
    main()
