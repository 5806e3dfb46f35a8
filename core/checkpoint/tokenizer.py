"""Loads a checkpoint's tokenizer and chat template from its folder alone: text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from plexor.checkpoint.document import quote, read_object
from plexor.checkpoint.folder import refuse_code
from plexor.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from plexor.checkpoint.chat import ChatTemplate

TOKENIZER_FILE: Final = "tokenizer.json"
CONFIG_FILE: Final = "tokenizer_config.json"

_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OLDER_FILES: Final = frozenset(
    {"tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"}
)


class Tokenizer:
    """A vocabulary with what its checkpoint says about it.

    backend: the `tokenizers.Tokenizer`, from which a DecodeStream can be made. named_tokens: texts of "bos_token",
    "eos_token" and the like. vocab_size: one past the largest id. special_ids: what `decode` leaves out by default.
    """

    def __init__(self, backend: Backend, named_tokens: Mapping[str, str], template: str | None) -> None:
        self.backend = backend
        self.named_tokens = dict(named_tokens)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self._template = template

    @cached_property
    def _chat(self) -> ChatTemplate | None:
        """Made for the first conversation: plain prompts do without the library of templates."""
        if self._template is None:
            return None
        from plexor.checkpoint.chat import ChatTemplate

        return ChatTemplate(self._template, self.named_tokens)

    def _named_id(self, name: str) -> int | None:
        text = self.named_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; RequestError if the text is not valid Unicode or the vocabulary lacks a part of it.

        add_special_tokens: whether the checkpoint's own frame, such as a begin token, is put around it. A rendered
        chat has its special tokens in the text already.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"The prompt holds half of a surrogate pair (U+{ord(text[error.start]):04X} at character "
                f"{error.start}), which is no text; send valid Unicode.",
                field="prompt",
            ) from error
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # the library raises nothing narrower
            raise RequestError(f"The prompt cannot be put into tokens: {error}", field="prompt") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids without a token, which a padded output layer can produce, stand for no text."""
        try:
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except OverflowError as error:
            raise RequestError(f"Token ids must lie between 0 and {self.vocab_size - 1}.", field="token_ids") from error

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text that it continues, its leading space included; U+FFFD for a part of a character.

        It is read off as the second of two, because many decoders drop the space before the first token.
        """
        one = self.decode([token_id], skip_special_tokens=False)
        two = self.decode([token_id, token_id], skip_special_tokens=False)
        return two[len(one) :]

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raises CheckpointError if some token's id has no row in the embedding of a model with this vocabulary."""
        if self.vocab_size > model_vocab_size:
            largest = self.backend.id_to_token(self.vocab_size - 1)
            raise CheckpointError(
                f"The tokenizer knows token {quote(str(largest))} with id {self.vocab_size - 1}, but the model's "
                f"vocabulary has {model_vocab_size} entries; take tokenizer and weights from the same checkpoint."
            )

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on; encode it with add_special_tokens=False.

        messages: each with "role" and "content", a string or a list of parts. RequestError if there is no template or
        the template refuses the messages.
        """
        if self._chat is None:
            raise RequestError(
                "The model has no chat template, so it was not made for conversations; send a plain prompt instead, or "
                "put a chat_template.jinja into its folder.",
                field="messages",
            )
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder; CheckpointError if it has none, or a damaged one, or one that is code.

    `tokenizer.json` is read without transformers, whose import takes seconds; only folders with older files need it.
    Nothing is ever fetched from elsewhere.
    """
    config_file = folder / CONFIG_FILE
    config = read_object(config_file) if config_file.is_file() else {}
    refuse_code(config, config_file)
    template = _read_template(folder, config)
    if (folder / TOKENIZER_FILE).is_file():
        backend = _load_backend(folder / TOKENIZER_FILE)
        named_tokens = _named_tokens(folder, config)
        _add_tokens(backend, config, config_file)
        _mark_special(backend, named_tokens)
        backend.encode_special_tokens = config.get("split_special_tokens") is True
    else:
        backend, named_tokens = _convert_older_files(folder)
    backend.no_truncation()  # a file may carry the limits of its training run; a prompt is never cut silently
    backend.no_padding()
    return Tokenizer(backend, named_tokens, template)


def _load_backend(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file} is no tokenizer that can be read ({error}); download it again.") from error


def _convert_older_files(folder: Path) -> tuple[Backend, dict[str, str]]:
    """A vocabulary in an older layout, converted by transformers in memory."""
    if not any((folder / name).is_file() for name in _OLDER_FILES):
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}, nor any older tokenizer file; finish the download.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}, and converting its older tokenizer files takes transformers; "
            "run `pip install transformers`."
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, use_fast=True
        )
        backend = loaded.backend_tokenizer
    except Exception as error:  # whatever the conversion of a damaged file runs into
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}, and its older tokenizer files cannot be converted ({reason}); "
            "save the tokenizer again with transformers."
        ) from error
    if not isinstance(backend, Backend):
        raise CheckpointError(
            f"{folder} has no {TOKENIZER_FILE}, and its kind of tokenizer has no fast form; save it in that form."
        )
    return backend, dict(loaded.special_tokens_map)


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the named tokens; special_tokens_map.json counts only for configurations older than their token list."""
    older = folder / "special_tokens_map.json"
    values = dict(config)
    if "added_tokens_decoder" not in config and older.is_file():
        values |= read_object(older)
    named = {}
    for name in _NAMED:
        value = values.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
        elif value is not None:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} sets {name} to {quote(str(value))}, which is neither text nor token; mend it."
            )
    return named


def _add_tokens(backend: Backend, config: Mapping[str, Any], config_file: Path) -> None:
    """Tokens that were added after the vocabulary was written stand in the configuration; their ids must come out."""
    listed = config.get("added_tokens_decoder", {})
    known = {token_id: repr(token) for token_id, token in backend.get_added_tokens_decoder().items()}
    for token_id, token in _added_tokens(listed, config_file):
        if known.get(token_id) == repr(token):
            continue
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{config_file} gives token {quote(token.content)} the id {token_id}, but the vocabulary of "
                f"{TOKENIZER_FILE} gives it {found}; take both files from the same checkpoint."
            )


def _added_tokens(listed: Any, config_file: Path) -> list[tuple[int, AddedToken]]:
    """(id, token) of a configuration's list, ascending."""
    if not isinstance(listed, dict):
        raise _bad_added_tokens(config_file, "it is no object")
    tokens = []
    for token_id, fields in listed.items():
        if not token_id.isdecimal():
            raise _bad_added_tokens(config_file, f"{quote(token_id)} is no id")
        if not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
            raise _bad_added_tokens(config_file, f"token {token_id} has no text")
        flags = {flag: fields[flag] for flag in _TOKEN_FLAGS if flag in fields}
        if not all(isinstance(value, bool) for value in flags.values()):
            raise _bad_added_tokens(config_file, f"token {token_id} has a flag that is neither true nor false")
        tokens.append((int(token_id), AddedToken(fields["content"], **flags)))
    return sorted(tokens, key=lambda pair: pair[0])


def _bad_added_tokens(config_file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{config_file} has an added_tokens_decoder that does not map ids to tokens ({reason}); download it again."
    )


def _mark_special(backend: Backend, named_tokens: Mapping[str, str]) -> None:
    """Named tokens are special even where the vocabulary lists them among the others.

    One that the vocabulary lacks stays out: a new id would have no row in the model.
    """
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    ordinary = [text for text in named_tokens.values() if text not in added and backend.token_to_id(text) is not None]
    if ordinary:
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ordinary])


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template of the first place that has one: its own file, a processor's, the tokenizer's configuration."""
    own, processor = folder / "chat_template.jinja", folder / "chat_template.json"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{own} is not UTF-8 text (byte {error.start}); download it again.") from error
    if processor.is_file():
        return _chosen(read_object(processor).get("chat_template"), processor)
    return _chosen(config.get("chat_template"), folder / CONFIG_FILE)


def _chosen(found: Any, file: Path) -> str | None:
    """The template itself, or the one called "default" where there are several."""
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        if not isinstance(found.get("default"), str):
            names = ", ".join(str(name) for name in found)
            raise CheckpointError(
                f'{file} has chat templates of the names {quote(names)} but no "default"; rename the right one.'
            )
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{file} has a chat_template that is no text ({quote(str(found))}); mend or remove it.")
    return found
