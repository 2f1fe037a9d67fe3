"""The search space of a hyper-parameter search: ranges and choices of training fields, written as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import optuna

from training.config import TrainConfig

# Fields that change what a trial is judged on, or that its judge (the tower's validation) does not see.
_FIXED = frozenset(
    {
        "seed",
        "threads",
        "cut",
        "target_actions",
        "tower_actions",
        "tower_labels",
        "validation_labels",
        "evaluation_users",
        "holdout_fraction",
        "snapshot_days",
        "half_life_days",
        "ensemble",
        "ensemble_models",
        "distil_weight",
        "device",
        "mixed_precision",
        "checkpoint_steps",
        "warmup_objective",
        "warmup_steps",
        "warmup_customers",
    }
)
_FIXED_PREFIXES = ("ranker_", "ease_", "collaborative_", "classifier_")


@dataclass(frozen=True)
class Span:
    """Numbers from ``low`` to ``high``, both included; drawn by their logarithm where ``log``."""

    low: float
    high: float
    log: bool

    def suggest(self, trial: optuna.Trial, name: str, kind: type) -> Any:
        """Draws a value."""
        if kind is int:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Returns whether a value lies in the range."""
        return bool(self.low <= value <= self.high)

    def ends(self) -> Sequence[Any]:
        """Returns values that must be valid for all to be."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Choices:
    """One of some values."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str, kind: type) -> Any:
        """Draws a value."""
        return trial.suggest_categorical(name, self.values)

    def holds(self, value: Any) -> bool:
        """Returns whether a value is one of the choices."""
        return value in self.values

    def ends(self) -> Sequence[Any]:
        """Returns values that must be valid for all to be."""
        return self.values


@dataclass(frozen=True)
class Space:
    """Ranges and choices by training field."""

    fields: Mapping[str, Span | Choices]

    @classmethod
    def parse(cls, texts: Sequence[str], base: TrainConfig) -> "Space":
        """Reads ``field=low:high``, ``field=low:high:log`` and ``field=a,b,c``.

        Raises:
            ValueError: a text is not of this form, names a field that cannot be searched, or a value is not valid for its field.
        """
        return cls(dict(_parse(text, base) for text in texts))

    def suggest(self, trial: optuna.Trial, base: TrainConfig) -> dict[str, Any]:
        """Draws a value of every field."""
        return {name: one.suggest(trial, name, type(getattr(base, name))) for name, one in self.fields.items()}

    def inside(self, base: TrainConfig) -> dict[str, Any]:
        """Returns the configuration's own values of those fields that the space holds."""
        return {name: getattr(base, name) for name, one in self.fields.items() if one.holds(getattr(base, name))}


def _parse(text: str, base: TrainConfig) -> tuple[str, Span | Choices]:
    name, separator, values = text.partition("=")
    if not separator or not values:
        raise ValueError(f"{text!r} is neither field=low:high, field=low:high:log nor field=a,b,c")
    if name not in {field.name for field in fields(base)}:
        raise ValueError(f"unknown training field {name!r}")
    if name in _FIXED or name.startswith(_FIXED_PREFIXES):
        raise ValueError(f"training field {name!r} cannot be searched: the tower's validation does not see it, or would change with it")
    kind = type(getattr(base, name))
    one: Span | Choices = _span(text, values, kind) if ":" in values else Choices(tuple(_value(text, v, kind) for v in values.split(",")))
    for value in one.ends():
        replace(base, **{name: value})  # the configuration checks it, and names the field
    return name, one


def _span(text: str, values: str, kind: type) -> Span:
    low, high, *rest = values.split(":")
    if kind not in (int, float) or rest not in ([], ["log"]):
        raise ValueError(f"{text!r} is no range of numbers")
    span = Span(_value(text, low, kind), _value(text, high, kind), bool(rest))
    if span.low > span.high or (span.log and span.low <= 0):
        raise ValueError(f"{text!r} is an empty range, or one by logarithm that is not above 0")
    return span


def _value(text: str, value: str, kind: type) -> Any:
    try:
        return kind(value.strip())
    except ValueError:
        raise ValueError(f"{text!r}: {value!r} is not of type {kind.__name__}") from None
