-- Customers ---------------------------------------------------------------------------------------
CREATE TABLE users (
    user_id     text PRIMARY KEY,
    -- user_version: the number of stored events plus merges; only ever incremented, under this row's lock.
    version     bigint NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now(),
    merged_into text REFERENCES users
);

CREATE TABLE identities (
    channel         text NOT NULL,
    channel_user_id text NOT NULL,
    user_id         text NOT NULL REFERENCES users,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (channel, channel_user_id)
);
CREATE INDEX identities_user ON identities (user_id);

-- Events: the order within a user is (occurred_at, event_id). Tables that grow with customers are hash-partitioned by user.
CREATE TABLE events (
    user_id     text NOT NULL,
    event_id    uuid NOT NULL,
    channel     text NOT NULL,
    action      text NOT NULL,
    item_id     text,
    text        text,
    value       double precision,
    quantity    double precision,
    session_id  text,
    slate_id    text,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, event_id)
) PARTITION BY HASH (user_id);
DO $$ BEGIN
    FOR part IN 0..7 LOOP
        EXECUTE format('CREATE TABLE events_%s PARTITION OF events FOR VALUES WITH (MODULUS 8, REMAINDER %s)', part, part);
    END LOOP;
END $$;
CREATE INDEX events_order ON events (user_id, occurred_at DESC, event_id DESC);
CREATE INDEX events_time ON events (occurred_at);

-- A user whose online state may lag: written in the transaction that stores the events, removed once Redis holds that version.
CREATE TABLE online_outbox (
    user_id     text PRIMARY KEY,
    version     bigint NOT NULL,
    enqueued_at timestamptz NOT NULL DEFAULT now()
);

-- Catalogue ---------------------------------------------------------------------------------------
CREATE TABLE items (
    item_id         text PRIMARY KEY,
    title           text NOT NULL,
    text            text NOT NULL DEFAULT '',
    category        text NOT NULL DEFAULT '',
    brand           text NOT NULL DEFAULT '',
    price_micros    bigint,                        -- millionths of the currency unit; NULL: not for sale
    currency        text NOT NULL DEFAULT '',
    stock           bigint,                        -- units; NULL: not tracked
    channels        text[] NOT NULL DEFAULT '{}',  -- where it is sold; empty: everywhere
    image_ref       text NOT NULL DEFAULT '',
    attributes      jsonb NOT NULL DEFAULT '{}',
    content_hash    text NOT NULL,                 -- of (title, text, category, brand): what the encoder sees
    content_version bigint NOT NULL,               -- fleet_state.content_version of the last re-description
    offer_version   bigint NOT NULL,               -- fleet_state.offer_version of the last change of price, stock or channels
    listed_at       timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    removed         boolean NOT NULL DEFAULT false
);
CREATE INDEX items_offer ON items (offer_version);
CREATE INDEX items_content ON items (content_version);

CREATE TABLE item_relations (
    item_id         text NOT NULL,
    related_item_id text NOT NULL,
    relation        text NOT NULL CHECK (relation IN ('complement', 'substitute', 'same_series')),
    weight          double precision NOT NULL DEFAULT 1,
    valid_from      bigint NOT NULL,               -- first index_version that holds the edge with this weight
    PRIMARY KEY (item_id, related_item_id, relation)
);

-- One row: the versions every replica agrees on. Its row lock orders catalogue changes by commit.
CREATE TABLE fleet_state (
    singleton       boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    content_version bigint NOT NULL DEFAULT 0,
    offer_version   bigint NOT NULL DEFAULT 0,
    index_version   bigint NOT NULL DEFAULT 0,
    model_version   text NOT NULL DEFAULT '',
    activation      bigint NOT NULL DEFAULT 0      -- counts moves of model_version, back and forth
);
INSERT INTO fleet_state DEFAULT VALUES;

-- Index epochs: what could be recommended under an index_version, for ever reproducible.
CREATE TABLE index_epochs (
    index_version   bigint PRIMARY KEY,
    content_version bigint NOT NULL,
    features_as_of  timestamptz,                   -- item_popularity snapshot this epoch ranks with; NULL: none yet
    item_count      bigint NOT NULL,
    published_at    timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE index_items (
    item_id      text NOT NULL,
    valid_from   bigint NOT NULL,                  -- first index_version that holds this row
    valid_to     bigint,                           -- first index_version that no longer does; NULL: current
    title        text NOT NULL,
    text         text NOT NULL,
    category     text NOT NULL,
    brand        text NOT NULL,
    price_micros bigint,                           -- the reference price the ranker sees; offers are joined live
    content_hash text NOT NULL,
    listed_at    timestamptz NOT NULL,
    effective_at timestamptz NOT NULL,             -- when this description took effect (point-in-time joins)
    PRIMARY KEY (item_id, valid_from)
);
CREATE INDEX index_items_current ON index_items (item_id) WHERE valid_to IS NULL;

-- Vectors of items that a bundle does not carry: encoded once, read by every replica.
CREATE TABLE item_vectors (
    model_version text NOT NULL,
    content_hash  text NOT NULL,
    vector        bytea NOT NULL,                  -- little-endian float32
    PRIMARY KEY (model_version, content_hash)
);

-- Feature snapshots (Feast batch sources), one row per entity and snapshot time --------------------
CREATE TABLE user_profile (
    user_id               text NOT NULL,
    event_timestamp       timestamptz NOT NULL,
    event_count           bigint NOT NULL,
    purchase_count        bigint NOT NULL,
    purchase_value        double precision NOT NULL,
    days_since_event      double precision,
    days_since_purchase   double precision,
    price_mean            double precision,
    price_low             double precision,
    price_high            double precision,
    top_categories        text[] NOT NULL,
    top_category_shares   double precision[] NOT NULL,
    top_brands            text[] NOT NULL,
    top_brand_shares      double precision[] NOT NULL,
    channel_names         text[] NOT NULL,
    channel_shares        double precision[] NOT NULL,
    PRIMARY KEY (user_id, event_timestamp)
);
CREATE TABLE item_popularity (
    item_id           text NOT NULL,
    event_timestamp   timestamptz NOT NULL,
    purchases_7d      bigint NOT NULL,
    purchases_28d     bigint NOT NULL,
    purchases_total   bigint NOT NULL,
    views_7d          bigint NOT NULL,
    views_28d         bigint NOT NULL,
    buyers_28d        bigint NOT NULL,
    PRIMARY KEY (item_id, event_timestamp)
);
CREATE INDEX item_popularity_time ON item_popularity (event_timestamp);

-- Journal -----------------------------------------------------------------------------------------
CREATE TABLE exposures (
    user_id       text NOT NULL,
    exposure_id   uuid NOT NULL,
    slate_id      text NOT NULL,
    channel       text NOT NULL,
    surface       text NOT NULL,
    user_version  bigint NOT NULL,
    model_version text NOT NULL,
    index_version bigint NOT NULL,
    offer_version bigint NOT NULL,
    as_of         timestamptz NOT NULL,
    item_ids      text[] NOT NULL,
    scores        real[] NOT NULL,
    prices_micros bigint[] NOT NULL,
    degraded      boolean NOT NULL,
    stale         boolean NOT NULL,
    answered_at   timestamptz NOT NULL,
    PRIMARY KEY (user_id, exposure_id)
) PARTITION BY HASH (user_id);
DO $$ BEGIN
    FOR part IN 0..7 LOOP
        EXECUTE format('CREATE TABLE exposures_%s PARTITION OF exposures FOR VALUES WITH (MODULUS 8, REMAINDER %s)', part, part);
    END LOOP;
END $$;
CREATE INDEX exposures_time ON exposures (answered_at);

-- What customers did with what they were shown: the events that name a slate.
CREATE VIEW feedback AS
    SELECT user_id, slate_id, event_id, channel, action, item_id, value, quantity, occurred_at
    FROM events WHERE slate_id IS NOT NULL;

CREATE TABLE audit_results (
    run_id  uuid PRIMARY KEY,
    ran_at  timestamptz NOT NULL DEFAULT now(),
    result  jsonb NOT NULL
);

-- Models ------------------------------------------------------------------------------------------
CREATE TABLE model_versions (
    model_version text PRIMARY KEY,
    uri           text NOT NULL,
    manifest      jsonb NOT NULL,
    published_at  timestamptz NOT NULL DEFAULT now(),
    activated_at  timestamptz
);

-- The one definition of a customer's activity, online (p_as_of = 'infinity') and offline (point in time) alike.
CREATE FUNCTION user_activity_at(p_user text, p_as_of timestamptz)
RETURNS TABLE (
    version bigint, event_timestamp timestamptz,
    recent_items text[], recent_actions text[], recent_channels text[], recent_times bigint[], recent_texts text[],
    purchased_items text[], purchased_days bigint[],
    views_7d bigint, carts_7d bigint, purchases_28d bigint, searches_7d bigint
) LANGUAGE sql STABLE AS $$
    WITH recent AS (
        SELECT e.* FROM events e
        WHERE e.user_id = p_user AND e.occurred_at <= p_as_of
        ORDER BY e.occurred_at DESC, e.event_id DESC LIMIT 50
    ), bought AS (
        SELECT e.item_id, max(e.occurred_at) AS bought_at FROM events e
        WHERE e.user_id = p_user AND e.occurred_at <= p_as_of AND e.action = 'purchase' AND e.item_id IS NOT NULL
        GROUP BY e.item_id ORDER BY max(e.occurred_at) DESC, e.item_id LIMIT 300
    ), latest AS (SELECT max(occurred_at) AS at FROM recent)
    SELECT
        u.version - CASE WHEN p_as_of = 'infinity' THEN 0 ELSE
            (SELECT count(*) FROM events e WHERE e.user_id = p_user AND e.occurred_at > p_as_of) END,
        coalesce(latest.at, u.created_at),
        r.items, r.actions, r.channels, r.times, r.texts, b.items, b.days,
        r.views_7d, r.carts_7d, r.purchases_28d, r.searches_7d
    FROM users u, latest,
        (SELECT
            coalesce(array_agg(coalesce(item_id, '') ORDER BY occurred_at DESC, event_id DESC), '{}') AS items,
            coalesce(array_agg(action ORDER BY occurred_at DESC, event_id DESC), '{}') AS actions,
            coalesce(array_agg(channel ORDER BY occurred_at DESC, event_id DESC), '{}') AS channels,
            coalesce(array_agg((extract(epoch FROM occurred_at) * 1000000)::bigint ORDER BY occurred_at DESC, event_id DESC), '{}') AS times,
            coalesce(array_agg(coalesce(left(text, 160), '') ORDER BY occurred_at DESC, event_id DESC), '{}') AS texts,
            count(*) FILTER (WHERE action IN ('view', 'click') AND occurred_at > (SELECT at FROM latest) - interval '7 days') AS views_7d,
            count(*) FILTER (WHERE action = 'add_to_cart' AND occurred_at > (SELECT at FROM latest) - interval '7 days') AS carts_7d,
            count(*) FILTER (WHERE action = 'purchase' AND occurred_at > (SELECT at FROM latest) - interval '28 days') AS purchases_28d,
            count(*) FILTER (WHERE action = 'search' AND occurred_at > (SELECT at FROM latest) - interval '7 days') AS searches_7d
         FROM recent) r,
        (SELECT
            coalesce(array_agg(item_id ORDER BY bought_at DESC, item_id), '{}') AS items,
            coalesce(array_agg(floor(extract(epoch FROM bought_at) / 86400)::bigint ORDER BY bought_at DESC, item_id), '{}') AS days
         FROM bought) b
    WHERE u.user_id = p_user
$$;
