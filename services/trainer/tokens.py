"""Counting and cutting text in a model's own tokens, without loading torch."""

from pathlib import Path


class Tokens:
    """The tokenizer of a model; `model` is a folder or a Hugging Face id."""

    def __init__(self, model: str) -> None:
        from tokenizers import Tokenizer  # not transformers: that would keep torch in memory for the whole run

        file = Path(model) / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(model)

    def count(self, text: str) -> int:
        """Tokens of a text, special tokens not added."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def cut(self, text: str, tokens: int) -> str:
        """The longest beginning of `text` with at most `tokens` tokens."""
        if tokens <= 0:
            return ""
        ends = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(ends) <= tokens else text[: ends[tokens - 1][1]]
