"""Seeded cases for every method: the contract's own descriptors say what a message may hold, so new methods are met by themselves."""

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

KINDS = ("random", "mutated", "extreme", "plausible")
# Out of a hundred cases: most are nearly right, because those get furthest into the server.
_SHARES = (15, 40, 30, 15)
_INTEGERS = (0, 1, -1, 2, 7, 100, 101, 127, 128, 255, 2**31 - 1, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, -(2**63))
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 5e-324, 1.7e308, -1.7e308, 9e12, 1e13, float("nan"), float("inf"), float("-inf"), 0.1)
_PLAIN = ("mug", "linen towel", "blue", "Where is my order?", "绿茶")
_TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "'; DROP TABLE users; --",
    '"><script>alert(1)</script>',
    "%s%n{}{0}$(id)`id`",
    "../../../../etc/passwd",
    "\u202eevil\u202c",
    "\ufeff\u200b\u00ad",
    "𝕬𝖓𝖓𝖆 一致 🛒",
    "null",
    "NaN",
    "-1",
    "\r\nX-Injected: 1",
    "\\x00\\",
    "a" * 127,
    "a" * 128,
    "a" * 129,
    "ß" * 256,
    "z" * 257,
    "x" * 1_025,
    "y" * 10_001,
    "c1.",
    "c1.MTp1MQ",
)


@dataclass(frozen=True)
class Case:
    """Bytes for a method, and how they came about."""

    method: str
    streaming: bool
    kind: str
    payloads: tuple[bytes, ...]


@dataclass(frozen=True)
class Words:
    """What a channel backend of the shop would send, by the name of the field."""

    by_name: dict[str, Sequence[Any]] = field(default_factory=dict)


def methods(modules: Sequence[Any]) -> list[MethodDescriptor]:
    """Returns every method of the services in generated modules, in a stable order."""
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    return sorted((method for service in services for method in service.methods), key=lambda method: method.full_name)


def path_of(method: MethodDescriptor) -> str:
    """Returns what a client calls the method by."""
    return f"/{method.containing_service.full_name}/{method.name}"


def cases(targets: Sequence[MethodDescriptor], words: Words, *, seed: int, count: int) -> Iterator[Case]:
    """Yields ``count`` cases, taking the methods in turn; equal seeds and words give equal cases."""
    rng = random.Random(seed)
    for number in range(count):
        method = targets[number % len(targets)]
        kind = rng.choices(KINDS, _SHARES)[0]
        length = rng.randint(1, 3) if method.client_streaming else 1
        payloads = tuple(_payload(kind, method.input_type, words, rng) for _ in range(length))
        yield Case(path_of(method), bool(method.client_streaming), kind, payloads)


def _payload(kind: str, descriptor: Descriptor, words: Words, rng: random.Random) -> bytes:
    if kind == "random":
        return rng.randbytes(rng.choice((0, 1, 2, 5, 17, 64, 300, 2_000)))
    wild = {"mutated": 0.0, "extreme": rng.choice((0.02, 0.1, 0.5)), "plausible": 0.0}[kind]
    data = message(descriptor, words, rng, wild=wild).SerializeToString()
    return mutated(data, rng) if kind == "mutated" else data


def message(descriptor: Descriptor, words: Words, rng: random.Random, *, wild: float, depth: int = 0) -> Message:
    """Returns a message with plausible values; each one is replaced by an extreme one with the probability ``wild``."""
    made: Any = GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Timestamp":
        made.seconds = rng.choice(_INTEGERS) if rng.random() < wild else 1_700_000_000 + rng.randrange(10**6)
        made.nanos = rng.choice((0, 999_999_999)) if rng.random() >= wild else rng.choice((-1, 10**9, 2**31 - 1))
        return made  # type: ignore[no-any-return]
    for entry in descriptor.fields:
        # Some fields are left out; of a oneof the last one set wins. Nothing recurses in the contract today; five deep is enough.
        if depth > 5 or rng.random() < 0.06:
            continue
        _fill(made, entry, words, rng, wild=wild, depth=depth)
    return made  # type: ignore[no-any-return]


def _fill(made: Any, entry: FieldDescriptor, words: Words, rng: random.Random, *, wild: float, depth: int) -> None:
    if entry.message_type is not None and entry.message_type.GetOptions().map_entry:
        for _ in range(rng.choice((1, 3, 51 if rng.random() < wild else 2))):
            getattr(made, entry.name)[_text(rng, wild)] = _text(rng, wild)
    elif entry.is_repeated:
        many = rng.choice((501, 1_001)) if rng.random() < wild * 0.02 else rng.randint(1, 4)
        target = getattr(made, entry.name)
        for _ in range(many):
            if entry.message_type is not None:
                target.append(message(entry.message_type, words, rng, wild=wild, depth=depth + 1))
            else:
                value = _scalar(entry, words, rng, wild=wild)
                if value not in target or rng.random() < wild:
                    target.append(value)
    elif entry.message_type is not None:
        getattr(made, entry.name).CopyFrom(message(entry.message_type, words, rng, wild=wild, depth=depth + 1))
    else:
        setattr(made, entry.name, _scalar(entry, words, rng, wild=wild))


def _scalar(entry: FieldDescriptor, words: Words, rng: random.Random, *, wild: float) -> Any:
    known = words.by_name.get(entry.name)
    if known and rng.random() >= wild:
        return rng.choice(known)
    kind = entry.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = _text(rng, wild)
        return text.encode() if entry.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return rng.choice(_DOUBLES) if rng.random() < wild else round(rng.uniform(0, 100), 2)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        # Open enums: a number nobody has named yet reaches the server as it is.
        return rng.choice((-1, 99, 2**31 - 1)) if rng.random() < wild else rng.choice(entry.enum_type.values[rng.random() < 0.9 :]).number
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    unsigned = kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
    least, most = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    value = rng.choice(_INTEGERS) if rng.random() < wild else rng.randint(0, 20)
    return min(max(value, least), most)


def _text(rng: random.Random, wild: float) -> str:
    return rng.choice(_TEXTS if rng.random() < wild else _PLAIN)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Returns ``data`` damaged a few times: bits, bytes, lengths, pieces cut out, doubled or put elsewhere."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(7):
            case 0 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4 if changed:
                end = min(len(changed), at + rng.randint(1, 16))
                changed[end:end] = changed[at:end]
            case 5:
                changed[at:at] = struct.pack("<I", rng.choice((0, 0x7FFFFFFF, 0xFFFFFFFF)))
            case _ if changed:
                del changed[at : at + rng.randint(1, 4)]
    return bytes(changed)
