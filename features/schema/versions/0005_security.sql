-- API keys and the append-only log of admin calls.

-- A key's secret is 256 random bits and only its SHA-256 is kept. At most two keys of a holder are valid at a time.
CREATE TABLE api_keys (
    key_id     text PRIMARY KEY,
    holder     text NOT NULL,
    digest     bytea NOT NULL,
    channels   text[] NOT NULL,             -- '*': every channel
    scopes     text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,                 -- NULL: never
    revoked_at timestamptz
);
CREATE INDEX api_keys_holder ON api_keys (holder, created_at DESC);

-- Under this key customers appear in admin_audit as digests: erasing a customer leaves nothing there that names them, and one
-- who is named can still be looked up by an operator.
CREATE TABLE audit_secret (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    secret   bytea NOT NULL
);
INSERT INTO audit_secret (secret) VALUES (sha256(convert_to(gen_random_uuid()::text || gen_random_uuid()::text, 'UTF8')));

-- Who asked for what and how it ended. An admin call has two rows: REQUESTED, written before it is done, and its outcome.
CREATE TABLE admin_audit (
    audit_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    noted_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    principal  text NOT NULL,
    method     text NOT NULL,
    target     text NOT NULL,               -- 'model:…', 'receipt:…', 'key:…', 'customer:' and a digest; may be empty
    outcome    text NOT NULL,               -- REQUESTED, OK, or status code and reason
    request_id text NOT NULL
);
CREATE INDEX admin_audit_time ON admin_audit (noted_at);

CREATE FUNCTION admin_audit_stands() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'admin_audit is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER admin_audit_stands BEFORE UPDATE OR DELETE ON admin_audit FOR EACH ROW EXECUTE FUNCTION admin_audit_stands();
CREATE TRIGGER admin_audit_stays BEFORE TRUNCATE ON admin_audit FOR EACH STATEMENT EXECUTE FUNCTION admin_audit_stands();
