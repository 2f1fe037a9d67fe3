-- What a search looked for, so that its answer can be computed again; empty for recommendations.
ALTER TABLE exposures ADD COLUMN query text NOT NULL DEFAULT '';
