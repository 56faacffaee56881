"""From text to tokens and back: a folder's tokenizer, bytes, or the numbers themselves."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jax_kvcache.checkpoints.errors import CheckpointError
from jax_kvcache.checkpoints.json_files import read_json

BYTES = "Utf8Bytes"  # in tokenizer_config.json: token n is byte n


class Tokenizer(Protocol):
    """What turns a text into tokens."""

    unit: str  # what a token is called

    def encode(self, text: bytes) -> np.ndarray:
        """[N] int32 of a UTF-8 text.

        Raises:
          ValueError: the text is not what this tokenizer reads.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; U+FFFD where they end within a character."""
        ...


class ByteTokenizer:
    """Token n is byte n."""

    unit = "byte"

    def encode(self, text: bytes) -> np.ndarray:
        """See `Tokenizer`; any bytes will do."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def decode(self, tokens: list[int]) -> str:
        """See `Tokenizer`."""
        return bytes(tokens).decode(errors="replace")


class NumberTokenizer:
    """For a folder without a tokenizer: a text is the tokens' numbers with spaces between."""

    unit = "token"

    def __init__(self, vocab: int):
        """Takes the size of the vocabulary."""
        self.vocab = vocab

    def encode(self, text: bytes) -> np.ndarray:
        """See `Tokenizer`."""
        words = text.split()
        # Python refuses to read numbers of thousands of digits.
        wrong = [w for w in words if not w.isdigit() or len(w) > 10 or int(w) >= self.vocab]
        if wrong:
            raise ValueError(
                "the folder has no tokenizer.json, so the text must be numbers of tokens in "
                f"[0, {self.vocab}) with spaces between, got {wrong[0][:40]!r}."
            )
        return np.array([int(w) for w in words], np.int32)

    def decode(self, tokens: list[int]) -> str:
        """See `Tokenizer`."""
        return "".join(f"{token} " for token in tokens)


class TextTokenizer:
    """A tokenizer.json, read by the `tokenizers` package."""

    unit = "token"

    def __init__(self, tokenizer: Any, vocab: int):
        """Takes a `tokenizers.Tokenizer` and the size of the model's vocabulary."""
        self.tokenizer, self.vocab = tokenizer, vocab

    def encode(self, text: bytes) -> np.ndarray:
        """See `Tokenizer`; with the special tokens that the tokenizer puts before a text."""
        try:
            tokens = np.array(self.tokenizer.encode(text.decode()).ids, np.int32)
        except UnicodeDecodeError as error:
            raise ValueError(f"the text must be UTF-8: {error}.") from error
        if (tokens >= self.vocab).any():
            raise ValueError(
                f"tokenizer.json must have tokens in [0, {self.vocab}), the model's vocabulary, "
                f"got {max(tokens.tolist())}."
            )
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """See `Tokenizer`."""
        return self.tokenizer.decode(tokens)


def load_tokenizer(folder: str | os.PathLike[str], vocab: int) -> Tokenizer:
    """A folder's tokenizer.

    Args:
      folder: with a tokenizer.json, or a tokenizer_config.json whose `tokenizer_class` is
        "Utf8Bytes", or with neither: then a text is the tokens' numbers.
      vocab: the size of the model's vocabulary.

    Raises:
      ImportError: there is a tokenizer.json and no `tokenizers` package.
      CheckpointError: a file cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if path.is_file():
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"'{path}' needs the package tokenizers: pip install 'jax-kvcache[tokenizers]'."
            ) from error
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise CheckpointError(f"cannot read '{path}': {error}.") from error
        tokenizer.no_truncation()  # a file may have what its training used
        tokenizer.no_padding()
        return TextTokenizer(tokenizer, vocab)
    facts = path.with_name("tokenizer_config.json")
    if facts.is_file() and read_json(facts).get("tokenizer_class") == BYTES:
        if vocab != 256:
            raise CheckpointError(
                f"'{facts}' says that tokens are bytes, and the model has {vocab} tokens, not 256."
            )
        return ByteTokenizer()
    return NumberTokenizer(vocab)
