"""The sample shop: a generated shop to try, test and demonstrate with; its parts depend on nothing but a seed."""

from features.sample_shop.files import write
from features.sample_shop.generate import generate
from features.sample_shop.shop import Event, Identity, Shop, Utterance

__all__ = ["Event", "Identity", "Shop", "Utterance", "generate", "write"]
