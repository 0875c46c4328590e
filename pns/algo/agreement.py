"""How well labels of steps agree: two annotators with each other, and labels with exact ones."""

from collections.abc import Sequence

from pns.config import StepRule


def consensus(judge: bool | None, process_reward: float | None, rule: StepRule, threshold: float) -> bool:
    """Whether a step counts as correct: by the judge's word, by the process reward model's probability from
    `threshold` on, by both or by either. Raises ValueError where `rule` reads what there is not."""
    by_model = None if process_reward is None else process_reward >= threshold
    asked = {
        StepRule.judge: (judge,),
        StepRule.process_reward: (by_model,),
        StepRule.both: (judge, by_model),
        StepRule.either: (judge, by_model),
    }[rule]
    if None in asked:
        raise ValueError(f"the rule {rule} reads a label that is missing")
    return any(asked) if rule is StepRule.either else all(asked)


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement beyond chance, `(p_o - p_e) / (1 - p_e)` with p_e from both marginals (Cohen 1960): 1 is
    perfect, 0 what chance gives. None without labels, and where both give one and the same label
    throughout, which tells nothing."""
    if not first:
        return None
    share_first, share_second = (sum(labels) / len(labels) for labels in (first, second))
    by_chance = share_first * share_second + (1 - share_first) * (1 - share_second)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else None


def agreement(judge: Sequence[bool], process_reward: Sequence[bool]) -> dict[str, float | None]:
    """Of the two annotators, step by step: the share of equal labels, Cohen's kappa, and the share of steps
    that each calls correct."""
    num = len(judge)
    equal = sum(a == b for a, b in zip(judge, process_reward, strict=True))
    return {
        "agreement": equal / num if num else None,
        "kappa": cohens_kappa(judge, process_reward),
        "judge_correct": sum(judge) / num if num else None,
        "process_reward_correct": sum(process_reward) / num if num else None,
    }


def label_quality(labels: Sequence[bool], exact: Sequence[bool]) -> dict[str, float | None]:
    """Of labels against exact ones: accuracy; precision, recall and F1 of what is correct; Cohen's kappa.
    None where a share is of nothing."""
    num_right = sum(a and b for a, b in zip(labels, exact, strict=True))
    num_equal = sum(a == b for a, b in zip(labels, exact, strict=True))
    num_said, num_exact = sum(labels), sum(exact)
    return {
        "accuracy": num_equal / len(exact) if exact else None,
        "precision": num_right / num_said if num_said else None,
        "recall": num_right / num_exact if num_exact else None,
        "f1": 2 * num_right / (num_said + num_exact) if num_said + num_exact else None,
        "kappa": cohens_kappa(labels, exact),
    }
