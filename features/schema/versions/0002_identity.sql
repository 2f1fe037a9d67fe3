-- Identity graph: personas, links, tombstones; where every event came from and the version that first held it.

-- A row of users is a persona. A customer is a connected component of the links between personas; its root is the persona with
-- the smallest (created_at, user_id), and merged_into names the root for the others. Everything that follows (merged_into,
-- identities.user_id, events.user_id) is a function of the links, so neither their order nor their repetition matters.
ALTER TABLE users
    -- Counts the regroupings that made, unmade or changed this root: a reader that resolved an identity before looks again.
    ADD COLUMN membership bigint NOT NULL DEFAULT 0;
CREATE INDEX users_merged ON users (merged_into) WHERE merged_into IS NOT NULL;

ALTER TABLE identities
    -- The persona the identity belongs to, whoever is linked with it; NULL: user_id itself. user_id is the customer's root.
    ADD COLUMN home_id text REFERENCES users;
CREATE INDEX identities_home ON identities (home_id);
UPDATE identities i SET home_id = i.user_id, user_id = u.merged_into FROM users u WHERE u.user_id = i.user_id AND u.merged_into IS NOT NULL;

-- Links that hold now, each once, with the smaller id on the left. Merges of before this migration become links too; which of
-- their events were whose was not kept, so undoing one leaves the events with the survivor.
CREATE TABLE identity_links (
    left_id   text NOT NULL REFERENCES users,
    right_id  text NOT NULL REFERENCES users,
    linked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (left_id, right_id),
    CHECK (left_id COLLATE "C" < right_id COLLATE "C")
);
CREATE INDEX identity_links_right ON identity_links (right_id);
INSERT INTO identity_links (left_id, right_id)
    SELECT least(user_id COLLATE "C", merged_into COLLATE "C"), greatest(user_id COLLATE "C", merged_into COLLATE "C")
    FROM users WHERE merged_into IS NOT NULL;

-- Personas that were ever one customer, directly or through others, share a family: a token of one stays valid for the other
-- after an unlink. The id is random, so that it outlives a forgotten persona without naming it.
CREATE TABLE identity_families (
    user_id text PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    family  uuid NOT NULL
);
CREATE INDEX identity_families_family ON identity_families (family);
WITH roots AS (SELECT merged_into AS root_id, gen_random_uuid() AS family FROM users WHERE merged_into IS NOT NULL GROUP BY merged_into)
INSERT INTO identity_families (user_id, family)
    SELECT u.user_id, r.family FROM users u JOIN roots r ON r.root_id = coalesce(u.merged_into, u.user_id);

ALTER TABLE events
    -- The persona that recorded it; NULL: user_id itself.
    ADD COLUMN origin_id text,
    -- The user_version with which it became part of the customer it is stored under; NULL: before all versions.
    ADD COLUMN version bigint;

-- Copies hidden because another persona of the customer recorded an event under the same id: the copy with the smallest
-- (received_at, origin_id) stands in events, the others wait here until an unlink gives them back.
CREATE TABLE events_shadowed (
    user_id     text NOT NULL,
    event_id    uuid NOT NULL,
    origin_id   text NOT NULL,
    channel     text NOT NULL,
    action      text NOT NULL,
    item_id     text,
    text        text,
    value       double precision,
    quantity    double precision,
    session_id  text,
    slate_id    text,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, event_id, origin_id)
);

-- When the row was computed, whatever moment it describes: an unlink takes those again that were computed while it was linked.
ALTER TABLE user_profile ADD COLUMN computed_at timestamptz NOT NULL DEFAULT clock_timestamp();

-- Erasure -----------------------------------------------------------------------------------------
CREATE TABLE receipts (
    receipt_id   uuid PRIMARY KEY,
    forgotten_at timestamptz NOT NULL DEFAULT now(),
    counts       jsonb NOT NULL
);
-- What must not come back, as keyed digests: nobody reads an id out of them, and with the key lost nobody tests one either.
CREATE TABLE tombstones (
    kind       text NOT NULL CHECK (kind IN ('user', 'identity')),
    digest     bytea NOT NULL,
    receipt_id uuid NOT NULL REFERENCES receipts,
    PRIMARY KEY (kind, digest)
);
-- Customers whose online state is still to be erased: written with the deletion, removed once Redis has confirmed.
CREATE TABLE erasures (
    receipt_id uuid PRIMARY KEY REFERENCES receipts,
    user_ids   text[] NOT NULL
);
-- The key's two paddings of HMAC (RFC 2104), made once from 32 random bytes.
CREATE TABLE tombstone_key (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    inner_pad bytea NOT NULL,
    outer_pad bytea NOT NULL
);
DO $$
DECLARE
    key   bytea := sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));
    inner_bytes bytea := decode(repeat('36', 64), 'hex');
    outer_bytes bytea := decode(repeat('5c', 64), 'hex');
BEGIN
    FOR at IN 0..31 LOOP
        inner_bytes := set_byte(inner_bytes, at, get_byte(inner_bytes, at) # get_byte(key, at));
        outer_bytes := set_byte(outer_bytes, at, get_byte(outer_bytes, at) # get_byte(key, at));
    END LOOP;
    INSERT INTO tombstone_key (inner_pad, outer_pad) VALUES (inner_bytes, outer_bytes);
END $$;
-- p_name: a user id, or channel and channel_user_id with a unit separator (U+001F) between.
CREATE FUNCTION tombstone_digest(p_kind text, p_name text) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT sha256(outer_pad || sha256(inner_pad || convert_to(p_kind || E'\x1f' || p_name, 'UTF8'))) FROM tombstone_key
$$;
