-- The journal holds what a replay needs; audit results.

-- An exposure keeps the user_id of the time of the answer: the slate's id was made of it, and a merge later does not change what
-- was shown. Rows of before this migration have no positions, and a replay says so.
ALTER TABLE exposures
    ADD COLUMN context_item_ids text[] NOT NULL DEFAULT '{}',
    ADD COLUMN page_start       integer NOT NULL DEFAULT 0,       -- first place of the slate that this page could show
    ADD COLUMN page_limit       integer NOT NULL DEFAULT 0,       -- how many items were asked for
    ADD COLUMN filtered         boolean NOT NULL DEFAULT false,   -- the caller's own filter may have removed items
    ADD COLUMN positions        integer[] NOT NULL DEFAULT '{}',  -- the place of each shown item in the slate
    ADD COLUMN currencies       text[] NOT NULL DEFAULT '{}',
    ADD COLUMN in_stock         boolean[] NOT NULL DEFAULT '{}',
    ADD COLUMN degraded_reasons text[] NOT NULL DEFAULT '{}';

-- Append-only: what every offer was at every offer_version, written in the transaction that changed it. The newest row at or
-- below a version is the offer at that version.
CREATE TABLE offer_history (
    item_id       text NOT NULL,
    offer_version bigint NOT NULL,
    price_micros  bigint,
    currency      text NOT NULL,
    stock         bigint,
    channels      text[] NOT NULL,
    removed       boolean NOT NULL,
    changed_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (item_id, offer_version)
);
INSERT INTO offer_history SELECT item_id, offer_version, price_micros, currency, stock, channels, removed, updated_at FROM items;

-- An edge whose weight changes gets a new row, so that every index_version stays reproducible.
ALTER TABLE item_relations
    ADD COLUMN valid_to bigint,                    -- first index_version that no longer holds the edge with this weight; NULL: current
    DROP CONSTRAINT item_relations_pkey,
    ADD PRIMARY KEY (item_id, related_item_id, relation, valid_from);

-- The user_version of a customer's newest regrouping (a merge or an unlink): answers of before it need not be reproducible, since
-- events and profiles have moved.
ALTER TABLE users ADD COLUMN regrouped_version bigint NOT NULL DEFAULT 0;
UPDATE users SET regrouped_version = version WHERE membership > 0;
CREATE FUNCTION note_regrouping() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.regrouped_version := NEW.version;
    RETURN NEW;
END $$;
CREATE TRIGGER note_regrouping BEFORE UPDATE OF membership ON users FOR EACH ROW
    WHEN (NEW.membership <> OLD.membership) EXECUTE FUNCTION note_regrouping();

CREATE INDEX audit_results_time ON audit_results (ran_at);

-- The one definition of a customer's activity: online (p_as_of = 'infinity'), offline (point in time), and, for a replay, as it
-- was at a user_version (p_version): every event knows the version at which it became part of the customer.
DROP FUNCTION user_activity_at(text, timestamptz);
CREATE FUNCTION user_activity_at(p_user text, p_as_of timestamptz, p_version bigint DEFAULT NULL)
RETURNS TABLE (
    version bigint, event_timestamp timestamptz,
    recent_items text[], recent_actions text[], recent_channels text[], recent_times bigint[], recent_texts text[],
    purchased_items text[], purchased_days bigint[],
    views_7d bigint, carts_7d bigint, purchases_28d bigint, searches_7d bigint
) LANGUAGE sql STABLE AS $$
    WITH recent AS (
        SELECT e.* FROM events e
        WHERE e.user_id = p_user AND e.occurred_at <= p_as_of AND (p_version IS NULL OR coalesce(e.version, 0) <= p_version)
        ORDER BY e.occurred_at DESC, e.event_id DESC LIMIT 50
    ), bought AS (
        SELECT e.item_id, max(e.occurred_at) AS bought_at FROM events e
        WHERE e.user_id = p_user AND e.occurred_at <= p_as_of AND e.action = 'purchase' AND e.item_id IS NOT NULL
          AND (p_version IS NULL OR coalesce(e.version, 0) <= p_version)
        GROUP BY e.item_id ORDER BY max(e.occurred_at) DESC, e.item_id LIMIT 300
    ), latest AS (SELECT max(occurred_at) AS at FROM recent)
    SELECT
        coalesce(p_version, u.version - CASE WHEN p_as_of = 'infinity' THEN 0 ELSE
            (SELECT count(*) FROM events e WHERE e.user_id = p_user AND e.occurred_at > p_as_of) END),
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
