-- What the active model made of each review and message: judged once and kept, whatever model comes after. One row for each copy of
-- an event, by the persona that recorded it, so that copies hidden by a merge keep theirs.
CREATE TABLE event_sentiments (
    user_id       text NOT NULL,
    event_id      uuid NOT NULL,
    origin_id     text NOT NULL,
    language      text NOT NULL,                     -- en, zh, or empty: neither
    score         double precision CHECK (score BETWEEN -1 AND 1),  -- NULL: nothing there that the model reads
    model_version text NOT NULL,
    judged_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, event_id, origin_id)
) PARTITION BY HASH (user_id);
DO $$ BEGIN
    FOR part IN 0..7 LOOP
        EXECUTE format('CREATE TABLE event_sentiments_%s PARTITION OF event_sentiments FOR VALUES WITH (MODULUS 8, REMAINDER %s)', part, part);
    END LOOP;
END $$;
-- Reviews and messages by when they came in: what is not judged yet is looked for in this order, a page at a time.
CREATE INDEX events_opinions ON events (received_at, user_id, event_id) WHERE action IN ('review', 'message') AND text <> '';

ALTER TABLE user_profile
    ADD COLUMN sentiment_count bigint NOT NULL DEFAULT 0,
    ADD COLUMN sentiment_mean  double precision,
    ADD COLUMN sentiment_last  double precision;
