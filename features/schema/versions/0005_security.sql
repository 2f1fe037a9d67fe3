-- API keys and the append-only log of admin calls.
SELECT 1;
