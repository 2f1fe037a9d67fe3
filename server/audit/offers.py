"""Offers: every logged or live price and stock flag against the catalogue's history at its offer_version."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.audit.report import Answered, AuditReport, Outcome, Replayed, Violation
from server.audit.store import AuditStore, Offer

_BATCH = 20_000


@dataclass(frozen=True)
class _Shown:
    answer: Answered
    item_id: str
    price_micros: int | None
    currency: str
    in_stock: bool

    def violation(self, kind: str, *, expected: str, seen: str) -> Violation:
        answer = self.answer
        return Violation(
            kind,
            "offers",
            expected,
            seen,
            customer=answer.user_id,
            slate_id=answer.slate_id,
            item_id=self.item_id,
            channel=answer.channel,
            replica=answer.replica,
        )


class OfferAudit:
    """Compares what was shown with what the catalogue said at that version, and the catalogue with its own history."""

    def __init__(self, store: AuditStore, *, hide_out_of_stock: bool) -> None:
        self._store = store
        self._hide_out_of_stock = hide_out_of_stock

    async def shown(self, answers: Sequence[Answered], report: AuditReport) -> None:
        """Checks the price, currency, stock flag and channel of every shown item."""
        shown = [
            _Shown(answer, *values)
            for answer in answers
            if answer.offers_known
            for values in zip(answer.item_ids, answer.prices_micros, answer.currencies, answer.in_stock, strict=True)
        ]
        for start in range(0, len(shown), _BATCH):
            part = shown[start : start + _BATCH]
            offers = await self._store.offers([(row.item_id, row.answer.offer_version) for row in part])
            wrong = [(row, offer) for row, offer in zip(part, offers, strict=True) if offer is not None and not _right(row, offer)]
            report.offers["unknown"] += sum(offer is None for offer in offers)
            report.offers["equal"] += sum(offer is not None for offer in offers) - len(wrong)
            history = await self._store.offer_history(row.item_id for row, _ in wrong)
            for row, offer in wrong:
                violation = _named(row, offer, history[row.item_id])
                report.offers[violation.kind] += 1
                report.violations.append(violation)

    async def catalogue(self, live: Sequence[Answered], report: AuditReport) -> None:
        """Finds items whose row was changed behind the version counter: replicas go on showing the old offer."""
        for item_id, row, versioned in await self._store.unversioned_offers():
            showing = next((answer for answer in live if item_id in answer.item_ids), None)
            report.offers["unversioned_offer"] += 1
            report.violations.append(
                Violation(
                    "unversioned_offer",
                    "offers",
                    expected=f"offer_version {versioned.offer_version}: {_words(versioned)}",
                    seen=f"the catalogue's row says {_words(row)} under offer_version {row.offer_version}",
                    item_id=item_id,
                    customer=showing.user_id if showing else "",
                    slate_id=showing.slate_id if showing else "",
                    channel=showing.channel if showing else "",
                    replica=showing.replica if showing else "",
                )
            )
            if showing and row.price_micros != versioned.price_micros:
                self._stale(showing, item_id, row, report)

    @staticmethod
    def _stale(answer: Answered, item_id: str, row: Offer, report: AuditReport) -> None:
        place = answer.item_ids.index(item_id)
        shown = _Shown(answer, item_id, answer.prices_micros[place], answer.currencies[place], answer.in_stock[place])
        if shown.price_micros != row.price_micros:
            expected = f"{_price(row.price_micros, row.currency)}, what the catalogue says now"
            report.offers["stale_price"] += 1
            report.violations.append(shown.violation("stale_price", expected=expected, seen=_price(shown.price_micros, shown.currency)))

    async def left_out(self, replays: Sequence[Replayed], report: AuditReport) -> None:
        """Checks that what a page lacks of its slate could not be shown in its channel."""
        gaps = [(r.answer, item) for r in replays if r.outcome is Outcome.EQUAL and not r.answer.filtered for item in _gaps(r)]
        for start in range(0, len(gaps), _BATCH):
            part = gaps[start : start + _BATCH]
            offers = await self._store.offers([(item, answer.offer_version) for answer, item in part])
            for (answer, item), offer in zip(part, offers, strict=True):
                if offer is not None and offer.sold_in(answer.channel) and (offer.in_stock or not self._hide_out_of_stock):
                    row = _Shown(answer, item, None, "", in_stock=False)
                    report.violations.append(row.violation("item_left_out", expected=f"{item}, {_words(offer)}", seen="not shown"))


def _gaps(replayed: Replayed) -> list[str]:
    """Returns the items of the slate that the page passed over."""
    answer = replayed.answer
    full = len(answer.positions) >= answer.page_limit
    end = answer.positions[-1] if full and answer.positions else len(replayed.slate_items)
    shown = set(answer.positions)
    return [replayed.slate_items[place] for place in range(answer.page_start, end) if place not in shown]


def _right(row: _Shown, offer: Offer) -> bool:
    same = (row.price_micros, row.currency, row.in_stock) == (offer.price_micros, offer.currency, offer.in_stock)
    return same and offer.sold_in(row.answer.channel)


def _named(row: _Shown, offer: Offer, history: Sequence[Offer]) -> Violation:
    version = row.answer.offer_version
    if (row.price_micros, row.currency) != (offer.price_micros, offer.currency):
        older = next((o for o in history if o.offer_version < offer.offer_version and o.price_micros == row.price_micros), None)
        seen = _price(row.price_micros, row.currency) + (f", the price of offer_version {older.offer_version}" if older else "")
        expected = f"{_price(offer.price_micros, offer.currency)} at offer_version {version}"
        return row.violation("stale_price" if older else "wrong_price", expected=expected, seen=seen)
    if row.in_stock != offer.in_stock:
        older = next((o for o in history if o.offer_version < offer.offer_version and o.in_stock == row.in_stock), None)
        seen = ("in stock" if row.in_stock else "out of stock") + (f", true at offer_version {older.offer_version}" if older else "")
        expected = f"{'in stock' if offer.in_stock else 'out of stock'} at offer_version {version}"
        return row.violation("stale_stock" if older else "wrong_stock", expected=expected, seen=seen)
    channels = "nowhere" if offer.removed else ", ".join(offer.channels)
    return row.violation("not_sold_there", expected=f"sold only in: {channels}", seen=f"shown in {row.answer.channel}")


def _words(offer: Offer) -> str:
    stock = "" if offer.stock is None else f", stock {offer.stock}"
    channels = f", sold in {', '.join(offer.channels)}" if offer.channels else ""
    return _price(offer.price_micros, offer.currency) + stock + channels + (", removed" if offer.removed else "")


def _price(micros: int | None, currency: str) -> str:
    digits = 2 if micros is not None and micros % 10_000 == 0 else 6
    return "not for sale" if micros is None else f"{micros / 1e6:.{digits}f} {currency}".strip()
