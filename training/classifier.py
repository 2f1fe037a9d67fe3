"""The click classifier: BERT reads a customer's behaviours and a candidate's title together and says whether it will be taken.

The paper-style task: ``BertForSequenceClassification`` over the pair of texts, two logits, cross-entropy. It is a model of its
own beside the two towers: trained and measured on the same visits, split by time, and exported as its own ONNX graph.
"""

from collections.abc import Sequence

import numpy as np
import psycopg
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.config import TrainConfig
from training.dataset import Shop, Split, behaviour_texts, join_customers
from training.labels import Label, choose_labels, keys_of
from training.metrics import area_under_curve
from training.negatives import NegativeSampler
from training.on_sale import read_on_sale
from training.pairs import Head, PairModel, Pairs, PairSets


class Clicks(Head):
    """Whether the customer takes the item: logits of no and yes."""

    name = "classifier"
    outputs = 2
    output = "logits"
    metric = "auc"
    more_is_better = True

    def pairs(self, shop: Shop, split: Split, tokenizer: Tokenizer, config: TrainConfig) -> PairSets:
        """Returns the pairs of the tower's visits, and to validate on those of the ranker's period."""
        labels, rng = choose_labels(shop.log, split, config), np.random.default_rng(config.seed)
        with psycopg.connect(shop.dsn) as connection:
            on_sale = read_on_sale(connection, shop.table, shop.log)
        sampler = NegativeSampler(labels.tower, on_sale, config, rng)
        training = make_pairs(shop, labels.tower, tokenizer, sampler=sampler, config=config, rng=rng)
        return PairSets(training, make_pairs(shop, labels.validation, tokenizer, sampler=sampler, config=config, rng=rng))

    def prepare(self, model: PairModel, answers: Tensor) -> None:
        """Leaves the logits as they are."""

    def loss(self, outputs: Tensor, answers: Tensor, config: TrainConfig) -> Tensor:
        """Returns the cross-entropy."""
        return cross_entropy(outputs, answers, label_smoothing=config.label_smoothing)

    def measure(self, outputs: Tensor, answers: Tensor) -> dict[str, float]:
        """Returns ``auc``, ``accuracy`` and ``log_loss``."""
        margin = (outputs[:, 1] - outputs[:, 0]).numpy()
        return {
            "auc": area_under_curve(margin, (answers == 1).numpy()),
            "accuracy": float((outputs.argmax(-1) == answers).float().mean()),
            "log_loss": float(cross_entropy(outputs, answers)),
        }

    def baseline(self, train: Tensor, answers: Tensor) -> dict[str, float]:
        """Returns the accuracy of the commoner answer, ``constant_accuracy``."""
        return {"constant_accuracy": float((answers == int(train.float().mean() > 0.5)).float().mean())}


def make_pairs(
    shop: Shop, labels: Sequence[Label], tokenizer: Tokenizer, *, sampler: NegativeSampler, config: TrainConfig, rng: np.random.Generator
) -> Pairs:
    """Returns one taken item per label, and ``classifier_negatives`` others drawn by how often items are taken.

    Drawing negatives like positives keeps the classifier from learning mere popularity.
    """
    customers = join_customers(shop.store, keys_of(labels))
    texts: list[tuple[str, str]] = []
    clicked: list[int] = []
    for label, behaviour in zip(labels, behaviour_texts(shop, keys_of(labels), customers, config.behaviour_limit), strict=True):
        if not behaviour:
            continue
        titles = shop.descriptions.before(label.time).titles
        drawn = sampler.pick(label, config.classifier_negatives)
        for row, answer in [(int(rng.choice(label.items)), 1), *((row, 0) for row in drawn)]:
            texts.append((behaviour, titles[row]))
            clicked.append(answer)
    return Pairs.of(texts, torch.tensor(clicked, dtype=torch.int64), tokenizer, config.user_tokens + config.item_tokens)
