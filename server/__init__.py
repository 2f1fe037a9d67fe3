"""Online: RPCs, ingest, recommendation, inference. Contains no torch."""
