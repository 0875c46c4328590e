"""The evaluate stage: verdicts that count, seeds of samples, what an interruption leaves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pns.algo.scores import final_verdict
from pns.commands.evaluate import evaluation_tables
from pns.config import DECODING_OFF, Config, Data, Decoding, ModelEndpoint
from pns.data.problems import Identity
from pns.data.prompts import Messages, apply_family
from pns.errors import UserError
from pns.files import read_json
from pns.records import Problem, Verdict
from pns.run.stage import ModelFiles
from pns.stages.artefacts import Evaluation
from pns.stages.context import Suites
from pns.stages.evaluate import AnswerScorer, check_samplings, decoding_sampling, evaluate, until_stop
from pns.stages.stream import Ask
from workers.rollout.endpoint import ChatRequest, ModelAtEndpoint
from workers.rollout.engine import Sample, Sampling

ROOT = Path(__file__).parents[2]
MODEL = ModelFiles(ROOT / "recipes/tiny/qwen2")  # its configuration says how long a context is
SAMPLED = Decoding(4, 0.9, 0.95, 40)
GREEDY = Decoding(1, 0.0, 1.0, 20)


def suites_of(bench: Any, extra: tuple[Problem, ...] = ()) -> Suites:
    """Two suites: "hard" of p0 to p2 with four samples each, "easy" of p3 with one."""
    *hard, easy = bench.problems(4).problems
    problems = {"hard": [*hard, *extra], "easy": [easy]}
    named = {suite: [replace(problem, suite=suite) for problem in own] for suite, own in problems.items()}
    identities = {suite: Identity(f"made up {suite}", len(own), "0" * 64) for suite, own in named.items()}
    return Suites(named, identities, {"hard": SAMPLED, "easy": GREEDY}, Data())


def made(bench: Any, suites: Suites, **models: ModelFiles) -> Evaluation:
    with bench.making() as ctx:
        return evaluate.make(ctx, evaluate.settings(Config()), models or {"m": MODEL}, suites)


def test_what_counts() -> None:
    assert final_verdict(Verdict.CORRECT, None, "2", "stop") == (Verdict.CORRECT, "equal")
    assert final_verdict(Verdict.WRONG, None, "2", "stop") == (Verdict.WRONG, "different")
    assert final_verdict(Verdict.CORRECT, None, "2", "length") == (Verdict.WRONG, "truncated")
    assert final_verdict(Verdict.UNVERIFIED, "no_answer", None, "stop") == (Verdict.WRONG, "no_answer")
    assert final_verdict(Verdict.CORRECT, None, "2", "abort") == (Verdict.UNVERIFIED, "abort")
    assert final_verdict(Verdict.UNVERIFIED, "no_answer", None, "error") == (Verdict.UNVERIFIED, "error")
    assert final_verdict(Verdict.UNVERIFIED, "timeout", "2", "stop") == (Verdict.UNVERIFIED, "timeout")


def test_every_completion_has_a_row_with_its_verdict(bench: Any) -> None:
    texts = [bench.solution(10), bench.solution(10) + "...", "So Ann=3. ", bench.solution(bench.undecided)]
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample]
    evaluation = made(bench, suites_of(bench))
    rows = evaluation.completions("m")
    verdicts = [(row.verdict.value, row.reason) for row in rows if row.problem.id == "p0"]
    expected = ["correct equal", "wrong truncated", "wrong no_answer", "unverified timeout"]
    assert [" ".join(verdict) for verdict in verdicts] == expected
    scores = evaluation.scores()
    assert scores["hard"]["m"]["accuracy"] == pytest.approx(1 / 12)  # one of four, of one of three problems
    counted = [scores["hard"]["m"][what] for what in ("completions", "truncated", "no_answer", "unverified")]
    assert counted == [12, 3, 3, 3]
    assert bench.counts() == {"truncated": 3, "no_answer": 3, "prompt_too_long": 0, "unverified": 3}
    assert (evaluation.pages / "index.html").is_file()
    assert read_json(evaluation.suites_file)["easy"]["decoding"]["max_new_tokens"] == 20


def test_many_cut_off_completions_are_warned_of_and_boxed_ones_counted_apart(bench: Any) -> None:
    texts = ["It is \\boxed{2} so...", "So \\boxed{2...", bench.solution(10), bench.solution(10)]
    bench.fleet.rollout.write = lambda problem, sample, model: texts[sample] if problem != "p3" else texts[2]
    scores = made(bench, suites_of(bench)).scores()
    found = scores["hard"]["m"]
    assert (found["truncated"], found["boxed_truncated"], scores["mean"]["m"]["boxed_truncated"]) == (6, 3, 3)
    cut = "50.0 % of completions were cut off at 40 tokens (3 of 6 had an answer in a box)"
    assert found["warning"] == f"{cut}: raise evaluate.max_new_tokens"
    assert "warning" not in scores["easy"]["m"]


def test_blocks_that_a_budget_closed_are_counted(bench: Any) -> None:
    suites = suites_of(bench)
    thinking = {suite: replace(how, thinking_budget=7) for suite, how in suites.decodings.items()}
    suites = replace(suites, decodings={**suites.decodings, "hard": thinking["hard"]})
    one, two = bench.solution(10, "So Ann=3. "), bench.solution(10, "So Ann=3. So Ann=3. ")
    bench.fleet.rollout.write = lambda problem, sample, model: [one, two, two, one][sample]
    evaluation = made(bench, suites)
    [budget] = {s.thinking for s in bench.fleet.rollout.samplings} - {None}
    assert (budget.tokens, bench.prompts.tokenizer.decode(budget.closing_ids)) == (7, "</think>")
    cut = {(row.problem.suite, row.sample) for row in evaluation.completions("m") if row.thinking_cut}
    assert cut == {("hard", 1), ("hard", 2)}
    scores = evaluation.scores()
    assert (scores["hard"]["m"]["thinking_cut"], scores["hard"]["m"]["thinking_budget"]) == (6, 7)
    assert "thinking_cut" not in scores["easy"]["m"]
    table = evaluation_tables(scores, "m")[0]
    assert str(table.caption).endswith("closed by evaluate.thinking_budget: hard 6 of 12 (50.0 %)")
    with pytest.raises(UserError, match=r"thinking_budget: 7, and no request to a server can ask for it"):
        check_samplings(Messages(Data()), suites)


def test_each_suite_is_decoded_in_its_way_and_every_model_is_asked(bench: Any) -> None:
    made(bench, suites_of(bench), backbone=MODEL, result=ModelFiles(ROOT / "recipes/tiny/qwen3"))
    decoded = {(s.temperature, s.top_p, s.max_new_tokens) for s in bench.fleet.rollout.samplings}
    assert decoded == {(0.9, 0.95, 40), (0.0, 1.0, 20)}
    assert [Path(model).name for model in bench.fleet.rollout.loaded] == ["qwen2", "qwen3"]


def test_a_completion_ends_before_the_first_stop() -> None:
    data = Data(prompt="base")
    apply_family(data, None)
    stops = decoding_sampling(replace(GREEDY, stop=["Q:", data.stop]), data.stop).stop
    assert stops == ("\nQuestion:", "Q:")
    text = " It is \\boxed{2}.\nQuestion: What is 2+2?\nAnswer: \\boxed{4} Q: "
    assert until_stop(text, stops) == (" It is \\boxed{2}.", True)
    assert until_stop(" It is \\boxed{2}.", stops) == (" It is \\boxed{2}.", False)
    assert until_stop(text, ()) == (text, False)


def test_what_changes_nothing_is_not_part_of_a_decoding(bench: Any) -> None:
    suites = suites_of(bench)
    off = {suite: replace(how, **DECODING_OFF) for suite, how in suites.decodings.items()}
    same, other = replace(suites, decodings=off), {**off, "hard": replace(off["hard"], min_p=0.05)}
    assert (same.digest, same.described()) == (suites.digest, suites.described())
    assert replace(suites, decodings=other).digest != suites.digest


def test_seeds_belong_to_samples_not_to_order_or_neighbours(bench: Any) -> None:
    def seeds(suites: Suites, name: str) -> dict[str, int]:
        with bench.making(name) as ctx:
            evaluate.make(ctx, evaluate.settings(Config()), {"m": MODEL}, suites)
        asked = {request.id: request.seed for request in bench.fleet.rollout.asked}
        bench.fleet.rollout.take_asked()
        return asked

    suites = suites_of(bench)
    backwards = {suite: own[::-1] for suite, own in reversed(suites.problems.items())}
    first, second = seeds(suites, "first"), seeds(replace(suites, problems=backwards), "second")
    assert first == second
    assert len(set(first.values())) == len(first) == 13


def test_an_interruption_asks_for_the_rest_alone(bench: Any) -> None:
    bench.fleet.rollout.interrupt_after = 6
    with pytest.raises(KeyboardInterrupt):
        made(bench, suites_of(bench))
    asked_before = set(bench.fleet.rollout.take_asked())
    evaluation = made(bench, suites_of(bench))
    asked_after = set(bench.fleet.rollout.take_asked())
    assert len(asked_before | asked_after) == 13
    assert len(asked_after) == 13 - 6
    assert len(evaluation.completions("m")) == 13
    assert not list(evaluation.directory.glob("*unfinished*"))


def test_a_prompt_that_fills_the_context_is_wrong_and_not_asked(bench: Any) -> None:
    too_long = Problem("p9", "Ann has 3. " * 200, "19")
    evaluation = made(bench, suites_of(bench, (too_long,)))
    rows = [row for row in evaluation.completions("m") if row.problem.id == "p9"]
    assert {(row.verdict, row.reason) for row in rows} == {(Verdict.WRONG, "prompt_too_long")}
    assert not any("p9" in request.id for request in bench.fleet.rollout.asked)
    assert evaluation.scores()["hard"]["m"]["n"] == 4


def test_a_problem_is_stored_whole_but_for_its_solution(bench: Any) -> None:
    suites = suites_of(bench, (Problem("p7", "Ann has 3. ", "17", solution="s", subject="a", level="2"),))
    rows = {row.problem.id: row.problem for row in made(bench, suites).completions("m")}
    for problem in suites.problems["hard"]:
        assert rows[problem.id] == replace(problem, solution=None)


def test_whole_rows_are_kept_while_later_verdicts_are_waited_for(bench: Any) -> None:
    bench.fleet.verifier.late = True
    with bench.making() as ctx:
        scorer = AnswerScorer(ctx)
        for ask in range(3):
            problem = bench.problems(3).problems[ask]
            token_ids = bench.prompts.encode_completion(bench.solution(10 + ask))
            sample = Sample(problem.id, token_ids, (), "stop", 0)
            scorer.submit([(Ask(problem.id, problem, 0, 0, Sampling(0.0, 1.0, 20)), sample)])
        first = scorer.finished(wait=True)
        rest = [row for _ in range(2) for row in scorer.finished(wait=True)]
    assert first[0][0] == "p0"
    assert sorted(key for key, _ in [*first, *rest]) == ["p0", "p1", "p2"]


class ChatServer:
    """`reply(body)` is (status, text, finish reason); for the text there may be the fields of a message."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, str | dict[str, Any], str]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        server, self.reply = self, reply

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                server.keys.add(self.headers["Authorization"])
                status, text, reason = server.reply(body)
                said = {"content": text} if isinstance(text, str) else text
                message = {"role": "assistant", **said}
                choice = {"index": 0, "finish_reason": reason, "message": message}
                usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
                kind = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                data = json.dumps(kind | {"choices": [choice], "usage": usage}).encode()
                self.send_response(status)
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def test_a_model_at_an_endpoint_is_asked_with_messages_and_goes_on_where_it_failed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OWN_KEY", "secret")
    right = {"p0": 10, "p1": 11, "p2": 12, "p3": 13}
    suites = suites_of(bench)
    suites = replace(suites, decodings=suites.decodings | {"easy": replace(GREEDY, top_k=5, stop=["Q:"])})
    texts = {
        problem.prompt: bench.solution(right[problem.id])
        for own in suites.problems.values()
        for problem in own
    }
    failing = True

    def reply(body: dict[str, Any]) -> tuple[int, str, str]:
        text = next(own for prompt, own in texts.items() if prompt in body["messages"][-1]["content"])
        if failing and len(server.bodies) > 5:
            return 500, "", ""
        return (200, text[:9], "length") if body["temperature"] == 0 else (200, text, "stop")

    server = ChatServer(reply)
    config = Config()
    config.evaluate.endpoint = ModelEndpoint(server.url, "OWN_KEY", concurrency=1, retries=1)
    bench.fleet.config = config
    settings = evaluate.settings(config)
    assert evaluate.roles(settings) == ("verifier",)
    named = {"m": ModelFiles("served-name")}

    def make() -> Evaluation:
        with bench.making() as ctx:
            return evaluate.make(ctx, settings, named, suites)

    with pytest.raises(
        UserError, match=r"does not answer for served-name \(InternalServerError.*goes on from"
    ):
        make()
    assert len(server.bodies) == 5 + 5 * 2  # five failures in a row, each asked twice
    failing = False
    server.bodies.clear()
    evaluation = make()
    assert len(server.bodies) == 13 - 5
    assert {body["model"] for body in server.bodies} == {"served-name"}
    assert server.keys == {"Bearer secret"}
    rows = evaluation.completions("m")
    assert [row.problem.id for row in rows] == ["p0"] * 4 + ["p1"] * 4 + ["p2"] * 4 + ["p3"]
    assert {body["seed"] for body in server.bodies} <= {row.seed for row in rows}
    assert {row.num_tokens for row in rows} == {7}
    wrong = [(row.problem.id, row.reason) for row in rows if row.verdict is not Verdict.CORRECT]
    assert wrong == [("p3", "truncated")]
    [easy] = [body for body in server.bodies if body["temperature"] == 0]
    assert (easy["max_tokens"], easy["top_k"], easy["stop"]) == (20, 5, ["Q:"])
    assert {"top_k", "stop", "min_p", "repetition_penalty"}.isdisjoint(server.bodies[0])
    assert not bench.fleet.rollout.asked
    server.http.shutdown()
    server.http.server_close()


def test_reasoning_that_a_server_gives_apart_is_the_block_of_the_completion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    messages: dict[str, tuple[dict[str, Any], str, str]] = {
        "before": (
            {"content": "\\boxed{2}", "reasoning_content": "1+1"},
            "stop",
            "<think>1+1</think>\\boxed{2}",
        ),
        "now": ({"content": "\\boxed{2}", "reasoning": "1+1"}, "stop", "<think>1+1</think>\\boxed{2}"),
        "cut": ({"content": None, "reasoning": "\\boxed{3}?"}, "length", "<think>\\boxed{3}?"),
        "none": ({"content": "\\boxed{2}", "reasoning": None}, "stop", "\\boxed{2}"),
        "whole": ({"content": "<think>1</think>2", "reasoning": ""}, "stop", "<think>1</think>2"),
    }
    leave_at_once = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any], str]:
        asking = [thread for thread in threading.enumerate() if thread.name == "endpoint"]
        leave_at_once.append(bool(asking) and all(thread.daemon for thread in asking))
        message, reason, _ = messages[body["messages"][0]["content"]]
        return 200, message, reason

    server = ChatServer(reply)
    model = ModelAtEndpoint("m", ModelEndpoint(server.url, concurrency=2))
    asked = [ChatRequest(name, [{"role": "user", "content": name}], 0, Sampling(0.0)) for name in messages]
    texts = {own.id: (own.text, own.finish_reason) for replies in model.stream(asked) for own in replies}
    assert texts == {name: (text, reason) for name, (_, reason, text) in messages.items()}
    assert leave_at_once == [True] * 5  # no thread keeps a stopped process until its request ends
    server.http.shutdown()
    server.http.server_close()
