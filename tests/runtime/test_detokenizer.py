"""Streamed text equals the full decode, whatever the tokens; stop strings are found however the text is cut."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from plexor.runtime.detokenizer import REPLACEMENT, StopScanner, TextDecoder

TEXT = ["the cat sat on the mat", "größe über straße", "日本語のテキスト", "😀 smile 😀", "hello  two spaces"]


@cache
def byte_level() -> TextDecoder:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_tokens([AddedToken("<plain>", special=False)])
    return TextDecoder(tokenizer)


@cache
def sentencepiece_like() -> TextDecoder:
    words = ["▁", "▁the", "▁cat", "s", "a", "é", "日本", "▁▁", ".", REPLACEMENT]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TextDecoder(tokenizer)


@cache
def metaspace() -> TextDecoder:
    tokens = ["<unk>", "<s>", "▁", "▁the", "▁cat", "s", "a", "日本", "▁▁x"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return TextDecoder(tokenizer)


@cache
def word_piece() -> TextDecoder:
    tokens = ["[UNK]", "[SEP]", "do", "##ing", "n", "'", "t", ".", "##s", "was"]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    return TextDecoder(tokenizer)


KINDS = {"byte_level": byte_level, "sentencepiece_like": sentencepiece_like, "metaspace": metaspace}
STREAMED = {**KINDS, "word_piece": word_piece}


def random_ids(decoder: TextDecoder) -> st.SearchStrategy[list[int]]:
    """Ids of the vocabulary and a few past it; small ones, which are special or bytes, are as likely as all others."""
    size = decoder.tokenizer.get_vocab_size()
    return st.lists(st.one_of(st.integers(0, size + 2), st.integers(max(0, size - 12), size - 1), st.integers(0, 3)))


def id_of(decoder: TextDecoder, token: str) -> int:
    token_id = decoder.tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def streamed(decoder: TextDecoder, prompt: list[int], ids: list[int], skip: bool) -> str:
    stream = decoder.stream(prompt, skip_special_tokens=skip)
    return "".join([stream.push([token_id]) for token_id in ids]) + stream.flush()


@pytest.mark.parametrize("kind", STREAMED)
@settings(derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_joined_pieces_are_the_full_decode(kind: str, data: st.DataObject, skip: bool) -> None:
    decoder = STREAMED[kind]()
    ids = data.draw(random_ids(decoder))
    assert streamed(decoder, [], ids, skip) == decoder.tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", STREAMED)
@settings(derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_text_continues_the_prompt(kind: str, data: st.DataObject, skip: bool) -> None:
    decoder = STREAMED[kind]()
    prompt, ids = data.draw(random_ids(decoder)), data.draw(random_ids(decoder))
    before = decoder.tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = decoder.tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    if before.endswith(REPLACEMENT) or not whole.startswith(before):
        return  # the prompt ends inside a character
    assert before + streamed(decoder, prompt, ids, skip) == whole


@settings(derandomize=True)
@given(data=st.data())
def test_cutting_the_ids_differently_changes_nothing(data: st.DataObject) -> None:
    decoder = sentencepiece_like()
    ids = data.draw(random_ids(decoder))
    cut = data.draw(st.integers(0, len(ids)))
    stream = decoder.stream()
    assert stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.flush() == streamed(decoder, [], ids, True)


def test_a_character_comes_whole() -> None:
    decoder = byte_level()
    ids = [id_of(decoder, token) for token in pre_tokenizers.ByteLevel(False).pre_tokenize_str("🦖")[0][0]]
    stream = decoder.stream()
    assert [stream.push([token_id]) for token_id in ids] == ["", "", "", "🦖"]
    assert stream.flush() == ""


def test_a_word_after_a_prompt_keeps_its_space() -> None:
    decoder = sentencepiece_like()
    the, cat = id_of(decoder, "▁the"), id_of(decoder, "▁cat")
    assert decoder.stream([the]).push([cat]) == " cat"
    assert decoder.stream().push([cat]) == "cat"


def test_an_unfinished_character_is_flushed_as_a_replacement() -> None:
    decoder = byte_level()
    first = id_of(decoder, pre_tokenizers.ByteLevel(False).pre_tokenize_str("é")[0][0][0])
    stream = decoder.stream()
    assert stream.push([first]) == ""
    assert stream.flush() == REPLACEMENT
    assert stream.flush() == ""


def test_special_tokens_are_left_out_or_kept() -> None:
    decoder = byte_level()
    end = id_of(decoder, "<|end|>")
    assert streamed(decoder, [], [end], skip=True) == ""
    assert streamed(decoder, [], [end], skip=False) == "<|end|>"


def test_a_decoder_that_rewrites_its_past_does_not_stop_the_stream() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    assert tokenizer.decode([0, 1, 2]) == "Xc"
    assert streamed(TextDecoder(tokenizer), [], [0, 1, 2, 2], skip=True) == "abcc"


def scan(stop: tuple[str, ...], pieces: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    scanner = StopScanner(stop, include_stop=include_stop)
    shown = ""
    for piece in pieces:
        text, found = scanner.push(piece)
        shown += text
        if found is not None:
            return shown, found
    return shown + scanner.flush(), None


@settings(derandomize=True)
@given(
    text=st.text("ab", max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(tuple),
    cuts=st.lists(st.integers(0, 12)),
    include_stop=st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cuts(
    text: str, stop: tuple[str, ...], cuts: list[int], include_stop: bool
) -> None:
    ends = [(text.find(string) + len(string), text.find(string)) for string in stop if string in text]
    end, start = min(ends, default=(len(text), len(text)))
    expected = text[: end if include_stop else start], text[start:end] if ends else None
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[low:high] for low, high in pairwise(borders)]
    assert scan(stop, pieces, include_stop) == expected


def test_only_what_may_become_a_stop_string_is_held() -> None:
    scanner = StopScanner(["\n\nUser:"])
    assert scanner.push("Hello\n") == ("Hello", None)
    assert scanner.push("there") == ("\nthere", None)
    assert scanner.push("\n\nUse") == ("", None)
    assert scanner.push("r: more") == ("", "\n\nUser:")


def test_min_tokens_disarms_the_scanner() -> None:
    scanner = StopScanner(["ab", "xabyz"])
    assert scanner.push("ab", armed=False) == ("ab", None)
    assert scanner.push("xab", armed=False) == ("", None)
    assert scanner.push("c") == ("xabc", None)
    assert scanner.push("a", armed=False) == ("", None)
    assert scanner.push("b!") == ("", "ab")
