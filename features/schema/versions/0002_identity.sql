-- Identity graph: personas, links, tombstones; where every event came from and the version that first held it.
SELECT 1;
