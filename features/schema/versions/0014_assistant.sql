-- The shop's own words: policies, questions and answers. Deleted ones stay as a mark, so that a replica that was away sees it.
CREATE TABLE articles (
    article_id      text PRIMARY KEY,
    title           text NOT NULL,
    body            text NOT NULL,                 -- Markdown
    url             text NOT NULL,
    language        text NOT NULL,
    tags            text[] NOT NULL,
    channels        text[] NOT NULL,               -- where it may be quoted; empty: everywhere
    article_version bigint NOT NULL,               -- fleet_state.article_version of its last change
    updated_at      timestamptz NOT NULL DEFAULT now(),
    deleted         boolean NOT NULL DEFAULT false
);
CREATE INDEX articles_version ON articles (article_version);

-- Moves with every change of an article, under the lock of this row: who has applied all changes up to it has missed none.
ALTER TABLE fleet_state ADD COLUMN article_version bigint NOT NULL DEFAULT 0;

-- What a customer asked and was answered, each message once. The order within a customer is (asked_at, event_id).
CREATE TABLE assistant_turns (
    user_id         text NOT NULL,
    event_id        uuid NOT NULL,                 -- of the message, in events too
    origin_id       text NOT NULL,                 -- the persona that asked: a turn follows it through links and unlinks
    turn            bigint NOT NULL,               -- how many the customer had had then, and one
    channel         text NOT NULL,
    question        text NOT NULL,
    answer          jsonb NOT NULL,                -- facts and words, before any channel or format
    user_version    bigint NOT NULL,
    model_version   text NOT NULL,
    index_version   bigint NOT NULL,
    offer_version   bigint NOT NULL,
    article_version bigint NOT NULL,
    asked_at        timestamptz NOT NULL,
    PRIMARY KEY (user_id, event_id, origin_id)
) PARTITION BY HASH (user_id);
DO $$ BEGIN
    FOR part IN 0..7 LOOP
        EXECUTE format('CREATE TABLE assistant_turns_%s PARTITION OF assistant_turns FOR VALUES WITH (MODULUS 8, REMAINDER %s)', part, part);
    END LOOP;
END $$;
CREATE INDEX assistant_turns_order ON assistant_turns (user_id, asked_at DESC, event_id DESC);
