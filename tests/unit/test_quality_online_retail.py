"""The quality run on UCI Online Retail: the rows the judge takes, and a small part of the set trained and ranked end to end."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from training.basket_log import next_new_baskets, past
from training.events import to_micros
from training.metrics import Tally
from training.quality.online_retail import FILE, read_purchases, run

CUT = pd.Timestamp("2011-10-01")


@pytest.fixture(scope="module")
def small(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every tenth customer's purchases of the 200 most bought items, and all kinds of rows that do not count."""
    frame = pd.read_parquet(data_folder / FILE)
    popular = frame["StockCode"].value_counts().index[:200]
    part = frame[frame["StockCode"].isin(popular) & (frame["CustomerID"].isna() | (frame["CustomerID"] % 10 == 0))]
    folder = tmp_path_factory.mktemp("data")
    pd.concat([part[part["CustomerID"].notna()], part[part["CustomerID"].isna()].head(500)]).to_parquet(folder / FILE)
    return folder


@pytest.mark.data
def test_the_rows_are_those_the_judge_takes(small: Path) -> None:
    frame = pd.read_parquet(small / FILE)
    kept = frame[frame["CustomerID"].notna() & (frame["Quantity"] > 0) & (frame["UnitPrice"] > 0)]
    assert 0 < len(kept) < len(frame) - 500
    log = read_purchases(small / FILE)
    assert len(log) == len(kept)
    assert set(log.users) == {str(int(user)) for user in kept["CustomerID"].unique()}
    assert set(log.items) == set(kept["StockCode"])
    assert log.quantity.sum() == kept["Quantity"].sum()
    assert (log.quantity * log.price).sum() == pytest.approx((kept["Quantity"] * kept["UnitPrice"]).sum(), rel=1e-4)
    assert log.abroad.mean() == pytest.approx((kept["Country"] != "United Kingdom").mean())


@pytest.mark.data
def test_a_small_shop_is_trained_and_ranked_better_than_by_popularity(small: Path) -> None:
    result = run(small, seed=0, cut="2011-10-01", without=frozenset({"ensemble"}))
    log, cut = read_purchases(small / FILE), to_micros(CUT.to_pydatetime())
    known = past(log, cut)
    assert set(result.rankings) == set(known.log.users)
    assert json.loads(json.dumps(result.details)) == result.details
    assert result.details["text_encoder"] == "all-MiniLM-L6-v2"
    assert result.validation["users"] > 30
    assert result.seconds > 0
    rows = {item: row for row, item in enumerate(log.items)}
    labels, bought = next_new_baskets(log, known, cut=cut, until=cut + 10**15), known.matrix().toarray() > 0
    ours, popular = Tally(), Tally()
    for row, user in enumerate(labels.user):
        ranked = [rows[item] for item in result.rankings[log.users[user]]]
        assert len(set(ranked)) == len(ranked) == min(100, int((~bought[user]).sum()))
        assert not bought[user][ranked].any()
        wanted = set(labels.wanted[row].indices.tolist())
        ours.add(ranked, wanted)
        popular.add([item for item in np.argsort(-bought.sum(0), kind="stable").tolist() if not bought[user][item]], wanted)
    assert len(labels.user) > 50
    assert ours.means()["ndcg_at_10"] > popular.means()["ndcg_at_10"] * 1.2


def test_only_known_groups_can_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot leave out magic: choose from text, sequence, collaborative, recency, ensemble"):
        run(tmp_path, seed=0, without=frozenset({"magic"}))


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"online_retail\.parquet is not in"):
        run(tmp_path, seed=0)


def test_a_log_of_one_week_is_too_short(tmp_path: Path) -> None:
    row = {"InvoiceNo": "1", "StockCode": "a", "Description": "cup", "Quantity": 1, "InvoiceDate": pd.Timestamp("2011-10-30")}
    pd.DataFrame([row | {"UnitPrice": 1.0, "CustomerID": 1.0, "Country": "France"}]).to_parquet(tmp_path / FILE)
    with pytest.raises(ValueError, match="too short"):
        run(tmp_path, seed=0, without=frozenset({"text"}))
