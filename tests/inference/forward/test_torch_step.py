"""What a layer does between its products treats each row alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from crdt_llm.inference.forward import torch_step

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [32, 96, 1600, 40000])
def test_the_gate_of_a_row_is_one_value_in_any_company(threads: int, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    gates = torch.randn(64, 2 * width, generator=generator) * 4
    torch.set_num_threads(1)
    alone = torch.cat([torch_step._gated(gates[row : row + 1]) for row in range(64)])
    torch.set_num_threads(threads)
    for rows in (1, 3, 16, 64):
        assert torch.equal(torch_step._gated(gates[:rows]), alone[:rows])


def test_the_gate_is_silu_times_up() -> None:
    gates = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).double()
    expected = gates[:, :32] * torch.sigmoid(gates[:, :32]) * gates[:, 32:]
    assert torch.allclose(torch_step._gated(gates.float()).double(), expected, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [33, 64, 576, 4096, 8192])
def test_the_norm_of_a_row_is_one_value_in_any_company(threads: int, width: int) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(64, width, generator=generator) * 3
    gain = torch.randn(width, generator=generator)
    torch.set_num_threads(1)
    alone = [torch_step._normed(rows[row : row + 1], gain, 1e-5) for row in range(64)]
    torch.set_num_threads(threads)
    for count in (1, 3, 16, 64):
        together = torch_step._normed(rows[:count], gain, 1e-5)
        assert torch.equal(together.scale, torch.cat([row.scale for row in alone[:count]]))
        planes = [row.planes[index] for index in (0, 1) for row in alone[:count]]
        assert torch.equal(together.planes, torch.stack(planes))
