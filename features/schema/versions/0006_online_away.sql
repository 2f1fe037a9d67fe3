-- Which replicas answer from Redis: what PostgreSQL alone knows may be shown while none does.
ALTER TABLE replicas
    ADD COLUMN online_away boolean NOT NULL DEFAULT false, -- Redis is away from it, or may lack what was shown: what it reads is flagged
    ADD COLUMN reported    bigint NOT NULL DEFAULT 0;      -- number of its last report; one that arrives late changes nothing

-- Those whose answers from Redis are not flagged. By now(), which is no later than the statement's snapshot: by a later clock a
-- replica whose report the snapshot just misses could look dead while it lives.
CREATE VIEW online_readers AS
    SELECT replica_id FROM replicas WHERE NOT online_away AND seen_at > now() - make_interval(secs => patience_seconds);
