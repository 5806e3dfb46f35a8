"""Opens a model's folder: its configuration as the publisher wrote it, checked for what Plexor refuses to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from plexor.checkpoint.document import quote, read_object
from plexor.errors import CheckpointError

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"

_CODE_KEYS: Final = ("auto_map", "trust_remote_code")
_SAMPLING_KEYS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model's folder and the raw contents of its `config.json` and `generation_config.json` ({} if it has none)."""

    path: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The one name in `architectures`, by which a plugin serves the model."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f'{self.path / CONFIG_FILE} names no model class in "architectures" (it holds {quote(str(names))}); '
                'add the class that the weights were saved from, such as ["SomeForCausalLM"].'
            )
        if len(names) > 1:
            raise CheckpointError(
                f'{self.path / CONFIG_FILE} names {len(names)} model classes in "architectures" '
                f"({quote(', '.join(names))}), so it is not known which one the weights are for; keep one."
            )
        return str(names[0])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: of generation_config.json, else config.json, else its text_config."""
        text_config = self.config.get("text_config")
        for file, values in (
            (GENERATION_FILE, self.generation),
            (CONFIG_FILE, self.config),
            (CONFIG_FILE, text_config if isinstance(text_config, dict) else {}),
        ):
            found = values.get("eos_token_id")
            if found is not None:
                return _token_ids(found, self.path / file)
        return ()

    @property
    def default_sampling(self) -> Mapping[str, float]:
        """The publisher's advice on temperature, top_k, top_p, min_p and repetition_penalty, if it is to sample."""
        if self.generation.get("do_sample") is not True:
            return {}
        advice = {key: self.generation[key] for key in _SAMPLING_KEYS if self.generation.get(key) is not None}
        for key, value in advice.items():
            if type(value) not in (int, float):
                raise CheckpointError(
                    f"{self.path / GENERATION_FILE} sets {key} to {quote(str(value))}, which is no number; mend or "
                    "remove it."
                )
        return advice

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config`, which says how the weights are stored, or None where they are plain."""
        found = self.config.get("quantization_config")
        if found is None:
            return None
        if not isinstance(found, dict):
            raise CheckpointError(
                f'{self.path / CONFIG_FILE} has a "quantization_config" that is no object but {quote(str(found))}; '
                "download the file again."
            )
        return found


def open_folder(path: Path) -> ModelFolder:
    """Reads a folder's configuration; CheckpointError if there is none, if it is damaged or if it asks to run code."""
    if not path.exists():
        raise CheckpointError(_missing(path))
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file; give the folder that holds {CONFIG_FILE} and the weights, perhaps {path.parent}."
        )
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG_FILE}, so it is no model in Hugging Face layout; give the folder that holds one."
        )
    config = read_object(path / CONFIG_FILE)
    refuse_code(config, path / CONFIG_FILE)
    generation_file = path / GENERATION_FILE
    generation = read_object(generation_file) if generation_file.is_file() else {}
    return ModelFolder(path=path, config=config, generation=generation)


def refuse_code(document: Mapping[str, Any], file: Path) -> None:
    """Raises CheckpointError if a configuration, at any depth, asks for code of the checkpoint to be run."""
    for key in _code_keys(document, ""):
        raise CheckpointError(
            f'{file} asks to run code that comes with the checkpoint ("{key}"), which Plexor never does; '
            "use a version of the model without it, or write a plugin for it and remove the key."
        )


def _code_keys(value: Any, where: str) -> Iterator[str]:
    """The dotted places of set keys that name code; an empty `auto_map` or a false switch asks for nothing."""
    pending = [(where, value)]
    while pending:
        place, current = pending.pop()
        if isinstance(current, dict):
            for key, item in current.items():
                dotted = f"{place}.{key}" if place else key
                if key in _CODE_KEYS and item:
                    yield dotted
                pending.append((dotted, item))
        elif isinstance(current, list):
            pending.extend((f"{place}[{i}]", item) for i, item in enumerate(current))


def _missing(path: Path) -> str:
    parent = path.parent
    near = get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=3) if parent.is_dir() else []
    if near:
        return f"There is no folder {path}; did you mean {' or '.join(str(parent / name) for name in near)}?"
    if not parent.is_dir():
        return f"There is no folder {path}, nor the folder {parent} above it; check the path."
    return f"There is no folder {path}; check the path."


def _token_ids(found: Any, file: Path) -> tuple[int, ...]:
    ids = found if isinstance(found, list) else [found]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise CheckpointError(
            f"{file} sets eos_token_id to {quote(str(found))}, which is no token id or list of them; mend it."
        )
    return tuple(ids)
