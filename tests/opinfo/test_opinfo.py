"""Every operator and module that torch tests itself with, compiled on the reference engine; on a
GPU the operators again, as kernels.

A seeded sample of them; all under ``--slow``. What may differ stands in `exceptions`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("expecttest")  # torch.testing._internal needs it

PARTS = 32
SAMPLED = 16

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, about what its samples do


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def _operators(names: Sequence[str], device: str = "cpu") -> list[str]:
    from tests.opinfo.operators import forward_and_backward, other_dtypes

    return [
        problem
        for name in names
        for find in (forward_and_backward, other_dtypes)
        for problem in find(name, device)
    ]


def _modules(names: Sequence[str]) -> list[str]:
    from tests.opinfo.modules import forward_and_backward

    return [
        p for name in names for train in (True, False) for p in forward_and_backward(name, train)
    ]


def _sampled(names: Sequence[str], count: int, part: int, parts: int) -> list[str]:
    return random.Random(0).sample(sorted(names), count)[part::parts]


@pytest.mark.parametrize("part", range(4))
def test_some_operators(part: int) -> None:
    from tests.opinfo.operators import OPERATORS

    found = _operators(_sampled(list(OPERATORS), SAMPLED, part, 4))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("part", range(2))
def test_some_modules(part: int) -> None:
    from tests.opinfo.modules import MODULES

    found = _modules(_sampled(list(MODULES), SAMPLED // 3, part, 2))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_all_operators(part: int) -> None:
    from tests.opinfo.operators import OPERATORS

    found = _operators(list(OPERATORS)[part::PARTS])
    assert not found, "\n".join(found)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4 * PARTS))
def test_all_operators_on_a_gpu(part: int) -> None:
    from tests.opinfo.operators import OPERATORS

    found = _operators(list(OPERATORS)[part :: 4 * PARTS], "cuda")
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS // 4))
def test_all_modules(part: int) -> None:
    from tests.opinfo.modules import MODULES

    found = _modules(list(MODULES)[part :: PARTS // 4])
    assert not found, "\n".join(found)
