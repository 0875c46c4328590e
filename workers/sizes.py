"""Sizes that workers go by and `pns plan` counts with; without imports, so that a plan starts no library."""

# Float32 logits that the head of a policy holds at once, in numbers: a piece that stays in a CPU's cache, and
# one whose products take a GPU longer than adding it to the weight's float32 gradient, once a piece.
PIECE_LOGITS = {"cpu": 2**22, "cuda": 2**28}

# Tokens of a forward pass of a reward model or judge, padding included, where `pool.batch_tokens` is 0. On a
# CPU larger ones leave the cache: on one core a classifier of 0.8 M parameters scored 700 rows of 60 tokens a
# second with 2,048 tokens, 410 with 16,384.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}

# Of weights on their way to rollout, beside the store's; a larger tensor travels alone.
WEIGHTS_BUCKET_BYTES = 256 * 2**20

# Prompts and completions of one step of vLLM on a GPU: its own 2,048 would prefill a few prompts at a time.
VLLM_BATCHED_TOKENS = 8192

# A judge on vLLM: its share of the memory of what the replica has of a GPU, and sequences at once.
VLLM_JUDGE_SHARE = 0.85
VLLM_JUDGE_BATCH = 256
