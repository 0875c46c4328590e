"""The format term of a completion (the text rules of the composite reward)."""

from dataclasses import dataclass

from pns.answers.extract import boxed_span

THINK_TAGS = ("<think>", "</think>")  # around the reasoning of a model that has a block for it


@dataclass(frozen=True)
class FormatCheck:
    """`reason` is "" when `ok`, else the first rule broken: not_ended, no_reasoning_block,
    several_reasoning_blocks, text_before_reasoning, unclosed_reasoning_block, several_answers, no_answer,
    unclosed_answer or text_after_answer."""

    ok: bool
    reason: str = ""


def check_format(text: str, finish_reason: str, reasoning_block: bool = True) -> FormatCheck:
    r"""Exactly one reasoning block at the start (of a model that writes one: `reasoning_block`), exactly one
    non-empty `\boxed{...}` after it, nothing behind the box, ended by EOS.

    `text` is the completion without special tokens, from the opening of the block on, also where the prompt
    opens it (`pns.data.prompts.Prompts.decode`). Before the box text is allowed ("The answer is"), and a full
    stop, `$` or a closing `\)`, `\]` behind it is not counted as text. Boxes inside the block do not count.
    `finish_reason` is "stop" when the model ended by itself.
    """
    if finish_reason != "stop":
        return FormatCheck(False, "not_ended")
    if not reasoning_block:
        return _check_answer(text)
    opening, closing = THINK_TAGS
    if opening not in text:
        return FormatCheck(False, "no_reasoning_block")
    if closing not in text:
        return FormatCheck(False, "unclosed_reasoning_block")
    if text.count(opening) > 1 or text.count(closing) > 1:
        return FormatCheck(False, "several_reasoning_blocks")
    before, _, rest = text.partition(opening)
    if before.strip():
        return FormatCheck(False, "text_before_reasoning")
    if closing not in rest:
        return FormatCheck(False, "unclosed_reasoning_block")
    return _check_answer(rest.partition(closing)[2])


def _check_answer(final: str) -> FormatCheck:
    num_boxes = final.count(r"\boxed") + final.count(r"\fbox")
    if num_boxes > 1:
        return FormatCheck(False, "several_answers")
    span = boxed_span(final)
    if span is None:
        return FormatCheck(False, "unclosed_answer" if num_boxes else "no_answer")
    if not final[slice(*span)].strip():
        return FormatCheck(False, "no_answer")
    if final[span[1] + 1 :].strip("$. \n") not in ("", r"\)", r"\]"):
        return FormatCheck(False, "text_after_answer")
    return FormatCheck(True)
