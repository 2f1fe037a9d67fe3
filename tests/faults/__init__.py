"""The 36 rows of faults and bad input, against real processes: `make chaos`, and the fast ones in `make test`."""
