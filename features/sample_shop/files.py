"""A sample shop as files that the importers read."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.catalogue import Item
from features.importers.mapping import mapping_source
from features.sample_shop.shop import Shop

MAPPING = "sample_shop"


def write(shop: Shop, folder: Path) -> Path:
    """Writes ``items``, ``relations``, ``identities``, ``events`` and ``utterances`` as Parquet, and ``mapping.toml`` beside them.

    Returns:
        The path of the mapping, for ``features.importers.import_folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {
        "items": [_item_row(item) for item in shop.items],
        "relations": [vars(relation) for relation in shop.relations],
        "identities": [vars(identity) for identity in shop.identities],
        "events": [vars(event) for event in shop.events],
        "utterances": [vars(utterance) for utterance in shop.utterances],
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    mapping = folder / "mapping.toml"
    mapping.write_text(mapping_source(MAPPING), "utf-8")
    return mapping


def _item_row(item: Item) -> dict[str, object]:
    row = {key: value for key, value in vars(item).items() if key != "price_micros"}
    price = None if item.price_micros is None else item.price_micros / 1_000_000
    return {**row, "price": price, "channels": list(item.channels), "attributes": json.dumps(dict(item.attributes), ensure_ascii=False)}
