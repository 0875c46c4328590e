"""Where a checkpoint's files are, and what they say."""

import json
from pathlib import Path

from pns.errors import UserError

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py"]  # no second copy in *.bin


def local_directory(model_path: str) -> Path:
    """The directory of a checkpoint; a Hub id is downloaded, or found in the cache. UserError for neither."""
    if Path(model_path).is_dir():
        directory = Path(model_path)
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(model_path, allow_patterns=_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            neither = "is neither a directory nor a Hub id that can be fetched"
            raise UserError(f"model {model_path!r} {neither}: {error}") from error
    if not (directory / "config.json").is_file():
        raise UserError(f"model {model_path!r} has no config.json: name a Hugging Face checkpoint directory")
    return directory


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UserError if there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"model {str(directory)!r} has no *.safetensors: save it with save_pretrained")
    return files


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json. Raises UserError if none is set."""
    # In this order: chat models end turns with tokens that only their generation_config.json names.
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    raise UserError(
        f"model {str(directory)!r} sets no eos_token_id in generation_config.json or config.json: "
        "completions would never end"
    )
