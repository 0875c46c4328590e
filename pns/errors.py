"""The one exception that is the user's to mend, and what helps to word it."""

import difflib
from collections.abc import Collection


class UserError(Exception):
    """Wrong input: one line that names what is wrong, where, and the way out; the command exits with 2."""


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown `word`: the known one that is near it, if any."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
