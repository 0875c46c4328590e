"""The run's actors, started once and kept across stages: rollout, policy, reward model, judge, and the
verifier's processes.

Each role starts when `start` names it, in the background; using a role waits for it. New weights go into
running processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, cast

from pns.config import Config

if TYPE_CHECKING:
    from workers.rewards.judge import JudgePool
    from workers.rewards.reward_model import RewardModelPool
    from workers.rewards.verifier import Verifier
    from workers.rollout.pool import RolloutPool
    from workers.training.policy import Policy


class Fleet:
    """Roles by name; `device` is "cpu" or "cuda"."""

    def __init__(self, config: Config, device: str) -> None:
        self.config = config
        self.device = device
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="fleet")
        self._roles: dict[str, Future[Any]] = {}
        self._policy: Policy | None = None

    def start(self, *roles: str) -> None:
        """Begin starting the named roles (rollout, reward_model, judge, verifier) without waiting for them."""
        for role in roles:
            self._begin(role)

    @property
    def rollout(self) -> RolloutPool:
        return self._begin("rollout").result()

    @property
    def reward_model(self) -> RewardModelPool:
        return self._begin("reward_model").result()

    @property
    def judge(self) -> JudgePool:
        return self._begin("judge").result()

    @property
    def verifier(self) -> Verifier:
        return self._begin("verifier").result()

    @property
    def policy(self) -> Policy:
        """Started in the calling thread: verl is imported here, while the other roles start in their own
        processes."""
        if self._policy is None:
            from workers.training.policy import Policy

            placement = self.config.placement
            self._policy = Policy(
                placement.policy,
                cast(Literal["cpu", "cuda"], self.device),
                self.config.policy,
                placement.start_timeout_seconds,
                trust_remote_code=self.config.models.trust_remote_code,
            )
        return self._policy

    def shutdown(self) -> None:
        """Stop every role that was started."""
        for future in self._roles.values():
            if future.exception() is None:
                future.result().shutdown()
        if self._policy is not None:
            self._policy.shutdown()
        self._threads.shutdown()

    def _begin(self, role: str) -> Future[Any]:
        if role not in self._roles:
            self._roles[role] = self._threads.submit(self._builders()[role])
        return self._roles[role]

    def _builders(self) -> dict[str, Callable[[], Any]]:
        return {
            "rollout": self._rollout,
            "reward_model": self._reward_model,
            "judge": self._judge,
            "verifier": self._verifier,
        }

    def _rollout(self) -> RolloutPool:
        from workers.rollout.pool import RolloutPool

        placement = self.config.placement
        return RolloutPool(
            placement.rollout,
            self.device,
            self.config.rollout,
            placement.start_timeout_seconds,
            self.config.models.trust_remote_code,
        )

    def _reward_model(self) -> RewardModelPool:
        from workers.rewards.reward_model import RewardModelPool

        return RewardModelPool(
            self.config.placement.reward_model,
            self.device,
            self.config.placement.start_timeout_seconds,
            self.config.models.trust_remote_code,
        )

    def _judge(self) -> JudgePool:
        from workers.rewards.judge import JudgePool

        pool = JudgePool(
            self.config.placement.judge,
            self.device,
            self.config.placement.start_timeout_seconds,
            self.config.models.trust_remote_code,
            self.config.seed,
        )
        if self.config.warm_start.task != "judge":
            pool.load(self.config.models.judge)
        return pool

    def _verifier(self) -> Verifier:
        from workers.rewards.verifier import Verifier

        return Verifier(self.config.placement.verifier_processes, self.config.reward.verify_seconds)
