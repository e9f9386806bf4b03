"""Tokens to text as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "�"  # what a decoder makes of the first bytes of a character


class TextStream:
    """Takes one sequence's new tokens and writes their text in pieces.

    A piece may lag behind its token: while a character lacks bytes, and while the text could still become a stop string.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], stop_strings: Sequence[str] = ()
    ) -> None:
        """
        Args:
            tokenizer: of the model; its special tokens are left out of the text.
            write: is called with each piece.
            stop_strings: the text ends before the first of them; none is empty.
        """
        self.stopped = False  # whether a stop string has come
        self._tokenizer = tokenizer
        self._write = write
        self._stop_strings = tuple(stop_strings)
        # Ids not yet written, after those of the piece before: many tokenizers decode a token by what stands before it.
        self._ids: list[int] = []
        self._num_context = 0
        self._held = ""  # text that could be the beginning of a stop string

    def push(self, token: int) -> None:
        """Takes the next token's id; ignores it where the text has stopped."""
        if not self.stopped:
            self._take(self._decode(token))

    def end(self) -> None:
        """Writes what was held back, except a character that never got all its bytes."""
        if not self.stopped:
            self._emit(self._held)
        self._held = ""

    def _decode(self, token: int) -> str:
        self._ids.append(token)
        before, now = (
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self._ids[: self._num_context], self._ids)
        )
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self._ids = self._ids[self._num_context :]
        self._num_context = len(self._ids)
        return now[len(before) :]

    def _take(self, piece: str) -> None:
        text = self._held + piece
        found = [start for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._emit(text[: min(found)])
            return
        num_held = self._length_of_a_beginning(text)
        self._emit(text[: len(text) - num_held])
        self._held = text[len(text) - num_held :]

    def _length_of_a_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stop_strings)
            ),
            0,
        )

    def _emit(self, text: str) -> None:
        if text:
            self._write(text)
