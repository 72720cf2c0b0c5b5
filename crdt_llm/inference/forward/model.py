"""What computes rows for the engine, and which of our two ways of it a model gets.

Owns the contract between the engine and a model, and the choice: a Llama on the CPU has a forward
step of our own (:mod:`~crdt_llm.inference.forward.llama`), with weights in int8 or bf16 and results
that are exact; every other model, and every other device, is computed by transformers
(:mod:`~crdt_llm.inference.forward.transformers_model`). It knows no arithmetic and no requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import torch

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.forward.llama import Llama, is_of_the_family
from crdt_llm.inference.forward.weights import FLOAT32
from crdt_llm.inference.kv.pool import HOST

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from crdt_llm.inference.kv.pool import Chunk, KvPool

CPU: Final = "cpu"


class Model(Protocol):
    """A model, ready to run.

    The KV and the hidden state of a row go into a pool, and all that later rows and logits need is
    read from there: a model keeps nothing of a text itself.
    """

    @property
    def fingerprint(self) -> str:
        """A digest of what its numbers depend on, 32 hexadecimal digits."""
        ...

    @property
    def exactness(self) -> int:
        """What its numbers promise: see :class:`~crdt_llm.inference.contract.Capabilities`."""
        ...

    @property
    def weight_format(self) -> str:
        """How the weights are held, e.g. ``int8``."""
        ...

    @property
    def positions(self) -> int:
        """How many tokens a path may have."""
        ...

    @property
    def vocabulary(self) -> int:
        """Ids are in ``[0, vocabulary)``, and so many logits does a row have."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Memory that a tile of KV takes."""
        ...

    def new_pool(self, memory_bytes: int) -> KvPool:
        """A pool of as many slots as fit the memory, where the model computes.

        Raises:
            ModelUnusable: not even two slots fit.
        """
        ...

    def forward(self, ids: Tensor, chunks: Sequence[Chunk], pool: KvPool) -> None:
        """Compute the rows of one or more chunks, each into the last of its slots.

        Args:
            ids: int64 on the host, as many as the chunks have rows, in their order.
            chunks: where the rows stand; no two of them in one slot. One that goes on where another
                one fills its tile stands behind it.
            pool: where the KV before them is, and theirs goes.
        """
        ...

    def logits(self, pool: KvPool, places: Sequence[tuple[int, int]]) -> Tensor:
        """The logits that follow resident rows.

        Args:
            pool: where the rows are.
            places: of each, its slot and its row there.

        Returns:
            float32 on the host, ``(places, vocabulary)``.
        """
        ...


def load_model(folder: Path, weight_format: str | None = None, device: str = CPU) -> Model:
    """Load a model the way that suits it and the device.

    Args:
        folder: of the model.
        weight_format: how the weights are to be held; None is the default of the way that is taken.
        device: where to compute, in torch's words: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        ModelUnusable: the model or the device cannot be used, and why.
    """
    place = find_device(device)
    if has_own_step(folder, weight_format, place):
        return Llama(folder) if weight_format is None else Llama(folder, weight_format)
    # It loads transformers, which takes seconds that a Llama on the CPU does not need.
    from crdt_llm.inference.forward.transformers_model import TransformersModel  # noqa: PLC0415 - as above

    return TransformersModel(folder, weight_format, place)


def has_own_step(folder: Path, weight_format: str | None, device: torch.device) -> bool:
    """Whether a model is one that we compute ourselves on this device, with such weights.

    Raises:
        ModelUnusable: the folder's configuration is missing or damaged.
    """
    ours = device.type == HOST.type and weight_format != FLOAT32
    return ours and is_of_the_family(folder)


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ModelUnusable: there is none here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).to(HOST)
    # Each kind of device that is not there says so in another way.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = [CPU, *_accelerators()]
        message = f"there is no device {name} here: --device takes {', '.join(there)}"
        raise ModelUnusable(message) from error
    return device


def _accelerators() -> list[str]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return []
    return [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
