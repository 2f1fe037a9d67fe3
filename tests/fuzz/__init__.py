"""Fuzzing of every method of the contract: random bytes, mutated valid messages, extreme values. `make fuzz` runs it in full."""
