"""The audit: logged answers replayed, live ones compared, prices, stock, state and staleness measured against PostgreSQL."""
