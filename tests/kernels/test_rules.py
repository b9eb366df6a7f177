"""What a rule's text may be, and that every rule says what its hyperparameters and states may be."""

from __future__ import annotations

import pytest

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.rules.rule import Rule, State, define

TEXT = """
hyper: lr >= 0, 0 <= beta1 < 1, start
states: m, v >= 0
scalars:
    rest = 1 - beta1
direction:
    if heavy:
        m = m * m_scale + rest * g  # a comment
        v = v * v_scale
        update = m
    else:
        update = g
norms of p, update:
    trusted = lr * ratio(p_norm, update_norm)
finish:
    p = p - trusted * update
"""


def made(text: str = TEXT) -> list[Rule]:
    return define({"light": "", "heavy": "heavy"}, text)


def test_variants_have_the_lines_the_hyperparameters_and_the_states_that_they_use() -> None:
    light, heavy = made()
    assert heavy.sections["direction"] == "m = m * m_scale + rest * g\nv = v * v_scale\nupdate = m\n"
    assert (light.sections["direction"], light.states) == ("update = g\n", ())
    assert heavy.hyper == ("lr", "beta1")
    assert heavy.states == (State("m"), State("v", non_negative=True))
    assert heavy.norms == ("p", "update")
    assert heavy.elementwise_scalars == ("rest", "trusted")
    assert [(name, bound.words) for name, bound in heavy.bounds.items()] == [
        ("lr", "0 or more"),
        ("beta1", "in [0, 1)"),
        ("start", "a number"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("m * m_scale", "m", "multiplied by m_scale"),
        ("m = m * m_scale + rest * g", "update = m * m_scale", "must assign m"),
        ("rest * g", "2 * g", "make it a scalar"),
        ("if heavy", "if heavily", "conditions {'heavily'}"),
        ("scalars:", "scalar:", "sections .'scalar'"),
        ("states: m,", "states: m, w,", "a state that no line uses"),
        ("beta1 < 1", "beta1 <= 1", "must have one of the forms"),
    ],
)
def test_texts_that_forget_a_scale_hold_a_number_or_say_something_else_are_refused(
    old: str, new: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(TEXT.replace(old, new))


def test_every_hyperparameter_has_bounds() -> None:
    for rule in rules.RULES.values():
        assert set(rule.hyper) <= set(rule.bounds), rule.name
        assert rule.hyper[0] == "lr", rule.name  # ``StepArguments.lr`` replaces the first one
        assert all(rule.bounds[name].words == "in [0, 1)" for name in rule.hyper if name.startswith("beta")), rule.name


def test_bounds_refuse_nan() -> None:
    assert not any(bound.allows(float("nan")) for rule in rules.RULES.values() for bound in rule.bounds.values())
