"""What an evaluation found for each customer, as values and as two Parquet files of the run folder."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PIPELINE = ""
"""The prefix of the whole pipeline's metrics; the baselines have names."""

_USERS, _ITEMS = "evaluation.parquet", "evaluation_items.parquet"
_RANKED = "ranked"


@dataclass(frozen=True)
class Catalogue:
    """The n items that were ranked, by row.

    Attributes:
        ids, titles, categories: of each item; the category is empty where it has none.
        prices: reference prices in major units of the shop's currency, None where there is none.
        purchases: how often each was bought before the cut.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    categories: tuple[str, ...]
    prices: tuple[float | None, ...]
    purchases: tuple[int, ...]


@dataclass(frozen=True)
class UserResult:
    """One customer of the holdout.

    Attributes:
        user_id: the customer.
        channel: where the predicted visit took place, empty when unknown.
        history_channels: where the customer had been seen before the cut.
        bought_count: distinct items bought before the cut.
        wanted: rows of the items the customer turned to, all on sale before the cut.
        rankings: the first 20 rows of each ranking by metric prefix; ``PIPELINE`` is the model's.
        probabilities: softmax of the ranker's scores over the candidates, of the model's first ten.
        candidate_recall: share of the wanted items among the candidates.
    """

    user_id: str
    channel: str
    history_channels: tuple[str, ...]
    bought_count: int
    wanted: tuple[int, ...]
    rankings: Mapping[str, tuple[int, ...]]
    probabilities: tuple[float, ...]
    candidate_recall: float


@dataclass(frozen=True)
class Evaluation:
    """The measured customers of a holdout and the items they were ranked over."""

    catalogue: Catalogue
    users: tuple[UserResult, ...]

    def save(self, folder: Path) -> None:
        """Writes both files; a ranking is a column ``<prefix>ranked`` of item rows."""
        schema = pa.schema(
            [
                ("user_id", pa.string()),
                ("channel", pa.string()),
                ("history_channels", pa.list_(pa.string())),
                ("bought_count", pa.int32()),
                ("wanted", pa.list_(pa.int32())),
                ("probabilities", pa.list_(pa.float64())),
                ("candidate_recall", pa.float64()),
                *((f"{prefix}{_RANKED}", pa.list_(pa.int32())) for prefix in (self.users[0].rankings if self.users else ())),
            ]
        )
        pq.write_table(pa.Table.from_pylist([_row(user) for user in self.users], schema=schema), folder / _USERS)
        pq.write_table(pa.table(asdict(self.catalogue)), folder / _ITEMS)

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: the run was made by a release that did not keep it.
        """
        columns: dict[str, Any] = pq.read_table(folder / _ITEMS).to_pydict()
        catalogue = Catalogue(**{name: tuple(values) for name, values in columns.items()})
        return cls(catalogue, tuple(_user(row) for row in pq.read_table(folder / _USERS).to_pylist()))


def _row(user: UserResult) -> dict[str, Any]:
    values = {each.name: getattr(user, each.name) for each in fields(user) if each.name != "rankings"}
    return values | {f"{prefix}{_RANKED}": rows for prefix, rows in user.rankings.items()}


def _user(row: dict[str, Any]) -> UserResult:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    rankings = {name.removesuffix(_RANKED): values.pop(name) for name in row if name.endswith(_RANKED)}
    return UserResult(**values, rankings=rankings)
