"""The Feast repository: entities, feature views and services. The only module that defines Feast objects.

``feast apply`` imports it by path and compares objects by identity, so no other module may import a view from here;
use ``features.store.feature_store()`` and look objects up by name.
"""

from datetime import timedelta

import numpy as np
import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, PushSource, RequestSource, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float64, Int64, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING, description="A customer, the same in every channel.")
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING, description="A thing the shop sells.")

# One row per customer and distinct moment: the state just after everything that happened then. OFFSET 0 keeps the planner from
# computing it again for every row that a point-in-time join compares it with (five times a row at 16 rows a customer).
_activity_batch = PostgreSQLSource(
    name="user_activity_batch",
    query="""
        SELECT m.user_id, a.* FROM activity_moments m, LATERAL user_activity_at(m.user_id, m.occurred_at) a OFFSET 0
    """,
    timestamp_field="event_timestamp",
)

user_activity = FeatureView(
    name="user_activity",
    entities=[user],
    ttl=timedelta(days=0),
    schema=[
        Field(name="version", dtype=Int64, description="user_version these values reflect"),
        Field(name="recent_items", dtype=Array(String), description="items of the last 50 behaviours, newest first; '' without one"),
        Field(name="recent_action_codes", dtype=Array(Int64), description="their actions, numbers of the enum concord.v1.Action"),
        Field(name="recent_channels", dtype=Array(String), description="the channels they happened in"),
        Field(name="recent_times", dtype=Array(Int64), description="their times, microseconds of Unix time"),
        Field(name="recent_texts", dtype=Array(String), description="searches, messages, '4 of 5: review'; at most 160 characters each"),
        Field(name="purchased_items", dtype=Array(String), description="distinct items ever bought, most recent first, at most 300"),
        Field(name="purchased_days", dtype=Array(Int64), description="day since 1970 of the last purchase of each"),
        Field(name="views_7d", dtype=Int64, description="views and clicks in the 7 days up to the newest behaviour, among the last 50"),
        Field(name="carts_7d", dtype=Int64, description="additions to a cart, likewise"),
        Field(name="purchases_28d", dtype=Int64, description="purchases in the 28 days up to the newest behaviour, among the last 50"),
        Field(name="searches_7d", dtype=Int64, description="searches in the 7 days up to the newest behaviour, among the last 50"),
    ],
    source=PushSource(name="user_activity_push", batch_source=_activity_batch),
    description="What a customer did last across all channels; maintained online by the server, one write per user_version.",
)

user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    ttl=timedelta(days=365),
    schema=[
        Field(name="event_count", dtype=Int64),
        Field(name="purchase_count", dtype=Int64, description="purchase events ever"),
        Field(name="purchase_value", dtype=Float64, description="money spent less returns, major units"),
        Field(name="days_since_event", dtype=Float64),
        Field(name="days_since_purchase", dtype=Float64),
        Field(name="price_mean", dtype=Float64, description="mean unit price bought, major units"),
        Field(name="price_low", dtype=Float64, description="20th percentile of unit prices bought"),
        Field(name="price_high", dtype=Float64, description="80th percentile of unit prices bought"),
        Field(name="top_categories", dtype=Array(String), description="at most 5, by weight of behaviours"),
        Field(name="top_category_shares", dtype=Array(Float64)),
        Field(name="top_brands", dtype=Array(String), description="at most 5, by weight of behaviours"),
        Field(name="top_brand_shares", dtype=Array(Float64)),
        Field(name="channel_names", dtype=Array(String)),
        Field(name="channel_shares", dtype=Array(Float64), description="share of the customer's events in each channel"),
    ],
    source=PostgreSQLSource(name="user_profile_batch", table="user_profile", timestamp_field="event_timestamp"),
    description="Recency, frequency, monetary value, affinities and price band, as of a snapshot time.",
)

item_profile = FeatureView(
    name="item_profile",
    entities=[item],
    ttl=timedelta(days=0),
    schema=[
        Field(name="title", dtype=String),
        Field(name="category", dtype=String),
        Field(name="brand", dtype=String),
        Field(name="price", dtype=Float64, description="reference price of the index epoch, major units"),
    ],
    source=PostgreSQLSource(
        name="item_profile_batch",
        query="""
            SELECT item_id, title, category, brand, price_micros / 1000000.0::double precision AS price,
                   effective_at AS event_timestamp FROM index_items
        """,
        timestamp_field="event_timestamp",
    ),
    description="The item as described in the newest index epoch.",
)

item_popularity = FeatureView(
    name="item_popularity",
    entities=[item],
    ttl=timedelta(days=365),
    schema=[
        Field(name="purchases_7d", dtype=Int64),
        Field(name="purchases_28d", dtype=Int64),
        Field(name="purchases_total", dtype=Int64),
        Field(name="views_7d", dtype=Int64),
        Field(name="views_28d", dtype=Int64),
        Field(name="buyers_28d", dtype=Int64, description="distinct buyers in 28 days"),
    ],
    source=PostgreSQLSource(name="item_popularity_batch", table="item_popularity", timestamp_field="event_timestamp"),
    description="How often an item was bought and looked at, all channels together, as of a snapshot time.",
)

price_request = RequestSource(name="price_request", schema=[Field(name="offer_price", dtype=Float64)])


@on_demand_feature_view(  # type: ignore[untyped-decorator]
    sources=[user_profile, price_request],
    schema=[Field(name="price_gap", dtype=Float64), Field(name="in_price_band", dtype=Int64)],
    description="A price against the customer's band: log(price / mean), and 1 inside the 20-80 % band; 0 when unknown.",
)
def price_fit(inputs: pd.DataFrame) -> pd.DataFrame:
    """Computes the request-time price features."""
    price = inputs["offer_price"].astype(float)
    gap = np.log(price / inputs["price_mean"].astype(float)).replace([np.inf, -np.inf], np.nan).fillna(0.0)
    inside = (price >= inputs["price_low"].astype(float)) & (price <= inputs["price_high"].astype(float))
    return pd.DataFrame({"price_gap": gap, "in_price_band": inside.astype("int64")})


retrieval_v1 = FeatureService(name="retrieval_v1", features=[user_activity], description="What the user tower reads.")
ranking_v1 = FeatureService(
    name="ranking_v1",
    features=[user_activity, user_profile[["purchase_count", "price_mean", "price_low", "price_high"]], item_profile, item_popularity],
    description="What candidates and the ranker read.",
)
profile_v1 = FeatureService(name="profile_v1", features=[user_activity, user_profile], description="A customer's whole profile.")
pricing_v1 = FeatureService(name="pricing_v1", features=[user_profile, price_fit], description="A price against the customer's band.")
