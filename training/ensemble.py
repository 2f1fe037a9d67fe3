"""Several towers averaged into one model."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.model import Tower, TwoTower


class Ensemble(Tower):
    """n towers side by side: unit vectors laid end to end and divided by √n, so that a product of vectors is the mean cosine."""

    def __init__(self, towers: Sequence[TwoTower]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)
        self._sizes = [tower.vector_size for tower in towers]

    @property
    def members(self) -> list[TwoTower]:
        """The towers."""
        return [tower for tower in self.towers if isinstance(tower, TwoTower)]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.members[0].device

    @property
    def vector_size(self) -> int:
        """Components of a vector: all members' together."""
        return sum(self._sizes)

    def pool(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns float32[b, h], the members' pooled outputs end to end."""
        return torch.cat([tower.pool(ids, mask) for tower in self.members], dim=-1)

    def user_vector(self, pooled: Tensor) -> Tensor:
        """Returns unit user vectors, float32[b, d]."""
        return self._join([tower.user_vector(part) for tower, part in self._parts(pooled)])

    def item_vector(self, pooled: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns unit item vectors, float32[b, d]; without ``rows`` those of items never seen."""
        return self._join([tower.item_vector(part, rows) for tower, part in self._parts(pooled)])

    def logits_user(self, pooled: Tensor) -> Tensor:
        """Returns user vectors float32[b, d] whose product with the item vectors is the mean of the members' logits."""
        scaled = [tower.user_vector(part) / tower.temperature for tower, part in self._parts(pooled)]
        return self._join(scaled)

    def _parts(self, pooled: Tensor) -> list[tuple[TwoTower, Tensor]]:
        return list(zip(self.members, torch.split(pooled, self._sizes, dim=-1), strict=True))

    def _join(self, vectors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(vectors), dim=-1) / math.sqrt(len(vectors))
