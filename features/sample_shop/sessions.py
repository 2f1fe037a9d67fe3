"""What a customer of the sample shop does: what each session is about, and the searches, views, carts and purchases in it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import numpy as np

from features.sample_shop.catalogue import HISTORY_DAYS, ShelfItem
from features.sample_shop.customers import Customer, Taste
from features.sample_shop.dice import Dice
from features.sample_shop.shop import Event
from features.sample_shop.visit import Visit
from features.sample_shop.vocabulary import MESSAGES
from features.sample_shop.voices import review, stars, wish

# What a session is about, tried in this order; else it follows the customer's taste.
_RESUME = 0.40  # something looked at but not bought
_CHAIN = 0.50  # what belongs to the last purchase
_SURPRISE = 0.10  # anything at all: a gift, a whim

_TALKING = ("messaging", "call_centre", "social")
_CHATTING = (0.5, 0.1)  # share of sessions in which somebody asks for something: where talking is all there is, and elsewhere


class Shelves:
    """The items by brand and shelf, in buying order."""

    def __init__(self, entries: Sequence[ShelfItem]) -> None:
        self.entries = entries
        self._series: dict[tuple[int, int], list[ShelfItem]] = defaultdict(list)
        for entry in sorted(entries, key=lambda e: (e.place, e.item.item_id)):
            self._series[entry.shelf, entry.brand].append(entry)

    def series(self, shelf: int, brand: int) -> list[ShelfItem]:
        """Returns the items of a brand on a shelf."""
        return self._series[shelf, brand]


class Life:
    """Plays one customer's history; its randomness is its own, so a customer does not depend on the others."""

    def __init__(self, rng: np.random.Generator, customer: Customer, shelves: Shelves, *, start: datetime, language: str) -> None:
        self._dice, self._customer, self._shelves = Dice(rng), customer, shelves
        self._start, self._language = start, language
        self._bought: set[str] = set()
        self._last_bought: ShelfItem | None = None
        self._unfinished: list[ShelfItem] = []

    def events(self) -> Iterator[Event]:
        """Yields the customer's events up to the end of the history, session by session."""
        end = self._start + timedelta(days=HISTORY_DAYS)
        for number, when in enumerate(self._session_times()):
            for visit in self._session(f"{self._customer.user_id}-s{number:03d}", when):
                yield from (event for event in visit.events if event.occurred_at < end)

    def _session_times(self) -> list[datetime]:
        """Draws when the customer comes: any day, mostly in the afternoon and evening."""
        count = self._customer.session_count
        hours = np.clip(self._dice.rng.normal(17, 4, count), 6, 22) + 24 * self._dice.rng.integers(HISTORY_DAYS, size=count)
        return [self._start + timedelta(seconds=round(float(hour) * 3600)) for hour in np.sort(hours)]

    def _session(self, session_id: str, when: datetime) -> list[Visit]:
        """Plays a session; returns it and the visits that follow from it (returns, reviews)."""
        identity = self._customer.identities[self._dice.weighted(self._customer.channel_weights)]
        visit = Visit(self._dice, identity, session_id, when)
        target = self._target(visit)
        if target is None:
            return []
        talking = identity.channel in _TALKING
        if self._dice.chance(_CHATTING[not talking]):
            visit.act("message", text=wish(self._dice, self._taste(when), self._language))
        if self._dice.chance(0.3):
            visit.act("search", text=self._query(target))
        for entry in (*self._compared(target, visit), target):
            visit.act("view", entry)
            if self._dice.chance(0.35):
                visit.act("click", entry)
        after = self._buy(visit, target) if self._dice.chance(self._customer.eagerness) else self._leave(visit, target)
        if talking and self._dice.chance(0.35):
            visit.act("message", text=self._dice.pick(MESSAGES[self._language]).format(title=target.item.title))
        return [visit, *after]

    def _leave(self, visit: Visit, target: ShelfItem) -> list[Visit]:
        self._unfinished.append(target)
        if self._dice.chance(0.3):
            visit.act("wishlist", target)
        return []

    def _buy(self, visit: Visit, target: ShelfItem) -> list[Visit]:
        basket = [target]
        visit.act("add_to_cart", target, quantity=1)
        extra = self._next_in_chain(target, visit)
        if extra and self._dice.chance(0.3):
            visit.act("add_to_cart", extra, quantity=1)
            if self._dice.chance(0.15):
                visit.act("remove_from_cart", extra, quantity=1)
            else:
                basket.append(extra)
        return [after for entry in basket for after in self._own(visit, entry)]

    def _own(self, visit: Visit, entry: ShelfItem) -> Iterator[Visit]:
        quantity = 1 if self._dice.chance(0.85) else 2
        visit.act("purchase", entry, quantity=quantity)
        self._bought.add(entry.item.item_id)
        self._last_bought = entry
        self._unfinished = [other for other in self._unfinished if other is not entry]
        if self._dice.chance(0.05):
            after = visit.later(self._dice.between(3, 12))
            after.act("return", entry, quantity=quantity)
            yield after
        elif self._dice.chance(0.22):
            after = visit.later(self._dice.between(2, 15))
            taste = self._taste(after.when)
            rating = stars(self._dice, taste, entry)
            after.rate(entry, rating, review(self._dice, taste, rating, self._language) if self._dice.chance(0.5) else None)
            yield after

    def _target(self, visit: Visit) -> ShelfItem | None:
        """Chooses what the session is about; None when nothing that fits is left to buy."""
        if self._unfinished and self._dice.chance(_RESUME):
            entry = self._unfinished.pop()
            if _sold(entry, visit):
                return entry
        if self._last_bought and self._dice.chance(_CHAIN):
            entry_after = self._next_in_chain(self._last_bought, visit)
            if entry_after:
                return entry_after
        if self._dice.chance(_SURPRISE):
            return self._favourite(self._shelves.entries, visit)
        taste = self._taste(visit.when)
        place = self._dice.weighted(taste.weights)
        brand = taste.brands[place] if self._dice.chance(taste.loyalty) else self._dice.pick((0, 1, 2))
        return self._favourite(self._shelves.series(taste.shelves[place], brand), visit)

    def _taste(self, when: datetime) -> Taste:
        return self._customer.taste((when - self._start) / timedelta(days=1))

    def _next_in_chain(self, entry: ShelfItem, visit: Visit) -> ShelfItem | None:
        """Returns the next good of the same series that is not owned yet, sometimes the one after it."""
        series = self._shelves.series(entry.shelf, entry.brand)
        following = [e for e in series if e.place > entry.place and e.item.item_id not in self._bought and _sold(e, visit)]
        return following[self._dice.chance(0.25) and len(following) > 1] if following else None

    def _favourite(self, entries: Sequence[ShelfItem], visit: Visit) -> ShelfItem | None:
        choices = [e for e in entries if e.item.item_id not in self._bought and _sold(e, visit)]
        return choices[self._dice.weighted([e.appeal for e in choices])] if choices else None

    def _compared(self, target: ShelfItem, visit: Visit) -> Iterator[ShelfItem]:
        """Yields up to three items looked at beside the target: of its series, or the shelf's other brands."""
        for _ in range(self._dice.pick((0, 1, 2, 3))):
            brand = target.brand if self._dice.chance(0.65) else self._dice.pick((0, 1, 2))
            others = [e for e in self._shelves.series(target.shelf, brand) if e is not target and _sold(e, visit)]
            if others:
                yield self._dice.pick(others)

    def _query(self, target: ShelfItem) -> str:
        brand, series, good = target.words
        gap = "" if self._language == "zh" else " "
        return self._dice.pick((good, brand + gap + good, series + gap + good, brand + gap + series)).lower()


def _sold(entry: ShelfItem, visit: Visit) -> bool:
    """Tells whether the channel sells the item by then."""
    item = entry.item
    return item.listed_at is not None and item.listed_at <= visit.when and (not item.channels or visit.identity.channel in item.channels)
