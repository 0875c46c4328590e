"""A model behind an OpenAI-compatible server, asked for completions: messages go there, and texts come back.

A server need not honour a request's seed, and says neither token ids nor what their probabilities were: its
completions can be judged, not trained on.
"""

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pns.algo.formatting import THINK_TAGS
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
    """`text` has the reasoning that a server gives apart between <think> and </think> before its content.
    `finish_reason` is the server's ("stop", "length", ...), or why there is no text: a cause of
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
        asked: queue.SimpleQueue[ChatRequest | None] = queue.SimpleQueue()
        answered: queue.SimpleQueue[tuple[Reply, str]] = queue.SimpleQueue()
        for request in itertools.islice(left, at_once):
            asked.put(request)
            # Daemons: a stop of the process leaves at once, whatever the server has still to say.
            threading.Thread(target=self._work, args=(asked, answered), name="endpoint", daemon=True).start()
        try:
            for _ in requests:
                reply, message = answered.get()  # a request ends by its own deadline
                failures = failures + 1 if message else 0
                if reply.finish_reason == "refused" or failures >= _MAX_FAILURES * at_once:
                    raise UserError(
                        f"{self._endpoint.url} does not answer for {self._name} ({message}): look at the "
                        "server, the model's name there, its key and its limits, then start again: it "
                        "goes on from here"
                    )
                for request in itertools.islice(left, 1):
                    asked.put(request)
                yield [reply]
        finally:
            for _ in range(at_once):
                asked.put(None)  # a thread ends once its request has
            self._client.close()

    def _work(self, asked: queue.SimpleQueue, answered: queue.SimpleQueue) -> None:
        while request := asked.get():
            answered.put(self._ask(request))

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
            return Reply(request.id, _text(choice.message), num_tokens, choice.finish_reason), ""
        except Exception as error:  # also whatever a reply that is no completion makes of the library
            lines = str(error).strip().splitlines() or [""]
            return Reply(request.id, "", 0, cause_of(error)), f"{type(error).__name__}: {lines[0][:200]}"


def _text(message: Any) -> str:
    """Of a chat message. Its reasoning is not of the protocol: vLLM says `reasoning`, and said
    `reasoning_content` as other servers do. Without content the block counts as open."""
    own = message.model_extra or {}
    reasoning, content = own.get("reasoning_content") or own.get("reasoning"), message.content or ""
    if not reasoning:
        return content
    opening, closing = THINK_TAGS
    return opening + str(reasoning) + (closing + content if content else "")
