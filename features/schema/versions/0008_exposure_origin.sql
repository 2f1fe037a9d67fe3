-- An exposure is of the customer it was answered to; this says to which of their personas, so that forgetting one that has left since
-- finds what it was shown while it was part of them. Rows of before this migration do not know.
ALTER TABLE exposures ADD COLUMN origin_id text;  -- the persona the subject belonged to; NULL: user_id itself
CREATE INDEX exposures_origin ON exposures (origin_id) WHERE origin_id IS NOT NULL;
