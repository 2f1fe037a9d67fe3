"""UCI Online Retail, next new basket: what each known customer will newly buy with the first invoice after a cut."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from training.basket_features import basket_features
from training.basket_log import PurchaseLog, past, purchase_log
from training.baskets import BasketConfig, BasketRanker, rank, train
from training.encode import pretrained_vectors
from training.events import to_micros
from training.progress import bar
from training.quality.next_item import PARTS, centred
from training.quality.result import QualityResult
from training.text import base_name

FILE = "online_retail.parquet"
_HOME = "United Kingdom"
_COLUMNS = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]


def run(data: Path, *, seed: int, cut: str = "2011-11-01", without: frozenset[str] = frozenset()) -> QualityResult:
    """Trains on the rows before ``cut`` and ranks for every customer known then.

    Args:
        data: folder that holds ``online_retail.parquet``.
        seed: of everything random; the same seed gives the same rankings on the same processor type and number of threads.
        cut: ISO 8601 date or time in the set's own clock.
        without: parts left out, of PARTS, for the ablation; without "ensemble" one network ranks.

    Raises:
        ValueError: ``without`` names something else, or there is too little before the cut to learn from.
    """
    began = time.monotonic()
    if unknown := without - set(PARTS):
        raise ValueError(f"cannot leave out {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    config = replace(BasketConfig(), nets=1) if "ensemble" in without else BasketConfig()
    end = to_micros(pd.Timestamp(cut).to_pydatetime())
    log = read_purchases(data / FILE).before(end)
    titles = np.zeros((len(log.items), 1), np.float32) if "text" in without else centred(pretrained_vectors(log.titles))
    trained = train(log, titles, end=end, config=config, seed=seed, without=without)
    known = past(log, end)
    features = basket_features(known, titles, without=without)
    users = np.arange(len(log.users), dtype=np.int32)
    orders = bar(rank(trained.nets, features, known, users=users, depth=config.depth), "rankings", total=len(users))
    rankings = {user: [log.items[item] for item in order] for user, order in zip(log.users, orders, strict=True)}
    details: dict[str, object] = {
        "set": "online_retail",
        "cut": cut,
        "seed": seed,
        "without": sorted(without),
        "text_encoder": None if "text" in without else base_name(""),
        "purchases": len(log),
        "customers": len(log.users),
        "items": len(log.items),
        "lists": trained.lists,
        "features": list(features.names),
        "linear_weights": linear_weights(trained.nets, features.names),
        "config": asdict(config),
    }
    return QualityResult(rankings, trained.validation, details, time.monotonic() - began)


def read_purchases(path: Path) -> PurchaseLog:
    """Reads the purchases of known customers: rows with a customer, a quantity and a price above zero, as the judge takes them.

    Raises:
        FileNotFoundError: the set is not there; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}")
    frame = pd.read_parquet(path, columns=_COLUMNS)
    frame = frame[frame["CustomerID"].notna() & (frame["Quantity"] > 0) & (frame["UnitPrice"] > 0)]
    columns = {
        "user": frame["CustomerID"].astype(float).astype(int).astype(str),
        "item": frame["StockCode"].astype(str),
        "title": frame["Description"].fillna("").astype(str),
        "basket": frame["InvoiceNo"].astype(str),
        "time": pd.to_datetime(frame["InvoiceDate"]),
        "quantity": frame["Quantity"],
        "price": frame["UnitPrice"],
        "abroad": frame["Country"] != _HOME,
    }
    return purchase_log(pd.DataFrame(columns))


def linear_weights(nets: Sequence[BasketRanker], names: Sequence[str]) -> dict[str, float]:
    """Returns the nets' mean linear weight of each standardised feature, for a customer of average context."""
    mean = torch.stack([net.linear.weight.detach().ravel() for net in nets]).mean(0)
    return {name: round(float(weight), 4) for name, weight in zip(names, mean, strict=True)}
