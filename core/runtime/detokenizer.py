"""From token ids to text as it streams: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 16
"""Prompt tokens that the stream is given to know, for instance, whether a space comes before the first word."""

REPLACEMENT = "\ufffd"


class TextDecoder:
    """A tokenizer and what is worth knowing of its vocabulary; made once, it starts a stream for each request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        byte_ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._byte_ids = frozenset(token_id for token_id in byte_ids if token_id is not None)

    def stream(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A stream of the text that continues a prompt."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return Detokenizer(self.tokenizer, prompt_ids, skipped=skipped, byte_ids=self._byte_ids)


class Detokenizer:
    """The text of one answer, piece by piece; joined, the pieces are decode(prompt + answer) less decode(prompt).

    Without a prompt they are exactly the full decode. A prompt that ends inside a character gives no context: the
    answer is then decoded on its own. A decoder that rewrites text that it has given before (some rewrite across
    tokens) cannot be streamed exactly; what has been given stands, and the stream goes on from there.

    Byte tokens such as <0xE2> are kept until the run of them ends, because one bad byte turns every byte of its run
    into a replacement character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skipped: frozenset[int] = frozenset(),
        byte_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._byte_ids = byte_ids
        self._bytes: list[int] = []  # the run of byte tokens that has not ended
        self._window = self._context(prompt_ids)  # ids whose text has been given last
        self._unseen: list[int] = []  # ids in the stream whose text has not been given
        self._stream = DecodeStream(ids=self._window, skip_special_tokens=False)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete, which may be empty."""
        known = self._bytes + [token_id for token_id in token_ids if not self._has_no_text(token_id)]
        end = len(known)
        while end and known[end - 1] in self._byte_ids:
            end -= 1
        new, self._bytes = known[:end], known[end:]
        if not new:
            return ""
        self._unseen += new
        piece = self._step(new)
        if piece is None:
            return ""
        self._window, self._unseen = self._unseen, []
        return piece

    def flush(self) -> str:
        """The rest at the end of the answer, a replacement character for each one that stays incomplete."""
        rest = self._unseen + self._bytes
        if not rest:
            return ""
        given = self._decode(self._window)
        text = self._decode(self._window + rest)
        self._window, self._unseen, self._bytes = rest, [], []
        self._stream = DecodeStream(ids=self._window, skip_special_tokens=False)
        return text.removeprefix(given) if text.startswith(given) else self._decode(rest)

    def _step(self, token_ids: list[int]) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token_ids)
        except Exception as error:  # tokenizers raises bare Exceptions
            if "prefix" not in str(error).lower():
                raise
        self._stream = DecodeStream(skip_special_tokens=False)
        return self._stream.step(self._tokenizer, self._unseen)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(context) == CONTEXT_TOKENS:
                break
            if not self._has_no_text(token_id):
                context.append(token_id)
        context.reverse()
        return [] if self._decode(context).endswith(REPLACEMENT) else context

    def _has_no_text(self, token_id: int) -> bool:
        """Skipped tokens, and the ids past the vocabulary that padded embeddings can produce."""
        return token_id in self._skipped or self._tokenizer.id_to_token(token_id) is None

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopScanner:
    """Finds the stop string that is complete first, over the borders of pieces, and holds back what may become one.

    Of two that end together the longer one counts, so the answer does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, str | None]:
        """(text that may be shown, stop string that ended the answer or None).

        armed: False while the answer has no more than min_tokens tokens: a stop string that ends in this text does
        not count then.
        """
        known = self._held + text
        found = self._first_stop(known) if armed else None
        if found is not None:
            start, end = found
            self._held = ""
            return known[: end if self._include_stop else start], known[start:end]
        split = len(known) - self._longest_beginning(known)
        self._held = known[split:]
        return known[:split], None

    def flush(self) -> str:
        """What was held back, when the answer has ended for another reason."""
        text, self._held = self._held, ""
        return text

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the first stop string that reaches into the new part of the text."""
        spans = []
        for stop in self._stop:
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                spans.append((start + len(stop), start))
        if not spans:
            return None
        end, start = min(spans)
        return start, end

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with but does not consist of."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
