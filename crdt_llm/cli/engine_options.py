"""What an operator may choose of the engine that a command starts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WeightFormat(StrEnum):
    """How the weights of the model are held."""

    INT8 = "int8"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Of one engine.

    Args:
        kv_memory_bytes: the most memory that KV may take; the engine's default if None.
        weights: how they are held.
    """

    kv_memory_bytes: int | None = None
    weights: WeightFormat = WeightFormat.INT8

    @classmethod
    def chosen(cls, kv_memory_mib: int | None, weights: WeightFormat) -> EngineOptions:
        """As the options of a command say."""
        return cls(None if kv_memory_mib is None else kv_memory_mib << 20, weights)


DEFAULTS = EngineOptions()
