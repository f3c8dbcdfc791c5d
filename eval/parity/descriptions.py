"""Numbers that the descriptions of recorded tensors state."""

import re


def numbers(text: str) -> list[float]:
    """All numbers of a text."""
    return [float(number) for number in re.findall(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", text)]


def number_after(text: str, word: str) -> float | None:
    """The number that follows a word in a description."""
    match = re.search(rf"{word}\s*=?\s*([-+]?\d*\.?\d+)", text)
    return float(match[1]) if match else None
