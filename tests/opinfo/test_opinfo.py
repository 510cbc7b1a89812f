"""Every operator and module that torch tests itself with, compiled on the reference engine; on a
GPU the operators again, as kernels.

A seeded sample of them; all under ``--slow``, or as many as ``--limit`` seconds allow of a
``--share`` ("1/2") in the order of ``--seed``. What may differ stands in `exceptions`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest

pytest.importorskip("expecttest")  # torch.testing._internal needs it

Check = Callable[[list[str], Callable[[str], list[str]]], None]
Shared = Callable[[Iterable[str]], list[str]]

PARTS = 32
SAMPLED = 16

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, about what its samples do


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def _operator(name: str, device: str = "cpu") -> list[str]:
    from tests.opinfo.operators import forward_and_backward, other_dtypes

    return [*forward_and_backward(name, device), *other_dtypes(name, device)]


def _module(name: str) -> list[str]:
    from tests.opinfo.modules import forward_and_backward

    return [p for train in (True, False) for p in forward_and_backward(name, train)]


def _sampled(names: Iterable[str], count: int, part: int, parts: int) -> list[str]:
    return random.Random(0).sample(sorted(names), count)[part::parts]


@pytest.mark.parametrize("part", range(4))
def test_some_operators(part: int, check: Check) -> None:
    from tests.opinfo.operators import OPERATORS

    check(_sampled(OPERATORS, SAMPLED, part, 4), _operator)


@pytest.mark.parametrize("part", range(2))
def test_some_modules(part: int, check: Check) -> None:
    from tests.opinfo.modules import MODULES

    check(_sampled(MODULES, SAMPLED // 3, part, 2), _module)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_all_operators(part: int, check: Check, shared: Shared) -> None:
    from tests.opinfo.operators import OPERATORS

    check(shared(OPERATORS)[part::PARTS], _operator)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4 * PARTS))
def test_all_operators_on_a_gpu(part: int, check: Check, shared: Shared) -> None:
    from tests.opinfo.operators import OPERATORS

    check(shared(OPERATORS)[part :: 4 * PARTS], partial(_operator, device="cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS // 4))
def test_all_modules(part: int, check: Check, shared: Shared) -> None:
    from tests.opinfo.modules import MODULES

    check(shared(MODULES)[part :: PARTS // 4], _module)
