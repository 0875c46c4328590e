"""A client of an OpenAI-compatible server, and what became of a request in a word."""

import os
from typing import Any

import openai


def make_client(
    url: str, key_variable: str, deadline_seconds: float, retries: int
) -> tuple[openai.OpenAI, dict[str, Any]]:
    """The client and the headers of its requests; the key is in the environment (unset: none is sent).

    A request without an answer within the deadline, or with an error of the server, is repeated `retries`
    times; the pauses between grow, or are those that the server asks for.
    """
    key = os.environ.get(key_variable, "")
    # Not what the library reads from variables of its own: those may be meant for another server.
    not_sent = ("OpenAI-Organization", "OpenAI-Project", *(() if key else ("Authorization",)))
    headers: dict[str, Any] = dict.fromkeys(not_sent, openai.Omit())
    client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=deadline_seconds, max_retries=retries)
    return client, headers


def cause_of(error: Exception) -> str:
    """One of "timeout", "connection", "refused", "rate_limit", "server_error", "bad_request", "bad_reply" (no
    chat completion)."""
    if isinstance(error, openai.APITimeoutError):  # before its base class
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "connection"
    if not isinstance(error, openai.APIStatusError):
        return "bad_reply"
    by_status = {401: "refused", 403: "refused", 404: "refused", 408: "timeout", 429: "rate_limit"}
    other = "bad_request" if error.status_code < 500 else "server_error"
    return by_status.get(error.status_code, other)
