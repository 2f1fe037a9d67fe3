"""Seconds spent in each stage of one call, and a span of each where the call is traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from server.tracing import span


@dataclass
class StageClock:
    """Adds up the time of each stage; entering a stage twice adds to it."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times the body."""
        started = perf_counter()
        try:
            with span(stage):
                yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + perf_counter() - started
