"""The rating regression: BERT reads a customer's behaviours and an item's title together and says how they would rate it.

Ratings are the values of ``rate`` and ``review`` events. The loss is the mean squared error; the model starts as the mean
predictor, which it is also measured against, on ratings after the cut that nothing was chosen by.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from training.config import TrainConfig
from training.dataset import Shop, Split, TrainingDataError, join_customers
from training.events import Micros
from training.pairs import Head, PairModel, Pairs, PairSets
from training.text import activity_texts

# A rating and its review are two events with one value: the first of a customer on an item counts.
_RATINGS = """
SELECT DISTINCT ON (user_id, item_id) user_id, item_id, (extract(epoch FROM occurred_at) * 1000000)::bigint, value
FROM events WHERE action IN ('rate', 'review') AND value IS NOT NULL AND item_id IS NOT NULL
ORDER BY user_id, item_id, occurred_at, event_id
"""


@dataclass(frozen=True)
class Rating:
    """What one customer gave one item: its row in the item table, the time in microseconds of Unix time, the value."""

    user_id: str
    item: int
    time: Micros
    value: float


class Ratings(Head):
    """How a customer rates an item, on the shop's own scale."""

    name = "rating"
    outputs = 1
    output = "rating"
    metric = "rmse"
    more_is_better = False

    def pairs(self, shop: Shop, split: Split, tokenizer: Tokenizer, config: TrainConfig) -> PairSets:
        """Returns the ratings of the tower's period to train on, of the ranker's to validate on, and after the cut to test on."""
        ratings = read_ratings(shop)
        training = [rating for rating in ratings if rating.time < split.ranker_start][-config.tower_labels :]
        validation = [rating for rating in ratings if split.ranker_start <= rating.time < split.cut]
        test = [rating for rating in ratings if rating.time >= split.cut]
        made = [rated_pairs(shop, part, tokenizer, config) for part in (training, validation, test)]
        if not all(map(len, made)):
            counts = ", ".join(str(len(part)) for part in made)
            raise TrainingDataError(f"{counts} ratings of customers with a past to train, validate and test on: too few")
        return PairSets(*made)

    def prepare(self, model: PairModel, answers: Tensor) -> None:
        """Makes the model the mean predictor, and one unit of its logit the ratings' standard deviation."""
        model.mean.fill_(float(answers.mean()))
        model.scale.fill_(max(float(answers.std(correction=0)), 1e-3))
        nn.init.zeros_(model.bert.classifier.weight)
        nn.init.zeros_(model.bert.classifier.bias)

    def loss(self, outputs: Tensor, answers: Tensor, config: TrainConfig) -> Tensor:
        """Returns the mean squared error."""
        return mse_loss(outputs.squeeze(-1), answers)

    def measure(self, outputs: Tensor, answers: Tensor) -> dict[str, float]:
        """Returns the root mean squared error ``rmse`` and the mean absolute error ``mae``."""
        error = outputs.squeeze(-1) - answers
        return {"rmse": float(error.square().mean().sqrt()), "mae": float(error.abs().mean())}

    def baseline(self, train: Tensor, answers: Tensor) -> dict[str, float]:
        """Returns the error of the mean training rating, ``mean_rmse``."""
        return {"mean_rmse": float((answers - train.mean()).square().mean().sqrt())}


def read_ratings(shop: Shop) -> list[Rating]:
    """Returns each customer's first rating of each item of the table, in order of time."""
    with psycopg.connect(shop.dsn) as connection, connection.cursor(name="training_ratings") as cursor:
        rows = [row for row in cursor.execute(_RATINGS) if row[1] in shop.table.rows]
    ratings = [Rating(user, shop.table.rows[item], int(time), float(value)) for user, item, time, value in rows]
    return sorted(ratings, key=lambda rating: (rating.time, rating.user_id, rating.item))


def rated_pairs(shop: Shop, ratings: Sequence[Rating], tokenizer: Tokenizer, config: TrainConfig) -> Pairs:
    """Returns the ratings as pairs, each customer known as of just before; those without a past are left out."""
    keys = [(rating.user_id, rating.time) for rating in ratings]
    customers = join_customers(shop.store, keys)
    activities = [customers[key].activity for key in keys]
    behaviours = activity_texts(activities, shop.table, config.behaviour_limit)
    kept = [(behaviour, rating) for behaviour, rating in zip(behaviours, ratings, strict=True) if behaviour]
    texts = [(behaviour, shop.table.titles[rating.item]) for behaviour, rating in kept]
    values = torch.tensor([rating.value for _, rating in kept], dtype=torch.float32)
    return Pairs.of(texts, values, tokenizer, config.user_tokens + config.item_tokens)
