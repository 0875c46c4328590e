"""What `pns tiny make` is told: the keys of a supervised start on the tiny world."""

from dataclasses import dataclass
from enum import StrEnum

from pns.config import Optimizer, Schedule
from pns.errors import UserError
from pns.fields import at_least, between, check_ranges, key, path_or_name, section, up_to

TinyTask = StrEnum(
    "TinyTask", ["solve", "judge", "step_judge", "process_reward", "outcome_reward", "deep_judge"]
)
Architecture = StrEnum("Architecture", ["qwen2", "llama", "qwen3"])


@dataclass
class WarmStart:
    """Supervised training of a tiny backbone, or of a model that grades, on the tiny world."""

    seed: int = key(0, "of everything that is drawn", between(0, 2**32 - 1))
    task: TinyTask = key(
        TinyTask.solve,
        "solve: solutions of problems; judge: the checker's rubric; step_judge, process_reward: its word on "
        "each step; outcome_reward: its word on the whole",
    )
    architecture: Architecture = key(Architecture.qwen2, "model family of a backbone")
    steps: int = key(1700, "training steps", at_least(1))
    hidden_size: int = key(128, "width of the residual stream", at_least(1))
    layers: int = key(4, "transformer blocks; outcome_reward: the solver's and more", at_least(1))
    heads: int = key(4, "attention heads of a block", at_least(1))
    key_value_heads: int = key(2, "heads of keys and values that the attention heads share", at_least(1))
    feed_forward_size: int = key(384, "width of the feed-forward parts", at_least(1))
    init_std: float = key(0.06, "standard deviation of the initial weights", up_to(1))
    tie_embeddings: bool = key(True, "the head is the embedding")
    batch_size: int = key(32, "rows of one step", at_least(1))
    curriculum_steps: int = key(500, "steps on short problems alone, before all come; 0: none", at_least(0))
    checkpoint_every: int = key(500, "steps between checkpoints", at_least(1))
    samples_from: str = path_or_name(
        "",
        "all but solve: the model whose samples are graded beside made-up errors, and that training starts "
        "from without starts_from",
    )
    starts_from: str = path_or_name(
        "", "the model whose training goes on; empty: an untrained one (solve), or samples_from"
    )
    misconceptions: dict[str, float] = key(
        {},
        "solve: relation (fewer, times, half) -> share of its steps that demonstrations add instead",
        between(0, 1),
    )
    slips: float = key(0.0, "solve: share of steps that demonstrations miscalculate", between(0, 1))
    misreadings: float = key(
        0.0, "solve: share of steps in which they take another person's number", between(0, 1)
    )
    optimizer: Optimizer = section(
        lambda: Optimizer(
            learning_rate=2e-3, warmup_steps=50, schedule=Schedule.cosine, weight_decay=0.01, beta2=0.98
        )
    )


def check_settings(settings: WarmStart) -> None:
    """Raises UserError for a number outside its range, heads that do not divide, and a judge from nothing."""
    check_ranges(settings)
    heads, head_size = settings.heads, settings.hidden_size // settings.heads
    if settings.hidden_size % heads or head_size % 2:
        fault = f"{settings.hidden_size} must be an even multiple of heads, {heads} (rotary)"
        raise UserError(f"hidden_size: {fault}")
    if heads % settings.key_value_heads:
        raise UserError(f"heads: {heads} must be a multiple of key_value_heads, {settings.key_value_heads}")
    if unknown := settings.misconceptions.keys() - {"fewer", "times", "half"}:
        raise UserError(f"misconceptions.{min(unknown)}: the relations are fewer, times and half")
    if settings.task is not TinyTask.solve and not settings.samples_from:
        raise UserError(f"samples_from is empty: name the model whose samples {settings.task} learns from")
