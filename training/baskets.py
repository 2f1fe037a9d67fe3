"""A listwise ranker of what a customer will newly buy next, trained on how earlier cuts of the same log went on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from features.behaviour import MICROS_PER_DAY
from features.item_table import FloatArray, IntArray
from training.basket_features import BasketFeatures, basket_features
from training.basket_log import NewBaskets, Past, PurchaseLog, next_new_baskets, past
from training.events import Micros
from training.metrics import Tally
from training.progress import bar

# Signals whose best items are the hard negatives, as far as they are among the features.
_HARD_SIGNALS = ("ease_decayed_relative", "new_14", "buyers_14", "buyers_all")
_OUTLIER = 8.0
# Customers whose pairs with all items are held at once: 256 · 4,000 items · 45 features · 4 B = 184 MB.
_CHUNK = 256


@dataclass(frozen=True)
class BasketConfig:
    """Settings of a run.

    Attributes:
        cuts: how many earlier cuts to learn from.
        newest_cut_days: days from the newest of them to the end of the log.
        cut_step_days: days from one to the next.
        label_days: days after a cut within which a next basket counts, never beyond the end of the log.
        hard_negatives: items a list holds because the signals rank them high; its wanted items are among this number.
        random_negatives: items a list holds by chance, standing for all the rest.
        nets: networks trained from different seeds, whose scores are averaged.
        hidden: width of a network's hidden layer.
        dropout: share of hidden units dropped in training, in [0, 1).
        learning_rate, weight_decay: of AdamW; the rate falls linearly to 0.
        epochs: passes over the lists.
        lists_per_step: customers in one step.
        depth: best items kept of a ranking.
    """

    cuts: int = 8
    newest_cut_days: int = 17
    cut_step_days: int = 19
    label_days: int = 28
    hard_negatives: int = 200
    random_negatives: int = 200
    nets: int = 3
    hidden: int = 48
    dropout: float = 0.2
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    epochs: int = 3
    lists_per_step: int = 32
    depth: int = 100

    def training_cuts(self, end: Micros) -> list[Micros]:
        """Returns the cuts to learn from, newest first."""
        days = (self.newest_cut_days + k * self.cut_step_days for k in range(self.cuts))
        return [end - day * MICROS_PER_DAY for day in days]


@dataclass(frozen=True)
class Lists:
    """What l customers chose from.

    Attributes:
        features: float32[l, w, f].
        context: float32[l, c].
        offset: float32[l, w], log of how many items each stands for: 0, or log(rest / drawn) where drawn at random, or -1e9 for none.
        wanted: bool[l, w].
        time: int64[l], when the wanted items were bought.
    """

    features: Tensor
    context: Tensor
    offset: Tensor
    wanted: Tensor
    time: Tensor

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: Tensor) -> "Lists":
        return Lists(self.features[rows], self.context[rows], self.offset[rows], self.wanted[rows], self.time[rows])


def join(parts: Sequence[Lists]) -> Lists:
    """Returns all lists as one; narrower ones are filled with items that stand for none."""
    width = max(part.offset.shape[1] for part in parts)
    padded = [widen(part, width) for part in parts]
    columns = zip(*((part.features, part.context, part.offset, part.wanted, part.time) for part in padded), strict=True)
    return Lists(*(torch.cat(column) for column in columns))


def widen(lists: Lists, width: int) -> Lists:
    """Returns the lists with places up to ``width`` that stand for no item."""
    more = width - lists.offset.shape[1]
    pad = nn.functional.pad
    return Lists(
        pad(lists.features, (0, 0, 0, more)),
        lists.context,
        pad(lists.offset, (0, more), value=-1e9),
        pad(lists.wanted, (0, more)),
        lists.time,
    )


def make_lists(features: BasketFeatures, known: Past, labels: NewBaskets, *, config: BasketConfig, rng: np.random.Generator) -> Lists:
    """Returns one list a label: its wanted items, hard negatives, and random ones of the rest."""
    bought, parts = known.matrix(), []
    for start in range(0, len(labels.user), _CHUNK):
        users, wanted = labels.user[start : start + _CHUNK], labels.wanted[start : start + _CHUNK].toarray() > 0
        own = bought[users].toarray() > 0
        values = features.of(users)
        chosen, offset = choose(hardness(features, values), wanted, own=own, config=config, rng=rng)
        parts.append(
            Lists(
                torch.from_numpy(np.take_along_axis(values, chosen[:, :, None], 1)),
                torch.from_numpy(features.context[users]),
                torch.from_numpy(offset),
                torch.from_numpy(np.take_along_axis(wanted, chosen, 1)),
                torch.from_numpy(labels.time[start : start + _CHUNK]),
            )
        )
    return join(parts)


def hardness(features: BasketFeatures, values: FloatArray) -> FloatArray:
    """Returns float32[u, n]: the sum of the standardised signals."""
    columns = [values[:, :, features.names.index(name)] for name in _HARD_SIGNALS if name in features.names]
    return np.asarray(sum((column - column.mean()) / max(float(column.std()), 1e-9) for column in columns), np.float32)


def choose(
    hard: FloatArray, wanted: npt.NDArray[np.bool_], *, own: npt.NDArray[np.bool_], config: BasketConfig, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Returns the items of u lists, int64[u, w], and what each stands for, the log as float32[u, w]; nobody's own items count."""
    hard_count = min(config.hard_negatives, hard.shape[1])
    random_count = min(config.random_negatives, hard.shape[1] - hard_count)
    order = np.where(wanted, np.inf, np.where(own, -np.inf, hard))
    first = np.argpartition(-order, hard_count - 1, axis=1)[:, :hard_count]
    lots = np.where(own | wanted, np.inf, rng.random(hard.shape))
    np.put_along_axis(lots, first, np.inf, axis=1)
    drawn = np.argpartition(lots, max(random_count - 1, 0), axis=1)[:, :random_count]
    rest = np.isfinite(lots).sum(1, keepdims=True)
    share = np.log(np.maximum(rest, 1) / max(random_count, 1)).clip(min=0.0)
    valid_first = np.where(np.take_along_axis(own, first, 1), -1e9, 0.0)
    valid_drawn = np.where(np.isfinite(np.take_along_axis(lots, drawn, 1)), share, -1e9)
    return np.concatenate([first, drawn], 1), np.concatenate([valid_first, valid_drawn], 1).astype(np.float32)


class BasketRanker(nn.Module):
    """A linear score, weights that the customer's context shifts, and one hidden layer; it normalises its own input."""

    mean: Tensor
    scale: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(self, features: int, context: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        for name, size in (("mean", features), ("context_mean", context)):
            self.register_buffer(name, torch.zeros(size))
            self.register_buffer(name.replace("mean", "scale"), torch.ones(size))
        self.linear = nn.Linear(features, 1, bias=False)
        self.gate = nn.Linear(context, features, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.item_side = nn.Linear(features, hidden)
        self.customer_side = nn.Linear(context, hidden, bias=False)
        self.top = nn.Linear(hidden, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def normalise_by(self, lists: Lists) -> None:
        """Sets the normalisation from what customers chose from; what never varies is only centred."""
        rows = lists.features[lists.offset > -1e8]
        for prefix, values in (("", rows), ("context_", lists.context)):
            deviation = values.std(0, correction=0)
            getattr(self, f"{prefix}mean").copy_(values.mean(0))
            getattr(self, f"{prefix}scale").copy_(torch.where(deviation > 1e-6, 1.0 / deviation.clamp(min=1e-6), 1.0))

    def normal(self, features: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features [..., f] and context [..., c] normalised, outliers cut at 8 standard deviations."""
        x = ((features - self.mean) * self.scale).clamp_(-_OUTLIER, _OUTLIER)
        return x, ((context - self.context_mean) * self.context_scale).clamp_(-_OUTLIER, _OUTLIER)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Returns scores float32[u, w] of normalised features [u, w, f] and context [u, c].

        Dropout takes hidden units from a whole list, so that its items stay comparable; it also spares a mask for every item.
        """
        hidden = torch.relu(self.item_side(x) + self.customer_side(c).unsqueeze(1))
        top = self.dropout(torch.ones_like(hidden[:, 0])) * self.top.weight
        linear = self.linear.weight + self.gate(c)
        scores: Tensor = (torch.bmm(hidden, top.unsqueeze(2)) + torch.bmm(x, linear.unsqueeze(2))).squeeze(2)
        return scores

    def score(self, features: Tensor, context: Tensor) -> Tensor:
        """Returns scores float32[u, w] of features [u, w, f] and context [u, c] as they come."""
        scores: Tensor = self(*self.normal(features, context))
        return scores


def list_loss(scores: Tensor, lists: Lists) -> Tensor:
    """Returns the sampled softmax cross-entropy, each list's wanted items sharing one unit of weight."""
    log_p = log_softmax(scores + lists.offset, dim=1)
    wanted = lists.wanted.to(log_p.dtype)
    return -((log_p * wanted).sum(1) / wanted.sum(1)).mean()


def train_net(lists: Lists, config: BasketConfig, *, seed: int) -> BasketRanker:
    """Trains one network; the same seed and lists give the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = BasketRanker(lists.features.shape[2], lists.context.shape[1], hidden=config.hidden, dropout=config.dropout)
        net.normalise_by(lists)
        features, context = net.normal(lists.features, lists.context)
        lists = replace(lists, features=features, context=context)
        steps = [rows for _ in range(config.epochs) for rows in torch.split(torch.randperm(len(lists)), config.lists_per_step)]
        optimizer = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
        for rows in bar(steps, f"ranker, seed {seed}"):
            batch = lists[rows]
            optimizer.zero_grad()
            torch.autograd.backward(list_loss(net(batch.features, batch.context), batch))
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.inference_mode()
def rank(nets: Sequence[BasketRanker], features: BasketFeatures, known: Past, *, users: IntArray, depth: int) -> Iterator[IntArray]:
    """Yields, customer by customer, the best items by the nets' mean score without the customer's own: int32[depth] or fewer."""
    bought = known.matrix()
    for start in range(0, len(users), _CHUNK):
        chunk = users[start : start + _CHUNK]
        values, about = torch.from_numpy(features.of(chunk)), torch.from_numpy(features.context[chunk])
        scores = torch.stack([net.score(values, about) for net in nets]).mean(0).numpy()
        own = bought[chunk].toarray() > 0
        scores[own] = -np.inf
        for order, left in zip(np.argsort(-scores, axis=1, kind="stable")[:, :depth], (~own).sum(1), strict=True):
            yield order[:left].astype(np.int32)


@dataclass(frozen=True)
class Trained:
    """A trained ranker.

    Attributes:
        nets: to be averaged.
        lists: how many customers' choices they learnt from.
        validation: metrics on the newest training cut of one net that saw nothing bought after it.
    """

    nets: tuple[BasketRanker, ...]
    lists: int
    validation: dict[str, float]


def train(
    log: PurchaseLog, titles: FloatArray, *, end: Micros, config: BasketConfig, seed: int, without: frozenset[str] = frozenset()
) -> Trained:
    """Trains the ranker on the purchases before ``end``.

    Args:
        log: purchases; those from ``end`` on are not looked at.
        titles: float32[m, d], unit vectors of the titles of at least the items sold before ``end``.
        end: the moment to rank at later, microseconds of Unix time.
        config: settings.
        seed: of the random negatives and the networks.
        without: groups of features to leave out.

    Raises:
        ValueError: no cut has both purchases before it and new baskets after it.
    """
    log, parts, newest = log.before(end), [], None
    for place, cut in enumerate(bar(config.training_cuts(end), "features of cuts")):
        if cut <= log.time[0]:
            break
        known = past(log, cut)
        labels = next_new_baskets(log, known, cut=cut, until=min(end, cut + config.label_days * MICROS_PER_DAY))
        if not len(labels.user):
            continue
        features = basket_features(known, titles, without=without)
        parts.append(make_lists(features, known, labels, config=config, rng=np.random.default_rng([seed, place])))
        newest = newest or (cut, known, labels, features)
    if newest is None:
        raise ValueError("nobody bought anything new after a training cut: the log is too short")
    lists = join(parts)
    del parts
    validation = validate(lists, *newest, config=config, seed=seed)
    nets = tuple(train_net(lists, config, seed=seed * config.nets + number) for number in range(config.nets))
    return Trained(nets, len(lists), validation)


def validate(
    lists: Lists, cut: Micros, known: Past, labels: NewBaskets, features: BasketFeatures, *, config: BasketConfig, seed: int
) -> dict[str, float]:
    """Returns the metrics of one net, trained on what was bought before ``cut``, on the labels after it; empty without earlier lists."""
    earlier = torch.nonzero(lists.time < cut).ravel()
    if not len(earlier):
        return {}
    net, tally = train_net(lists[earlier], config, seed=seed), Tally()
    for row, order in enumerate(rank([net], features, known, users=labels.user, depth=20)):
        tally.add(order.tolist(), set(labels.wanted[row].indices.tolist()))
    return tally.means() | {"users": float(len(labels.user))}
