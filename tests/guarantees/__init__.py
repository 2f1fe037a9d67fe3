"""The promise put to the proof: loads that write a history, faults beneath them, and a checker that reads the history afterwards."""
