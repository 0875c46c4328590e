"""A model behind an OpenAI-compatible server, asked for completions: messages go there, and texts come back.

A server need not honour a request's seed, and says neither token ids nor what their probabilities were: its
completions can be judged, not trained on.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from pns.config import ModelEndpoint
from pns.errors import UserError
from workers.http_client import cause_of, make_client
from workers.rollout.engine import Sampling

_MAX_FAILURES = 5  # in a row, for each request at once, that end the run; one that is refused does so at once


@dataclass(frozen=True)
class ChatRequest:
    """`messages` have "role" and "content"."""

    id: str
    messages: Sequence[dict[str, str]]
    seed: int
    sampling: Sampling


@dataclass(frozen=True)
class Reply:
    """`finish_reason` is the server's ("stop", "length", ...), or why there is no text: a cause of
    `workers.http_client.cause_of`. `num_tokens` of the completion, 0 where the server does not say."""

    id: str
    text: str
    num_tokens: int
    finish_reason: str


class ModelAtEndpoint:
    """The model `name` at `endpoint.url`; `template_arguments` are for the server's chat template."""

    def __init__(
        self, name: str, endpoint: ModelEndpoint, template_arguments: dict[str, Any] | None = None
    ) -> None:
        self._name, self._endpoint = name, endpoint
        self._template_arguments = template_arguments or {}
        self._client, self._headers = make_client(
            endpoint.url, endpoint.key_variable, endpoint.deadline_seconds, endpoint.retries
        )

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[list[Reply]]:
        """Yield replies as they come, one for each request. Raises UserError where the server refuses, or
        fails again and again."""
        left = iter(requests)
        at_once = self._endpoint.concurrency
        failures = 0
        threads = ThreadPoolExecutor(at_once, "endpoint")
        try:
            running = {threads.submit(self._ask, request) for request in itertools.islice(left, at_once)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {
                    threads.submit(self._ask, request) for request in itertools.islice(left, len(done))
                }
                replies = []
                for reply, message in map(Future.result, done):
                    failures = failures + 1 if message else 0
                    if reply.finish_reason == "refused" or failures >= _MAX_FAILURES * at_once:
                        raise UserError(
                            f"{self._endpoint.url} does not answer for {self._name} ({message}): look at the "
                            "server, the model's name there, its key and its limits, then start again: it "
                            "goes on from here"
                        )
                    replies.append(reply)
                yield replies
        finally:
            self._client.close()  # ends what is under way
            threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: ChatRequest) -> tuple[Reply, str]:
        """The reply; and where the request failed, with what."""
        messages: Any = list(request.messages)
        sampling = request.sampling
        optional: dict[str, Any] = {
            "stop": list(sampling.stop),
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
        }
        # Not of the protocol, but of most servers of open models.
        beyond: dict[str, Any] = {"chat_template_kwargs": self._template_arguments}
        beyond |= {"top_k": sampling.top_k, "min_p": sampling.min_p}
        if sampling.repetition_penalty != 1:
            beyond["repetition_penalty"] = sampling.repetition_penalty
        try:
            completion = self._client.chat.completions.create(
                model=self._name,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=request.seed,
                extra_headers=self._headers,
                extra_body={name: value for name, value in beyond.items() if value},
                **{name: value for name, value in optional.items() if value},
            )
            [choice] = completion.choices
            usage = completion.usage
            num_tokens = usage.completion_tokens if usage else 0
            return Reply(request.id, choice.message.content or "", num_tokens, choice.finish_reason), ""
        except Exception as error:  # also whatever a reply that is no completion makes of the library
            lines = str(error).strip().splitlines() or [""]
            return Reply(request.id, "", 0, cause_of(error)), f"{type(error).__name__}: {lines[0][:200]}"
