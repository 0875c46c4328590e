"""A judge behind a server that speaks the chat-completions protocol: a real one, in a thread, with scripted
replies."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pns.algo.judging import Judgement, Template, make_nonce, render_text
from pns.algo.step_judging import render_steps, step_nonce
from pns.config import Endpoint
from pns.errors import UserError
from workers.rewards.endpoint import EndpointJudge, EndpointStepJudge
from workers.rewards.service import Outcome, PoolFailedError

ITEMS = [
    (f"How many? {number}", f"<think>Bob has {number}. </think>\\boxed{{{number}}}") for number in range(12)
]
HANG = (0, None)


def verdict(scores: str, prompt: str) -> str:
    """The verdict that the prompt asks for: its last line, with the scores in place of N."""
    form = prompt.splitlines()[-1]
    for score in scores:
        form = form.replace("=N", f"={score}", 1)
    return form


def boxed(prompt: str) -> int:
    return int(re.findall(r"boxed{(\d+)}", prompt)[0])


def completion(text: str | None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 1000, "completion_tokens": 20, "total_tokens": 1020}
    kind = {"id": "1", "object": "chat.completion", "created": 0, "model": "grader"}
    return kind | {"choices": [choice], "usage": usage}


class Server:
    """`reply(prompt)` is the text of the reply to a prompt (None: no text), or a status and a JSON body or
    bytes; HANG: no answer. `bodies` and `headers` are what came, `most_at_once` how many requests together."""

    def __init__(self) -> None:
        self.reply: Callable[[str], Any] = lambda prompt: verdict("3210", prompt)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._lock, self.released = threading.Lock(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server._answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            answer = self.reply(body["messages"][-1]["content"])
        if not isinstance(answer, tuple):
            answer = (200, completion(answer))
        status, content = answer
        if answer == HANG:
            self.released.wait(600)
        with self._lock:
            self._at_once -= 1
        if status:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            request.send_response(status)
            request.send_header("Content-Type", "application/json")
            request.send_header("Retry-After-Ms", "1")  # so that pauses between attempts are short
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def make_judge(server: Server) -> Iterator[Callable[..., EndpointJudge]]:
    judges: list[EndpointJudge] = []

    def make(deadline_seconds: float = 60.0, loaded: bool = True, **settings: Any) -> EndpointJudge:
        endpoint = Endpoint(**({"url": server.url, "key_variable": "JUDGE_KEY", "concurrency": 1} | settings))
        judges.append(EndpointJudge("coherence", endpoint, 0, deadline_seconds))
        if loaded:
            judges[-1].load("grader")
            server.bodies.clear()
            server.headers.clear()
        return judges[-1]

    yield make
    for judge in judges:
        judge.shutdown()


def after(number: int, first: Any, then: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """`first` for so many requests, then a verdict."""
    left = [number]

    def reply(prompt: str) -> Any:
        left[0] -= 1
        return first if left[0] >= 0 else (then or (lambda text: verdict("3210", text)))(prompt)

    return reply


def test_items_are_graded_in_order(server: Server, make_judge: Callable[..., EndpointJudge]) -> None:
    judge = make_judge(concurrency=4)
    server.reply = lambda prompt: verdict(f"{boxed(prompt) % 4}012", prompt)
    outcomes = judge.score(ITEMS)
    assert outcomes == [Outcome(Judgement((number % 4, 0, 1, 2))) for number in range(12)]
    problem, solution = ITEMS[0]
    messages = render_text(problem, solution, make_nonce(0, problem, solution, Template.TEXT))
    [body] = [body for body in server.bodies if body["messages"] == messages]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("grader", 0.0, 64)
    stats = judge.stats()
    assert (stats.queued, stats.in_flight, stats.scored, stats.failures) == (0, 0, 12, {})
    assert (stats.replicas, stats.restarts) == (4, 0)
    assert 0 < stats.seconds_p50 <= stats.seconds_p95


def test_a_reply_is_a_verdict_alone_after_reasoning(
    server: Server, make_judge: Callable[..., EndpointJudge]
) -> None:
    judge = make_judge()

    def told(text: str) -> Outcome[Judgement]:
        server.reply = lambda prompt: text.replace("VERDICT", verdict("3333", prompt))
        [outcome] = judge.score(ITEMS[:1])
        return outcome

    graded, unparsable = Outcome(Judgement((3, 3, 3, 3))), Outcome[Judgement](None, "unparsable")
    for text in ("VERDICT", " VERDICT\n", "<think>\nSound.\n</think>\n\nVERDICT", "<think></think>VERDICT"):
        assert told(text) == graded
    for text in (
        "",
        "3333",
        "The verdict: VERDICT",
        "VERDICT VERDICT",
        "VERDICT<think></think>",
        "<think>VERDICT",
        "<think>VERDICT</think>",
        "<think></think>VERDICT</think>VERDICT",
        "<verdict>relevance=3 coherence=3 completeness=3 clarity=3</verdict>",
    ):
        assert told(text) == unparsable
    server.reply = lambda prompt: None
    assert judge.score(ITEMS[:1]) == [unparsable]
    assert judge.stats().failures == {"unparsable": 10}


def test_an_error_of_the_server_is_asked_again(
    server: Server, make_judge: Callable[..., EndpointJudge]
) -> None:
    judge = make_judge(retries=2)
    for status in (429, 500, 503, 408):
        server.reply = after(2, (status, {"error": {"message": "busy"}}))
        assert judge.score(ITEMS[:1]) == [Outcome(Judgement((3, 2, 1, 0)))]
    assert len(server.bodies) == 12


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ((429, {"error": {"message": "busy"}}), "rate_limit"),
        ((500, {"error": {"message": "oops"}}), "server_error"),
        ((400, {"error": {"message": "too long"}}), "bad_request"),
        ((403, {"error": {"message": "no"}}), "refused"),
        ((200, b"no json"), "bad_reply"),
        ((200, {"detail": "no completion"}), "bad_reply"),
    ],
)
def test_a_failure_is_missing_with_its_cause(
    server: Server, make_judge: Callable[..., EndpointJudge], answer: Any, cause: str
) -> None:
    judge = make_judge(retries=1)
    server.reply = after(2 if cause in ("rate_limit", "server_error") else 1, answer)
    assert judge.score(ITEMS[:2]) == [Outcome(None, cause), Outcome(Judgement((3, 2, 1, 0)))]
    assert judge.stats().failures == {cause: 1}


def test_a_request_that_hangs_is_repeated_and_then_missing(
    server: Server, make_judge: Callable[..., EndpointJudge]
) -> None:
    judge = make_judge(retries=1)
    judge._client.timeout = 0.3
    server.reply = lambda prompt: HANG if "boxed{0}" in prompt else verdict("3210", prompt)
    assert [outcome.cause for outcome in judge.score(ITEMS[:1])] == ["timeout"]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("answer", [(401, {"error": {"message": "bad key"}}), (500, {}), HANG])
def test_a_server_that_never_answers_ends_the_run_with_one_line(
    server: Server, make_judge: Callable[..., EndpointJudge], answer: Any
) -> None:
    judge = make_judge(retries=0, concurrency=2)
    if answer == HANG:
        judge._client.timeout = 0.3
    server.reply = lambda prompt: answer
    handle = judge.submit(ITEMS)
    with pytest.raises(
        PoolFailedError, match=r"^coherence: http://.*/v1 fails again and again.*goes on from here$"
    ):
        judge.collect(handle)
    with pytest.raises(PoolFailedError, match="Error"):
        judge.submit(ITEMS)
    assert all(future.done() for future in handle)


def test_failures_between_answers_and_limits_of_a_rate_end_nothing(
    server: Server, make_judge: Callable[..., EndpointJudge]
) -> None:
    judge = make_judge(retries=0)
    refused = (403, {"error": {"message": "not this one"}})
    server.reply = lambda prompt: (
        refused if re.search(r"boxed{\d*[13579]}", prompt) else verdict("0000", prompt)
    )
    assert [outcome.cause for outcome in judge.score(ITEMS)] == [None, "refused"] * 6
    server.reply = lambda prompt: (429, {"error": {"message": "busy"}})
    assert {outcome.cause for outcome in judge.score(ITEMS)} == {"rate_limit"}


def test_never_more_requests_at_once_than_allowed(
    server: Server, make_judge: Callable[..., EndpointJudge]
) -> None:
    judge = make_judge(concurrency=3)
    server.reply = lambda prompt: HANG
    handle = judge.submit(ITEMS)
    end = time.monotonic() + 300
    while len(server.bodies) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)  # a fourth one would come now
    stats = judge.stats()
    assert (stats.queued, stats.in_flight, server.most_at_once) == (9, 3, 3)
    judge.shutdown()
    server.released.set()
    with pytest.raises(RuntimeError, match="shut down"):
        judge.submit(ITEMS)
    with pytest.raises(RuntimeError, match="shut down"):
        handle[-1].result(300)


def test_tokens_are_counted_at_their_prices(server: Server, make_judge: Callable[..., EndpointJudge]) -> None:
    judge = make_judge(price_in=2.0, price_out=50.0)
    probed = judge.stats().cost
    assert probed == pytest.approx(1000 * 2e-6 + 20 * 50e-6)
    judge.score(ITEMS)
    assert judge.stats().cost == pytest.approx(13 * probed)
    server.reply = lambda prompt: (400, {"error": {"message": "too long"}})
    judge.score(ITEMS[:1])
    assert judge.stats().cost == pytest.approx(13 * probed)


def test_the_key_is_that_of_the_variable_and_no_other(
    server: Server, make_judge: Callable[..., EndpointJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(variable, "another-server's")
    make_judge(loaded=False).load("grader")
    monkeypatch.setenv("JUDGE_KEY", "secret")
    make_judge(loaded=False).load("grader")
    without, with_key = server.headers
    assert not {"authorization", "openai-organization", "openai-project"} & set(without)
    assert with_key["authorization"] == "Bearer secret"
    assert "another-server's" not in str(server.headers)


@pytest.mark.parametrize(
    "answer", [(401, {"error": {"message": "bad key"}}), (404, {}), (200, b"<html>"), HANG]
)
def test_a_model_that_is_not_served_is_said_when_it_is_loaded(
    server: Server, make_judge: Callable[..., EndpointJudge], answer: Any
) -> None:
    judge = make_judge(0.3 if answer == HANG else 60.0, loaded=False, retries=0)
    with pytest.raises(RuntimeError, match="before load"):
        judge.submit(ITEMS)
    server.reply = lambda prompt: answer
    with pytest.raises(UserError, match=r"coherence: http://.*/v1 does not serve grader: \w+"):
        judge.load("grader")


def test_where_nothing_listens(make_judge: Callable[..., EndpointJudge]) -> None:
    judge = make_judge(loaded=False, url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UserError, match="APIConnectionError"):
        judge.load("grader")


def test_a_model_that_chats_is_warned_of(
    server: Server, make_judge: Callable[..., EndpointJudge], capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda prompt: "Sure! " + verdict("3333", prompt)
    make_judge()
    assert "grader does not reply with a verdict alone" in capsys.readouterr().err


def test_an_endpoint_has_no_replicas(make_judge: Callable[..., EndpointJudge]) -> None:
    with pytest.raises(UserError, match=r"coherence: an endpoint has no replicas: set endpoint\.concurrency"):
        make_judge().resize(2)


def test_steps_are_labelled_behind_a_server(server: Server) -> None:
    """The form's places are filled in; a verdict on too few steps is none."""
    items = [(f"How many? {n}", tuple(f"step {k}. " for k in range(n))) for n in range(1, 5)]
    server.reply = lambda prompt: re.sub(
        r"(\d)=N", lambda n: f"{n[1]}={'wc'[int(n[1]) % 2]}", prompt.splitlines()[-1]
    )
    judge = EndpointStepJudge(
        "step_judge", Endpoint(url=server.url, key_variable="JUDGE_KEY", concurrency=2), 0, 60.0
    )
    try:
        judge.load("grader")
        assert judge.score(items) == [Outcome((True, False, True, False)[:n]) for n in range(1, 5)]
        problem, steps = items[-1]
        messages = render_steps(problem, steps, step_nonce(0, problem, steps, Template.TEXT))
        assert messages in [body["messages"] for body in server.bodies]
        server.reply = lambda prompt: prompt.splitlines()[-1].replace(" 4=N", "").replace("N", "c")
        assert judge.score(items) == [
            *(Outcome((True,) * n) for n in range(1, 4)),
            Outcome(None, "unparsable"),
        ]
    finally:
        judge.shutdown()
