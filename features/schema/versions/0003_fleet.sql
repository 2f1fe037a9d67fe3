-- The fleet: which replicas live, what they have loaded, and the model being prepared.
SELECT 1;
