"""What an operator may choose of the engine that a command starts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

CPU: Final = "cpu"


class WeightFormat(StrEnum):
    """How the weights of the model are held."""

    INT8 = "int8"
    BF16 = "bf16"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Of one engine.

    Args:
        kv_memory_bytes: the most memory that KV may take; the engine's default if None.
        weights: how they are held; what suits the model and the device if None.
        device: where it computes, in torch's words.
    """

    kv_memory_bytes: int | None = None
    weights: WeightFormat | None = None
    device: str = CPU

    @classmethod
    def chosen(
        cls, kv_memory_mib: int | None, weights: WeightFormat | None, device: str
    ) -> EngineOptions:
        """As the options of a command say."""
        return cls(None if kv_memory_mib is None else kv_memory_mib << 20, weights, device)


DEFAULTS = EngineOptions()
