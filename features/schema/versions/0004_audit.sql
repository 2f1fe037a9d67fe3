-- The journal holds what a replay needs; audit results.
SELECT 1;
