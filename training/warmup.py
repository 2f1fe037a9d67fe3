"""Self-supervised training of the text encoder before it sees a label: on the shop's own texts, or on its customers' histories.

``mlm``: masked language modelling on item and behaviour texts. ``contrastive``: a history is cut in two at a random place, and
its newer part is to find its older part among those of the other customers of the batch (InfoNCE, van den Oord et al., 2018),
both written as the text the user tower reads. What is trained of the encoder is the regime's choice, as in fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, DataCollatorForLanguageModeling

from features.behaviour import Activity, behaviour_text
from features.item_table import ItemTable
from training.config import TrainConfig
from training.dataset import Shop, TrainingDataError, join_customers
from training.distributed import gathered
from training.events import Micros
from training.loop import Log, Loop, Plan, Progress, decayed
from training.model import TwoTower
from training.progress import quiet
from training.regimes import rest_frozen
from training.text import TINY, Tokens, activity_texts, base_path, load_tokenizer, tokenize

_MASKED_SHARE = 0.15
_MIN_BEHAVIOURS = 4  # a history is cut into two parts of two behaviours at least


def past_activities(shop: Shop, *, until: Micros, config: TrainConfig) -> list[Activity]:
    """Returns what customers had done before ``until``, of at most ``warmup_customers`` chosen at random."""
    seen = np.unique(shop.log.user[shop.log.time < until])
    chosen = np.sort(np.random.default_rng(config.seed).permutation(seen)[: config.warmup_customers])
    keys = [(shop.log.users[user], until) for user in chosen.tolist()]
    customers = join_customers(shop.store, keys)
    return [customers[key].activity for key in keys]


def warm_up(
    tower: TwoTower,
    histories: Sequence[Activity],
    table: ItemTable,
    *,
    config: TrainConfig,
    folder: Path | None = None,
    log: Log | None = None,
) -> Progress:
    """Trains what is trainable of the tower's encoder by the configured objective, for ``warmup_steps`` steps.

    Raises:
        TrainingDataError: no history is long enough to be cut in two.
    """
    task = (Masked if config.warmup_objective == "mlm" else Contrastive)(tower, histories, table, config)
    if not len(task):
        raise TrainingDataError(f"no customer with {_MIN_BEHAVIOURS} behaviours to warm up on")
    plan = Plan(len(task), config.warmup_steps, stage="warmup")
    progress = Loop(task, plan, config=config, folder=folder).run(log)
    tower.eval()
    return progress


class _WarmUp:
    """What both objectives share: a random generator, an encoder that learns as it does on labels, and what is new beside it."""

    model: nn.Module

    def __init__(self, tower: TwoTower, config: TrainConfig) -> None:
        self.config, self._encoder = config, tower.encoder
        self.rng = np.random.default_rng([config.seed, 1])

    def groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups."""
        config, known = self.config, {id(parameter) for parameter in self._encoder.parameters()}
        fresh = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        return [
            *decayed([self._encoder], peak=config.learning_rate, weight_decay=config.weight_decay),
            {"params": fresh, "peak": config.head_learning_rate, "weight_decay": 0.0},
        ]

    def validate(self) -> float:
        """Returns nothing of use: a warm-up takes all its steps, and its worth shows in what is fine-tuned after it."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the random generator."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.rng.bit_generator.state = state["rng"]


@dataclass(frozen=True)
class MaskedBatch:
    """Texts int64[b, l] with some tokens masked, and what they were: labels int64[b, l], -100 for the others."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


class _MaskedModel(nn.Module):
    def __init__(self, tower: TwoTower, config: TrainConfig) -> None:
        super().__init__()
        with quiet():
            if config.base_model == TINY:
                self.bert = BertForMaskedLM(tower.encoder.config)
            else:
                self.bert = AutoModelForMaskedLM.from_pretrained(base_path(config.base_model), dtype=torch.float32)
            setattr(self.bert, self.bert.base_model_prefix, tower.encoder)
            self.bert.tie_weights()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        rest_frozen(self.bert.base_model)
        return self

    def forward(self, batch: MaskedBatch) -> Tensor:
        loss: Tensor = self.bert(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        return loss


class Masked(_WarmUp):
    """Masked language modelling (Devlin et al., 2019) on the texts of items and behaviours."""

    def __init__(self, tower: TwoTower, histories: Sequence[Activity], table: ItemTable, config: TrainConfig) -> None:
        super().__init__(tower, config)
        self.model = _MaskedModel(tower, config)
        texts = [*table.texts, *(text for text in activity_texts(histories, table, config.behaviour_limit) if text)]
        self.tokens = tokenize(load_tokenizer(config.base_model), texts, config.user_tokens)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(base_path(config.base_model))
        self._mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=_MASKED_SHARE)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int], mine: Sequence[int]) -> MaskedBatch:
        """Masks some texts anew."""
        made = self._mask([{"input_ids": list(self.tokens.ids[rows[place]])} for place in mine])
        return MaskedBatch(made["input_ids"], made["attention_mask"], made["labels"])


@dataclass(frozen=True)
class ViewBatch:
    """Newer and older parts of this process's histories: ids and masks int64[p, l]; their places among all of the batch."""

    newer: tuple[Tensor, Tensor]
    older: tuple[Tensor, Tensor]
    mine: Sequence[int]
    count: int

    def to(self, device: torch.device) -> Self:
        """Returns the batch on another device."""
        newer, older = ((ids.to(device), mask.to(device)) for ids, mask in (self.newer, self.older))
        return replace(self, newer=newer, older=older)


class _ViewModel(nn.Module):
    def __init__(self, tower: TwoTower, config: TrainConfig) -> None:
        super().__init__()
        # Not a submodule: its heads, residuals and temperature are no part of this training, nor of its checkpoints.
        self._pool, self._temperature = tower.pool, config.temperature
        self.encoder = tower.encoder

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        rest_frozen(self.encoder)
        return self

    def forward(self, batch: ViewBatch) -> Tensor:
        newer, older = (gathered(self._pool(*view).float(), batch.mine, batch.count) for view in (batch.newer, batch.older))
        mine = torch.tensor(list(batch.mine), device=newer.device)
        with torch.autocast(newer.device.type, enabled=False):
            similar = normalize(newer, dim=-1) @ normalize(older, dim=-1).T / self._temperature
            return (cross_entropy(similar[mine], mine) + cross_entropy(similar.T[mine], mine)) / 2


class Contrastive(_WarmUp):
    """Two parts of one history against the parts of others; a history of fewer than four behaviours has no part in it."""

    def __init__(self, tower: TwoTower, histories: Sequence[Activity], table: ItemTable, config: TrainConfig) -> None:
        super().__init__(tower, config)
        self.model = _ViewModel(tower, config)
        self._table, self._tokenizer = table, load_tokenizer(config.base_model)
        self._histories = [activity for activity in histories if all(self._parts(activity, len(activity.behaviours) // 2))]

    def __len__(self) -> int:
        return len(self._histories)

    def batch(self, rows: Sequence[int], mine: Sequence[int]) -> ViewBatch:
        """Cuts some histories anew, each at a random place; every process draws the same places for all."""
        cut = [int(self.rng.integers(2, len(self._histories[row].behaviours) - 1)) for row in rows]
        parts = [self._parts(self._histories[rows[place]], cut[place]) for place in mine]
        newer, older = (self._read([part[side] for part in parts]) for side in (0, 1))
        return ViewBatch(newer, older, mine, len(rows))

    def _parts(self, activity: Activity, place: int) -> tuple[str, str]:
        """Returns the texts of a history's newer and older part; empty ones where it is too short."""
        behaviours, limit = activity.behaviours, self.config.behaviour_limit
        if len(behaviours) < _MIN_BEHAVIOURS:
            return "", ""
        newer, older = Activity(activity.version, behaviours[:place]), Activity(activity.version, behaviours[place:])
        return behaviour_text(newer, self._table.title_of, limit=limit), behaviour_text(older, self._table.title_of, limit=limit)

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens: Tokens = tokenize(self._tokenizer, texts, self.config.user_tokens)
        return tokens.pad(range(len(texts)))
