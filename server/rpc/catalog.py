"""CatalogService: the items a shop sells."""

from concord.v1 import catalog_pb2, catalog_pb2_grpc
from features.catalogue import Item
from server.rpc import rules
from server.rpc.interceptor import Context
from server.rpc.paging import fitting, page_token, read_page_token
from server.rpc.ports import Catalog
from server.rpc.translate import money_of, timestamp_of
from server.rpc.validation import Validator


class CatalogServicer(catalog_pb2_grpc.CatalogServiceServicer):
    """Stores and reads items."""

    def __init__(self, catalog: Catalog, validator: Validator) -> None:
        self._catalog = catalog
        self._validator = validator

    async def UpsertItems(self, request: catalog_pb2.UpsertItemsRequest, _context: Context) -> catalog_pb2.UpsertItemsResponse:
        """Stores items and relations, all or nothing."""
        items, relations = self._validator.items(request)
        result = await self._catalog.upsert(items, relations)
        return catalog_pb2.UpsertItemsResponse(
            stored_count=result.stored_count,
            redescribed_count=result.redescribed_count,
            offer_changed_count=result.offer_changed_count,
            offer_version=result.offer_version,
            index_version=self._catalog.index_version,
            index_pending=bool(result.redescribed_count or relations),
        )

    async def GetItems(self, request: catalog_pb2.GetItemsRequest, _context: Context) -> catalog_pb2.GetItemsResponse:
        """Returns items by id."""
        wanted = dict.fromkeys(rules.identifiers(request.item_ids, "item_ids", most=rules.ITEM_IDS, least=1))
        offer_version = self._catalog.offer_version  # read first: the items are at least as new as it says
        found = {item.item_id: item for item in await self._catalog.get(list(wanted))}
        return catalog_pb2.GetItemsResponse(
            items=[_item(found[item_id]) for item_id in wanted if item_id in found],
            not_found_item_ids=[item_id for item_id in wanted if item_id not in found],
            offer_version=offer_version,
        )

    async def ListItems(self, request: catalog_pb2.ListItemsRequest, _context: Context) -> catalog_pb2.ListItemsResponse:
        """Lists items in the order of their ids; one item more than the page holds tells whether there is a next one."""
        page_size = rules.page(request.page_size, "page_size", most=rules.PAGE_SIZE, default=rules.DEFAULT_PAGE_SIZE)
        category = rules.text(request.category, "category", most=rules.LABEL_CHARS)
        items = await self._catalog.list(page_size=page_size + 1, after=read_page_token(request.page_token), category=category)
        shown = fitting([_item(item) for item in items[:page_size]])
        more = len(shown) < len(items)
        return catalog_pb2.ListItemsResponse(items=shown, next_page_token=page_token(shown[-1].item_id) if more else "")


def _item(item: Item) -> catalog_pb2.Item:
    return catalog_pb2.Item(
        item_id=item.item_id,
        title=item.title,
        text=item.text,
        category=item.category,
        brand=item.brand,
        price=money_of(item.price_micros, item.currency),
        stock=item.stock,
        channels=item.channels,
        image_ref=item.image_ref,
        attributes=item.attributes,
        listed_at=timestamp_of(item.listed_at),
    )
