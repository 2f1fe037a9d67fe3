-- A replica whose settings would give other slates waits until the live ones that differ have left, and says so.
ALTER TABLE replicas
    ADD COLUMN waits_for     text NOT NULL DEFAULT '',    -- addresses of live replicas with another config; empty once it has joined
    ADD COLUMN onnx_provider text NOT NULL DEFAULT '';    -- what runs its model: cpu or cuda; '' without one

CREATE OR REPLACE VIEW live_replicas AS
    SELECT * FROM replicas WHERE waits_for = '' AND seen_at > clock_timestamp() - make_interval(secs => patience_seconds);

-- One that waits answers nobody: the others need not wait for it.
CREATE OR REPLACE VIEW online_readers AS
    SELECT replica_id FROM replicas
    WHERE waits_for = '' AND NOT online_away AND seen_at > now() - make_interval(secs => patience_seconds);
