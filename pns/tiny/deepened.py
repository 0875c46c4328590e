"""Models of the tiny world that grade, on top of a solver.

A solver knows what it expects of the next token in its last block only, and a grader has to compare that with
what came. So blocks are added on top of a solver that stays as it is. The first of them compares: its
attention brings every token the solver's expectation of it, and its feed-forward part is fitted to the
log-probability that the token had. Then the added blocks learn to grade, from token to token.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pns.errors import UserError
from pns.stages.context import Context, draw
from pns.stages.stream import stable_seed
from pns.tiny import world
from pns.tiny.settings import WarmStart
from pns.tiny.step_judge import step_candidates
from pns.tiny.warm_start import Candidate, fresh_problems

UNKNOWN = -1.0  # the label of a token that tells nothing

# The comparing block: how sharply it looks at the token before, and how loud what was expected and how likely
# the token was are beside what the solver wrote.
SHARPNESS, LOUDNESS_OF_EXPECTED, LOUDNESS_OF_LIKELY = 9.0, 10.0, 50.0
# How it is fitted: solutions, steps, tokens of a step, learning rate; below the least log-probability all are
# alike.
NUM_FITTED, FIT_STEPS, FIT_TOKENS, FIT_RATE, LEAST = 3000, 5000, 512, 4e-3, -8.0
WARMUP_STEPS = 50
WEIGHT_OF_COMPARISON = 0.5  # in the loss of the training after it

_ROWS = 64  # that are read together where nothing is trained


@dataclass(frozen=True)
class Rows:
    """What is read, padded on the right: token ids (B, T), which of them are a solution's, what is to be told
    at each, and how much that weighs in the loss."""

    token_ids_BT: Tensor
    of_solution_BT: Tensor
    labels_BT: Tensor
    weights_BT: Tensor


@dataclass(frozen=True)
class Grader:
    """A classifier with one output; the blocks below `comparing`, and `solver_norm`, are a solver's."""

    model: Any
    comparing: Any
    solver_norm: Any

    def states(self, token_ids_BT: Tensor) -> Tensor:
        """What the head reads (B, T, H) of every token; padding is on the right, where no token sees it."""
        return self.model.base_model(input_ids=token_ids_BT, use_cache=False).last_hidden_state

    def scores(self, token_ids_BT: Tensor) -> Tensor:
        """The head's (B, T)."""
        return self.model.score(self.states(token_ids_BT))[..., 0]

    @torch.no_grad()
    def expected(self, solved_BTH: Tensor, token_ids_BT: Tensor) -> Tensor:
        """The log-probabilities (B, T - 1), at least LEAST, that the solver gave all tokens but the first."""
        head_VH = self.model.base_model.embed_tokens.weight
        log_probs_BTV = (self.solver_norm(solved_BTH) @ head_VH.T).log_softmax(-1)
        return log_probs_BTV[:, :-1].gather(2, token_ids_BT[:, 1:, None])[..., 0].clamp(min=LEAST)


RowsOf = Callable[[Sequence[Candidate]], Rows]


def deepened(solver: str, layers: int) -> Grader:
    """The solver as a classifier with one output, with blocks on top, `layers` in all; these, the last norm
    and the head are to be trained. Raises UserError for fewer than two of them, and for a solver whose
    expectation they cannot hold."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    shallow = AutoModelForCausalLM.from_pretrained(solver, dtype=torch.float32)
    config, num_known = shallow.config, shallow.config.num_hidden_layers
    if layers <= num_known + 1:
        raise UserError(f"layers: {layers}; {solver} has {num_known}: give at least {num_known + 2}")
    key_value_size = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    if config.model_type != "qwen2" or not config.tie_word_embeddings or config.vocab_size > key_value_size:
        fault = f"keys and values of {key_value_size} must hold a vocabulary of {config.vocab_size}"
        raise UserError(f"starts_from: {solver} must be a qwen2 with tied embeddings, and its {fault}")
    shape = config.to_dict() | {"num_hidden_layers": layers, "layer_types": None, "num_labels": 1}
    model = AutoModelForSequenceClassification.from_config(config.from_dict(shape), dtype=torch.float32)
    body = model.base_model
    body.load_state_dict(shallow.base_model.state_dict(), strict=False)
    body.requires_grad_(False)
    body.norm.requires_grad_(True)
    for block in body.layers[num_known:]:
        block.requires_grad_(True)
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)  # it adds nothing yet
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    torch.nn.init.zeros_(model.score.weight)
    grader = Grader(model.eval(), body.layers[num_known], shallow.base_model.norm)
    look_back(grader)
    return grader


@torch.no_grad()
def look_back(grader: Grader) -> None:
    """Have the comparing block's attention add to every token, in directions drawn at random, the part of the
    state of the token before that the solver's logits are read from."""
    body, own = grader.model.base_model, grader.comparing.self_attn
    config = body.config
    num_heads, num_groups = config.num_attention_heads, config.num_key_value_heads
    size, group = config.hidden_size // num_heads, num_heads // num_groups
    # Queries and keys are the same of all tokens but for their places: a key is turned so that of the place
    # before fits best, by the sum of cos(f (distance - 1)) over the frequencies f.
    frequencies = body.rotary_emb.inv_freq
    query = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
    key = torch.cat([torch.cos(frequencies), torch.sin(frequencies)])
    for projection in (own.q_proj, own.k_proj, own.v_proj, own.o_proj):
        torch.nn.init.zeros_(projection.weight)
    own.q_proj.bias.copy_(SHARPNESS * query.repeat(num_heads))
    own.k_proj.bias.copy_(SHARPNESS * key.repeat(num_groups))
    grader.comparing.input_layernorm.weight.copy_(grader.solver_norm.weight)
    read_VH = torch.linalg.qr(body.embed_tokens.weight.T).Q.T
    own.v_proj.weight[: len(read_VH)] = read_VH
    directions_HH = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q
    for number in range(num_groups):  # one head of each group is enough
        columns = slice(number * group * size, (number * group + 1) * size)
        own_directions = directions_HH[:, number * size : (number + 1) * size]
        own.o_proj.weight[:, columns] = LOUDNESS_OF_EXPECTED * own_directions


def fit_comparison(grader: Grader, candidates: Sequence[Candidate], rows_of: RowsOf) -> None:
    """Fit the comparing block's feed-forward part to the log-probabilities of the tokens of solutions."""
    states, log_probs = expectations(grader, candidates, rows_of)
    mlp, width = grader.comparing.mlp, states.shape[1]
    gate = torch.nn.Parameter(torch.randn(mlp.gate_proj.weight.shape) * 0.7 / math.sqrt(width))
    up = torch.nn.Parameter(torch.randn(mlp.up_proj.weight.shape) * 0.7 / math.sqrt(width))
    out = torch.nn.Parameter(torch.randn(len(gate)) * 0.5 / math.sqrt(len(gate)))
    mean = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([gate, up, out, mean], weight_decay=0.01)
    for step in range(FIT_STEPS):
        set_rate(optimizer, FIT_RATE, WARMUP_STEPS, step, FIT_STEPS)
        drawn = torch.randint(len(states), (FIT_TOKENS,))
        guessed_N = (functional.silu(states[drawn] @ gate.T) * (states[drawn] @ up.T)) @ out + mean
        optimizer.zero_grad()
        functional.mse_loss(guessed_N, log_probs[drawn]).backward()
        optimizer.step()
    direction_H = functional.normalize(torch.randn(width), dim=0)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(gate)
        mlp.up_proj.weight.copy_(up)
        mlp.down_proj.weight.copy_(LOUDNESS_OF_LIKELY * torch.outer(direction_H, out))


@torch.no_grad()
def expectations(grader: Grader, candidates: Sequence[Candidate], rows_of: RowsOf) -> tuple[Tensor, Tensor]:
    """Of all tokens of the solutions: the states (N, H) that the comparing block's feed-forward part reads,
    and the log-probabilities (N,) that the solver gave the tokens."""
    seen: dict[str, Tensor] = {}
    reading = grader.comparing.mlp.register_forward_pre_hook(lambda _, given: seen.update(read=given[0]))
    solved = grader.comparing.register_forward_pre_hook(lambda _, given: seen.update(solved=given[0]))
    states, log_probs = [], []
    for start in range(0, len(candidates), _ROWS):
        rows = rows_of(candidates[start : start + _ROWS])
        grader.states(rows.token_ids_BT)
        in_solution_BT = rows.of_solution_BT[:, 1:]
        states.append(seen["read"][:, 1:][in_solution_BT])
        log_probs.append(grader.expected(seen["solved"], rows.token_ids_BT)[in_solution_BT])
    reading.remove()
    solved.remove()
    return torch.cat(states), torch.cat(log_probs)


def train(
    ctx: Context, settings: WarmStart, grader: Grader, sampled: list[Candidate], rows_of: RowsOf
) -> None:
    """Train the added blocks on what is to be told at the tokens, and to keep what they compare: a second
    head, of no use afterwards, is to read the log-probabilities of the tokens from the same states."""
    own = settings.optimizer
    seen: dict[str, Tensor] = {}
    second_head = torch.nn.Linear(grader.model.config.hidden_size, 1)
    trained = [weight for weight in grader.model.parameters() if weight.requires_grad]
    trained += second_head.parameters()
    solved = grader.comparing.register_forward_pre_hook(lambda _, given: seen.update(solved=given[0]))
    optimizer = torch.optim.AdamW(trained, betas=(own.beta1, own.beta2), weight_decay=own.weight_decay)
    for step in range(settings.steps):
        set_rate(optimizer, own.learning_rate, own.warmup_steps, step, settings.steps)
        rows = rows_of(training_candidates(ctx, settings, sampled, step))
        known_BT = rows.labels_BT != UNKNOWN
        states_BTH, of_solution_BT = grader.states(rows.token_ids_BT), rows.of_solution_BT[:, 1:]
        scores_N = grader.model.score(states_BTH[known_BT])[:, 0]
        losses_N = functional.binary_cross_entropy_with_logits(
            scores_N, rows.labels_BT[known_BT], reduction="none"
        )
        weights_N = rows.weights_BT[known_BT]
        loss = (losses_N * weights_N).sum() / weights_N.sum()
        read_N = second_head(states_BTH[:, 1:][of_solution_BT])[:, 0]
        log_probs_N = grader.expected(seen["solved"], rows.token_ids_BT)[of_solution_BT]
        comparison = functional.mse_loss(read_N, log_probs_N)
        optimizer.zero_grad()
        (loss + WEIGHT_OF_COMPARISON * comparison).backward()
        torch.nn.utils.clip_grad_norm_(trained, own.clip_grad)
        optimizer.step()
        ctx.track.log(step, {"loss": loss.item(), "comparison": comparison.item()})
    solved.remove()


def set_rate(
    optimizer: torch.optim.Optimizer, highest: float, warmup_steps: int, step: int, num_steps: int
) -> None:
    """Rise to `highest` in the first steps, and fall to 0 as a cosine does."""
    rising = min(1.0, (step + 1) / max(1, warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = highest * rising * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def fitted_candidates(ctx: Context, sampled: list[Candidate]) -> list[Candidate]:
    """Those that the comparing block is fitted to."""
    problems = world.problems("train", None, NUM_FITTED, stable_seed(ctx.seed, "comparison"))
    own = draw(sampled, len(problems), 0, ctx.seed)
    return step_candidates(problems, own, random.Random(ctx.seed))


def training_candidates(
    ctx: Context, settings: WarmStart, sampled: list[Candidate], step: int
) -> list[Candidate]:
    """Right solutions, made-up errors, some of one who often errs and, after the curriculum, `sampled`."""
    own = draw(sampled, settings.batch_size, step, ctx.seed) if step >= settings.curriculum_steps else []
    rng = random.Random(stable_seed(ctx.seed, settings.task.value, step))
    return step_candidates(fresh_problems(ctx, settings, step), own, rng)


def padded(rows: Sequence[Sequence[float]], padding: float) -> Tensor:
    """(B, T), padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
