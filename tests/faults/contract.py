"""Every unary method of the contract, found by its descriptors, so that a new one is tested without being named."""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import concord.v1


@dataclass(frozen=True)
class Method:
    """A method's path and the class of its request."""

    path: str
    request: Any
    streaming: bool


def methods() -> list[Method]:
    """Returns all methods of all services, in the order of their names."""
    found = []
    for module in pkgutil.iter_modules(concord.v1.__path__):
        if not module.name.endswith("_pb2"):
            continue
        file = importlib.import_module(f"concord.v1.{module.name}")
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                request = getattr(importlib.import_module(_module_of(method.input_type)), method.input_type.name)
                found.append(Method(f"/{service.full_name}/{method.name}", request, method.client_streaming))
    return sorted(found, key=lambda method: method.path)


def unary() -> list[Method]:
    """Returns the methods that take one message."""
    return [method for method in methods() if not method.streaming]


def _module_of(message: Any) -> str:
    return str(message.file.name).removesuffix(".proto").replace("/", ".") + "_pb2"
