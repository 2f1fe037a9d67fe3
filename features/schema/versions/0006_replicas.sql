-- A replica whose settings would give other slates waits until the live ones that differ have left, and says so.
ALTER TABLE replicas
    ADD COLUMN waits_for     text NOT NULL DEFAULT '',    -- addresses of live replicas with another config; empty once it has joined
    ADD COLUMN onnx_provider text NOT NULL DEFAULT '';    -- what runs its model: cpu or cuda; '' without one

CREATE OR REPLACE VIEW live_replicas AS
    SELECT * FROM replicas WHERE waits_for = '' AND seen_at > clock_timestamp() - make_interval(secs => patience_seconds);
