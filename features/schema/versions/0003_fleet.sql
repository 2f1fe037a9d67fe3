-- The fleet: which replicas live, what they have loaded, and the model being prepared.
CREATE TABLE replicas (
    replica_id       text PRIMARY KEY,
    address          text NOT NULL,                       -- host:port it answers on
    started_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    patience_seconds double precision NOT NULL,           -- not seen for longer than this: dead
    model_version    text NOT NULL,                       -- what it answers with
    activation       bigint NOT NULL,
    index_version    bigint NOT NULL,
    ready            jsonb NOT NULL,                      -- {model_version: [index_version, ...]} it could answer with at once
    failed           jsonb NOT NULL,                      -- {model_version: reason} it could not load
    claim            text NOT NULL,                       -- the preparation (fleet_state.preparing_by) that ready and failed answer
    config           text NOT NULL                        -- fingerprint of the settings that decide a slate
) WITH (fillfactor = 50);                                 -- rewritten every half second: leave room to do it in place

-- By PostgreSQL's clock, so that replicas whose clocks differ agree on who lives.
CREATE VIEW live_replicas AS
    SELECT * FROM replicas WHERE seen_at > clock_timestamp() - make_interval(secs => patience_seconds);

ALTER TABLE fleet_state
    ADD COLUMN answering_index bigint NOT NULL DEFAULT 0, -- the epoch that answers; index_version is the newest published
    ADD COLUMN preparing_model text NOT NULL DEFAULT '',  -- every replica loads it too while the claim holds
    ADD COLUMN preparing_by    text NOT NULL DEFAULT '',  -- the claim: one preparation at a time
    ADD COLUMN preparing_until timestamptz NOT NULL DEFAULT '-infinity';
UPDATE fleet_state SET answering_index = index_version;
