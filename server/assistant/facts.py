"""Live facts of an answer: items with price and stock at one offer_version, suggestions, and the customer's own order lines."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from features.article_search import Hit
from features.articles import Article
from features.item_table import IntArray
from features.retrieval import vector_scores
from server.assistant.answer import OfferedItem, OrderLine, Quote
from server.assistant.conversations import Line
from server.assistant.plan import Plan, Wishes
from server.catalog.offers import OfferTable
from server.recommend.compute import similar_items
from server.recommend.snapshot import Snapshot

# Items an answer keeps: shown are five, but a channel may lack some. Looked at for them: the nearest by far, or the whole slate.
_KEPT, _LOOKED_AT = 20, 500


def quotes(hits: Sequence[Hit]) -> tuple[Quote, ...]:
    """Returns the passages as they are quoted."""
    return tuple(_quote(hit.article, hit) for hit in hits)


def _quote(article: Article, hit: Hit) -> Quote:
    passage = hit.passage
    return Quote(
        article_id=article.article_id,
        title=article.title,
        url=article.url,
        heading=passage.heading,
        markdown=passage.markdown,
        text=passage.text,
        channels=article.channels,
        confidence=round(hit.confidence, 4),
    )


def offered(rows: Iterable[int], snapshot: Snapshot, offers: OfferTable) -> Iterator[OfferedItem]:
    """Yields items with their offers, in order; those that are not for sale anywhere are left out."""
    for row in rows:
        offer = offers.offers.get(snapshot.table.ids[row])
        if offer is not None and offer.price_micros is not None:
            yield OfferedItem(
                item_id=snapshot.table.ids[row],
                title=snapshot.table.titles[row],
                price_micros=offer.price_micros,
                currency=offer.currency,
                in_stock=offer.in_stock,
                channels=tuple(sorted(offer.channels)),
            )


def suggested(
    plan: Plan, slate: Sequence[int], *, snapshot: Snapshot, offers: OfferTable, hide_out_of_stock: bool
) -> tuple[OfferedItem, ...]:
    """Returns what to suggest, best first, whatever the channel.

    Args:
        plan: of SUGGESTIONS: like an item, of a category or brand, described in words, or none of these.
        slate: rows of the customer's own slate, best first; used where the plan starts from no item and no words.
        snapshot: the catalogue and the model.
        offers: prices and stock.
        hide_out_of_stock: leaves out what is out of stock.
    """
    candidates: Iterable[int]
    if plan.rows and snapshot.model is not None:
        candidates = similar_items(snapshot, plan.rows[0], exhaustive=False).rows[:_LOOKED_AT].tolist()
    elif plan.rows:
        category = snapshot.table.categories[plan.rows[0]]
        candidates = (row for row in snapshot.table.popular_rows.tolist() if snapshot.table.categories[row] == category)
    elif plan.topic and snapshot.model is not None:
        candidates = _described(plan.topic, snapshot).tolist()
    else:
        candidates = [*slate, *snapshot.table.popular_rows.tolist()]
    rows = dict.fromkeys(row for row in candidates if row not in plan.rows and _of_kind(row, plan.wishes, snapshot))
    found = []
    for item in offered(rows, snapshot, offers):
        if _affordable(item, plan.wishes) and (item.in_stock or not hide_out_of_stock):
            found.append(item)
        if len(found) == _KEPT:
            break
    return tuple(found)


def order_lines(lines: Sequence[Line], plan: Plan, snapshot: Snapshot, *, returned: bool, limit: int) -> tuple[OrderLine, ...]:
    """Returns the customer's lines, newest first, those of the order asked for where one is."""
    asked = {order_id.casefold() for order_id in plan.order_ids}
    kept = [line for line in lines if not asked or line.session_id.casefold() in asked][:limit]
    return tuple(map(partial(_order_line, snapshot, returned), kept))


def _order_line(snapshot: Snapshot, returned: bool, line: Line) -> OrderLine:
    title = snapshot.table.title_of(line.item_id) or ""
    return OrderLine(line.event_id, line.item_id, title, line.quantity, line.occurred_at.date().isoformat(), returned)


def _described(topic: str, snapshot: Snapshot) -> IntArray:
    """Returns rows of the items nearest to a description, nearest first, ties by row."""
    scores = vector_scores(snapshot.vectors, snapshot.require_model().text_vector(topic), snapshot.index)
    rows = scores.rows
    order = np.lexsort((rows, -scores.at(rows)))[:_LOOKED_AT]
    found: IntArray = rows[order]
    return found


def _of_kind(row: int, wishes: Wishes, snapshot: Snapshot) -> bool:
    table = snapshot.table
    return (not wishes.categories or table.category_names[row] in wishes.categories) and (
        not wishes.brands or table.brand_names[row] in wishes.brands
    )


def _affordable(item: OfferedItem, wishes: Wishes) -> bool:
    return (
        (not wishes.currency or item.currency == wishes.currency)
        and (wishes.min_price_micros is None or item.price_micros >= wishes.min_price_micros)
        and (wishes.max_price_micros is None or item.price_micros <= wishes.max_price_micros)
    )
