"""The tiny world's word-level tokenizer: words carry their spaces, so joining tokens gives the exact text."""

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pns.tiny.world import NAMES

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "\N{REPLACEMENT CHARACTER}"
SOLVE, JUDGE, VERDICT = "<solve>", "<judge>", "<verdict>"

_MARKERS = (SOLVE, JUDGE, VERDICT, "<think>", "</think>", "\\boxed{", "}")
_PHRASES = (
    " has ",
    " more than ",
    " fewer than ",
    " times ",
    "half of ",
    " plus ",
    ". ",
    "How many has ",
    "? ",
    "So ",
    " for ",
    " ",
)
_WORDS: tuple[str, ...] = (*_MARKERS, *"0123456789", *NAMES, *_PHRASES, *"+-*/=")

# BOS + problem + <solve> + solution + EOS.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '" + SOLVE + "' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the tiny tokenizer knows the roles user and assistant, not ' "
    "+ message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '" + SOLVE + "' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every tiny model; `len` of it is the models' vocab_size.

    `decode(encode(text)) == text` for every text of the tiny world, with and without `skip_special_tokens`. A
    stretch of other text becomes one U+FFFD token, which stays visible in decoded text, as do the markers
    `<solve>`, `<judge>` and `<verdict>`: only padding, begin and end are special. Encoding adds no tokens;
    the chat template writes begin and end."""
    vocabulary = {word: index for index, word in enumerate((PAD, BOS, EOS, UNKNOWN, *_WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # As added tokens, longest match first, the words are found by every tokenizer class of transformers:
    # AutoTokenizer takes Qwen2Tokenizer for any Qwen2 model directory and keeps of a tokenizer.json little
    # more than the vocabulary and these.
    backend.add_tokens([AddedToken(word, normalized=False, special=False) for word in (UNKNOWN, *_WORDS)])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=PAD,  # only so that Qwen2Tokenizer adds no token of its own: unknown text becomes UNKNOWN
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # as generation wants it
        model_max_length=512,  # the models' positions
    )
