"""The run's roles, started once and kept across stages: rollout, policy, verifier, a pool a reward term.

Each starts in the background when `start` names it; using a role waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from pns.algo.reward import reads_tokens
from pns.config import STEP_SERVICES, Config, Service, services
from workers.packing import counted
from workers.phases import Phases
from workers.placement import bundles, ranks_on_a_node, ranks_per_replica, shared_pool, used_roles
from workers.reservation import Slot, release, reserve, slots
from workers.runtime import Runtime

if TYPE_CHECKING:
    from workers.rewards.service import ScoringPool
    from workers.rewards.verifier import Verifier
    from workers.rollout.pool import RolloutPool
    from workers.training.policy import Policy


class Fleet:
    """Roles by name: "rollout", "policy", "verifier", and the services of `pns.config.services`."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config = config
        self.runtime = runtime
        self._threads = ThreadPoolExecutor(thread_name_prefix="fleet")
        self._roles: dict[str, Future[Any]] = {}
        self._policy: Policy | None = None  # beside the others, as no thread may start it
        self._ranks: list[Any] = []  # the placement groups of the policy
        self._shares = bool(config.placement.colocate)  # the policy's GPUs with rollout
        self._slots: list[Slot] = []  # of rollout, in the groups
        self._phases = Phases()

    def start(self, roles: Collection[str]) -> None:
        """Begin starting the named roles without waiting for them; the policy's place is taken now, before
        the others could scatter over its nodes, and it starts when it is first used. Raises UserError for a
        role that there is not, and where the policy has no place."""
        used = used_roles(self.config, roles)
        if "policy" in used or (self._shares and "rollout" in used):
            self._reserve_ranks()
        # On GPUs a role waits for those that need more GPUs together: its processes could take one of each.
        gpus = {b.role: b.amounts["GPU"] for b in counted(bundles(self.config, used, self.runtime.device))}
        for role in sorted(used, key=lambda role: -gpus.get(role, 0.0)):
            if role != "policy" and role not in self._roles:
                share = gpus.get(role, 0.0)
                larger = [future for other, future in self._roles.items() if gpus.get(other, 0.0) > share > 0]
                self._roles[role] = self._threads.submit(self._build, role, larger)

    @property
    def rollout(self) -> RolloutPool:
        return self._started("rollout")

    @property
    def verifier(self) -> Verifier:
        return self._started("verifier")

    def scorer(self, name: str) -> ScoringPool[Any, Any]:
        """The pool of the service `name`, with its `model` loaded unless that is empty."""
        return self._started(name)

    def services(self) -> dict[str, ScoringPool[Any, Any] | None]:
        """The pools of services that `start` has named so far; None: it is not up yet. Waits for nothing."""
        begun = {name: self._roles[name] for name in services(self.config) if name in self._roles}
        up = {name for name, future in begun.items() if future.done() and not future.exception()}
        return {name: future.result() if name in up else None for name, future in begun.items()}

    @property
    def policy(self) -> Policy:
        """Started in the calling thread, which imports verl while the others start in their own processes."""
        if self._policy is None:
            from workers.training.policy import Policy

            self._reserve_ranks()
            pool = self.config.placement.policy
            turn = self._turn_of("policy")
            policy = Policy(pool, self.config.policy, self.runtime, self._ranks, turn)
            self._phases.add("policy", policy.leave, policy.come)
            self._policy = policy
        return self._policy

    def _reserve_ranks(self) -> None:
        if self._ranks:
            return
        pool = shared_pool(self.config) if self._shares else self.config.placement.policy
        self._ranks = reserve(pool, self.runtime, ranks_on_a_node(self.config))
        if self._shares:
            self._slots = slots(self._ranks, ranks_per_replica(self.config), self.runtime)

    def _turn_of(self, role: str) -> Callable[[], AbstractContextManager[None]]:
        return partial(self._phases.turn, role) if self._shares else nullcontext

    def shutdown(self) -> None:
        """Stop every role that was started, also where one failed to start or fails to stop."""
        with ExitStack() as stack:
            stack.callback(self._threads.shutdown)
            if self._policy is not None:
                stack.callback(self._policy.shutdown)
            elif self._ranks:
                stack.callback(release, self._ranks)
            for future in self._roles.values():
                # One that has not begun never starts; one that is starting is waited for.
                if not future.cancel() and future.exception() is None:
                    stack.callback(future.result().shutdown)

    def _started(self, role: str) -> Any:
        """The role, once it is up. Raises what any role failed with: work that cannot end well ends now."""
        self.start([role])  # where no stage named it before
        for future in self._roles.values():
            if future.done():
                future.result()
        return self._roles[role].result()

    def _build(self, role: str, larger: Collection[Future[Any]]) -> Any:
        wait(larger)
        # Imported where it is used: each brings in libraries that take seconds to load.
        if role == "rollout":
            from workers.rollout.pool import RolloutPool

            pool, settings = self.config.placement.rollout, self.config.rollout
            turn = self._turn_of("rollout")
            rollout = RolloutPool(pool, settings, self.runtime, self._slots, turn)
            self._phases.add("rollout", rollout.sleep, rollout.wake_up)
            return rollout
        if role == "verifier":
            from workers.rewards.verifier import Verifier

            return Verifier(self.config.placement.verifier_processes, self.config.reward.verify_seconds)
        service = services(self.config)[role]
        pool = self._build_service(role, service)
        with ExitStack() as stack:
            stack.callback(pool.shutdown)  # where the model cannot be loaded
            if service.model:
                pool.load(service.model)
            stack.pop_all()
        return pool

    def _build_service(self, role: str, service: Service) -> Any:
        """A scorer without a model. Imported where it is used, as above."""
        deadline = service.pool.deadline_seconds or self.config.reward.deadline_seconds
        seed, labels_steps = self.config.seed, role in STEP_SERVICES
        if service.url:
            from workers.rewards.endpoint import EndpointJudge, EndpointStepJudge

            endpoint = self.config.bcpg.step_judge.endpoint
            if labels_steps:
                return EndpointStepJudge(role, endpoint, seed, deadline)
            return EndpointJudge(role, self.config.reward.terms[role].endpoint, seed, deadline)
        placed = role, service.pool, self.runtime
        if labels_steps and service.judges:
            from workers.rewards.step_judge import StepJudgePool

            return StepJudgePool(*placed, seed, deadline)
        if labels_steps:
            from workers.rewards.process_reward import ProcessRewardPool

            return ProcessRewardPool(*placed, deadline)
        if service.judges:
            from workers.rewards.judge import JudgePool

            return JudgePool(*placed, seed, deadline)
        from workers.rewards.reward_model import RewardModelPool

        reads_chat = not reads_tokens(self.config.reward.terms[role])
        return RewardModelPool(*placed, deadline, reads_chat=reads_chat)
