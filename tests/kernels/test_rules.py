"""What a rule's text may be, and that every rule says what its hyperparameters and states may be."""

from __future__ import annotations

from typing import Any

import pytest

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.rules.rule import FRACTION, FREE, NOT_NEGATIVE, State, define

TEXT = """
scalars:
    rest = 1 - beta1
direction:
    if heavy:
        m = m * m_scale + rest * g  # a comment
        update = m
    else:
        update = g
norms of p, update:
    trusted = lr * ratio(p_norm, update_norm)
finish:
    p = p - trusted * update
"""
HYPER = {"lr": NOT_NEGATIVE, "beta1": FRACTION, "start": FREE}


def made(text: str = TEXT, names: Any = None, states: tuple[State, ...] = (State("m"),)) -> list[rules.Rule]:
    return define(names or {"light": "", "heavy": "heavy"}, text, hyper=HYPER, states=states)


def test_variants_have_the_lines_the_hyperparameters_and_the_states_that_they_use() -> None:
    light, heavy = made()
    assert heavy.direction == "m = m * m_scale + rest * g\nupdate = m\n"
    assert (light.direction, light.states) == ("update = g\n", ())
    assert heavy.hyper == ("lr", "beta1")
    assert heavy.states == (State("m"),)
    assert heavy.norms == ("p", "update")
    assert heavy.elementwise_scalars == ("rest", "trusted")
    assert list(heavy.bounds) == [*HYPER]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("m * m_scale", "m", "multiplied by m_scale"),
        ("m = m * m_scale + rest * g", "update = m * m_scale", "must assign m"),
        ("rest * g", "2 * g", "make it a scalar"),
        ("if heavy", "if heavily", "other conditions"),
        ("scalars:", "scalar:", "text before the sections"),
    ],
)
def test_texts_that_forget_a_scale_hold_a_number_or_say_something_else_are_refused(
    old: str, new: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(TEXT.replace(old, new))


def test_states_that_no_line_uses_are_refused() -> None:
    with pytest.raises(ValueError, match="a state that no line uses"):
        made(states=(State("m"), State("v")))


def test_every_hyperparameter_has_bounds() -> None:
    for rule in rules.RULES.values():
        assert set(rule.hyper) <= set(rule.bounds), rule.name
        assert rule.hyper[0] == "lr", rule.name  # ``StepArguments.lr`` replaces the first one
        assert all(rule.bounds[name] is FRACTION for name in rule.hyper if name.startswith("beta")), rule.name


def test_bounds_refuse_nan() -> None:
    assert not any(bound.allows(float("nan")) for bound in (FREE, NOT_NEGATIVE, FRACTION))
