"""Quality on public sets: each module trains on one set by its published protocol and ranks for the independent judge."""
