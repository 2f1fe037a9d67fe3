"""Completions of what somebody types, from the items of the epoch that answers."""

from server.catalog.offers import Offers
from server.domain import ItemFilter, Suggestions, SuggestQuery, Versions
from server.recommend.computing import Computing
from server.recommend.shelf import Shelf
from server.recommend.standing import Standings


class Suggester:
    """Answers everybody alike under equal versions, and with what the channel sells."""

    def __init__(self, standings: Standings, offers: Offers, computing: Computing, *, hide_out_of_stock: bool) -> None:
        self._standings = standings
        self._offers = offers
        self._computing = computing
        self._hide_out_of_stock = hide_out_of_stock

    async def suggest(self, query: SuggestQuery) -> Suggestions:
        """Returns how a prefix may go on.

        Raises:
            OverloadedError: too many calls wait to be computed.
            UnavailableError: the snapshot that the fleet names cannot be loaded here.
        """
        stand = await self._standings.of_nobody()
        table = stand.snapshot.table
        offers = await self._offers.at_least(stand.offer_version)
        shelf = Shelf(query.channel, ItemFilter(), self._hide_out_of_stock)

        def offered(row: int) -> bool:
            offer = offers.offers.get(table.ids[row])
            return offer is not None and shelf.offered(offer)

        found = await self._computing.run(table.completions.complete, query.prefix, query.limit, offered)
        return Suggestions(found, Versions(0, "", stand.snapshot.index_version, offers.offer_version))
