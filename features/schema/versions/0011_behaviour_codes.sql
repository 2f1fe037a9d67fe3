-- In a customer's state actions are numbers, and the text of a rating or a review begins with how it was rated.
-- Of 50 behaviours the names of actions took 391 bytes of Redis; their numbers take 54. The column has another name, so that a state
-- written before reads as missing rather than wrong. A server of an earlier release cannot make a state of the earlier form any more,
-- for its column is gone: whatever Redis holds of that form is no newer than what a server of this release writes.
DROP FUNCTION user_activity_at(text, timestamptz, bigint);
CREATE FUNCTION user_activity_at(p_user text, p_as_of timestamptz, p_version bigint DEFAULT NULL)
RETURNS TABLE (
    version bigint, event_timestamp timestamptz,
    recent_items text[], recent_action_codes bigint[], recent_channels text[], recent_times bigint[], recent_texts text[],
    purchased_items text[], purchased_days bigint[],
    views_7d bigint, carts_7d bigint, purchases_28d bigint, searches_7d bigint
) LANGUAGE sql STABLE AS $$
    WITH recent AS (
        SELECT e.occurred_at, e.event_id, e.item_id, e.action, e.channel,
            -- The enum Action of protos/concord/v1/common.proto; 0 is what it does not have.
            CASE e.action
                WHEN 'view' THEN 1 WHEN 'click' THEN 2 WHEN 'search' THEN 3 WHEN 'add_to_cart' THEN 4 WHEN 'remove_from_cart' THEN 5
                WHEN 'purchase' THEN 6 WHEN 'return' THEN 7 WHEN 'rate' THEN 8 WHEN 'review' THEN 9 WHEN 'wishlist' THEN 10
                WHEN 'message' THEN 11 ELSE 0 END::bigint AS action_code,
            -- What was searched, written or reviewed; a rating comes first: "4 of 5", "4.5 of 5: soft but small".
            left(coalesce(
                CASE WHEN e.action IN ('rate', 'review') THEN
                    (round(e.value * 10) / 10)::text || ' of 5' || coalesce(': ' || nullif(e.text, ''), '') END,
                e.text, ''), 160) AS words
        FROM events e
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
        r.items, r.action_codes, r.channels, r.times, r.texts, b.items, b.days,
        r.views_7d, r.carts_7d, r.purchases_28d, r.searches_7d
    FROM users u, latest,
        (SELECT
            coalesce(array_agg(coalesce(item_id, '') ORDER BY occurred_at DESC, event_id DESC), '{}') AS items,
            coalesce(array_agg(action_code ORDER BY occurred_at DESC, event_id DESC), '{}') AS action_codes,
            coalesce(array_agg(channel ORDER BY occurred_at DESC, event_id DESC), '{}') AS channels,
            coalesce(array_agg((extract(epoch FROM occurred_at) * 1000000)::bigint ORDER BY occurred_at DESC, event_id DESC), '{}') AS times,
            coalesce(array_agg(words ORDER BY occurred_at DESC, event_id DESC), '{}') AS texts,
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
