"""Feast's own messages and key encoding, without the rest of Feast.

``import feast`` brings pandas, Dask, PyArrow and, where it is installed, torch: 6 s of processor time and 250 MB in every server
process, of which answering needs the generated messages and one function. They are imported past ``feast/__init__.py``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType


@contextmanager
def _past_its_init() -> Iterator[None]:
    """Lets modules below ``feast`` be imported alone; whoever imports ``feast`` itself, before or after, gets the real one."""
    spec = find_spec("feast")
    if "feast" in sys.modules or spec is None:
        yield
        return
    stand_in = ModuleType("feast")
    stand_in.__path__ = spec.submodule_search_locations or []
    sys.modules["feast"] = stand_in
    try:
        yield
    finally:
        del sys.modules["feast"]


with _past_its_init():
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.core.FeatureService_pb2 import FeatureService
    from feast.protos.feast.core.FeatureView_pb2 import FeatureView
    from feast.protos.feast.core.Project_pb2 import Project
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value, ValueType

__all__ = ["EntityKey", "FeatureService", "FeatureView", "Project", "Value", "ValueType", "serialize_entity_key"]
