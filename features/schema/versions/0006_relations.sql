-- Edges with a past: an epoch keeps the edges and weights it was published with, whenever a replica loads it.
ALTER TABLE item_relations
    ADD COLUMN valid_to bigint,                    -- first index_version that no longer holds this row; NULL: current
    DROP CONSTRAINT item_relations_pkey,
    ADD PRIMARY KEY (item_id, related_item_id, relation, valid_from);
