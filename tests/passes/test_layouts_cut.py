"""The cheapest labelling against all there are."""

from __future__ import annotations

import itertools
import random

import pytest

from iocompiler.passes.layouts.cut import Copy, Labelling


def drawn(seed: int) -> tuple[Labelling, list[str]]:
    """A few values, a third of them with a given label, and prices of every kind."""
    dice = random.Random(seed)
    values = [f"v{i}" for i in range(dice.randint(1, 8))]
    problem = Labelling(fixed={v: dice.random() < 0.5 for v in values if dice.random() < 0.3})
    for value in values:
        for label in (False, True):
            problem.charge(value, label, dice.randint(0, 9))
    for _ in range(dice.randint(0, 10)):
        source, *readers = dice.sample(values, dice.randint(1, len(values)))
        wants = tuple((r, dice.choice([None, 1, 2, 5])) for r in readers)
        problem.copies.append(Copy(source, dice.random() < 0.5, dice.randint(0, 12), wants))
    return problem, values


@pytest.mark.parametrize("seed", range(120))
def test_no_labelling_costs_less(seed: int) -> None:
    problem, values = drawn(seed)
    found = problem.cheapest()
    assert set(found) == set(values)
    assert all(found[value] == label for value, label in problem.fixed.items())
    every = (
        dict(zip(values, labels, strict=True))
        for labels in itertools.product([False, True], repeat=len(values))
    )
    allowed = (e for e in every if all(e[v] == label for v, label in problem.fixed.items()))
    assert problem.price(found) == min(map(problem.price, allowed))


def test_a_copy_is_made_once_for_all_who_need_it() -> None:
    problem = Labelling(fixed={"x": False, "a": True, "b": True})
    problem.copies.append(Copy("x", True, 7, (("a", None), ("b", None))))
    assert problem.price(problem.cheapest()) == 7


def test_readers_do_without_where_that_is_cheaper() -> None:
    problem = Labelling(fixed={"x": False, "a": True, "b": True})
    problem.copies.append(Copy("x", True, 7, (("a", 2), ("b", 3))))
    assert problem.price(problem.cheapest()) == 5
    problem.copies[0] = Copy("x", True, 4, (("a", 2), ("b", 3)))
    assert problem.price(problem.cheapest()) == 4


def test_one_who_needs_the_copy_lets_all_have_it() -> None:
    problem = Labelling(fixed={"x": False, "a": True, "b": True})
    problem.copies.append(Copy("x", True, 7, (("a", 6), ("b", None))))
    assert problem.price(problem.cheapest()) == 7


def test_ties_stay_false() -> None:
    problem = Labelling()
    problem.charge("x", False, 3)
    problem.charge("x", True, 3)
    assert problem.cheapest() == {"x": False}


def test_charges_of_one_value_add_up() -> None:
    problem = Labelling()
    for price in (1, 2):
        problem.charge("x", False, price)
    assert problem.price({"x": False}) == 3
    assert problem.price({"x": True}) == 0
    assert problem.cheapest() == {"x": True}


def test_a_chain_turns_where_turning_is_cheapest() -> None:
    """x -> a -> b -> c: the last wants True, the first is False, between b and c it costs least."""
    problem = Labelling(fixed={"x": False, "c": True})
    for source, reader, price in (("x", "a", 5), ("a", "b", 4), ("b", "c", 2)):
        for label in (False, True):
            problem.copies.append(Copy(source, label, price, ((reader, None),)))
    assert problem.cheapest() == {"x": False, "a": False, "b": False, "c": True}
