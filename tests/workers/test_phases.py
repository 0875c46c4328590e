"""Turns of two roles, by what they are told to do."""

from __future__ import annotations

import pytest

from workers.phases import Phases


def two_roles() -> tuple[Phases, list[str]]:
    phases, told = Phases(), list[str]()
    for role in ("rollout", "policy"):
        phases.add(
            role,
            lambda role=role: told.append(f"{role} leaves"),  # type: ignore[misc]
            lambda role=role: told.append(f"{role} comes"),  # type: ignore[misc]
        )
    return phases, told


def test_a_role_comes_when_the_other_one_has_left() -> None:
    phases, told = two_roles()
    for role in ("policy", "policy", "rollout", "policy"):
        with phases.turn(role), phases.turn(role):  # a call may use another one of its role
            told.append(f"{role} works")
    assert told == [
        *("policy comes", "policy works", "policy works"),
        *("policy leaves", "rollout comes", "rollout works"),
        *("rollout leaves", "policy comes", "policy works"),
    ]


def test_the_work_of_two_roles_does_not_overlap() -> None:
    phases, told = two_roles()
    with phases.turn("rollout"):
        message = (
            r"policy was asked for while rollout works on the same GPUs: .* \(placement\.colocate=\[\]\)"
        )
        with pytest.raises(RuntimeError, match=message), phases.turn("policy"):
            pass
        assert told == ["rollout comes"]
    with phases.turn("policy"):
        assert told[1:] == ["rollout leaves", "policy comes"]


def test_a_role_that_cannot_come_is_not_there() -> None:
    phases, told = two_roles()

    def fail() -> None:
        raise TimeoutError("no memory")

    phases.add("policy", lambda: told.append("policy leaves"), fail)
    with phases.turn("rollout"):
        pass
    with pytest.raises(TimeoutError), phases.turn("policy"):
        pass
    with phases.turn("rollout"):
        assert told == ["rollout comes", "rollout leaves", "rollout comes"]
