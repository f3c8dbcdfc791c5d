"""Visual tokens: 1D and variable-length image tokenizers behind one API.

    import vistok
    tokenizer = vistok.load("vistok-mini")
    tokens = tokenizer.encode(vistok.to_tensor("photo.jpg", tokenizer.image_size))
    images = tokenizer.decode(tokens)

Everything is imported on first use, so `import vistok` and `vistok --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .images import to_pil, to_tensor
    from .loading import create, load
    from .optimise import optimise_tokens
    from .registry import list_tokenizers
    from .tokenizer import Tokenizer
    from .tokens import Tokens

__version__ = "0.1.0"

_HOMES = {
    "Tokenizer": "tokenizer",
    "Tokens": "tokens",
    "create": "loading",
    "list_tokenizers": "registry",
    "load": "loading",
    "optimise_tokens": "optimise",
    "to_pil": "images",
    "to_tensor": "images",
}
__all__ = [
    "Tokenizer",
    "Tokens",
    "create",
    "list_tokenizers",
    "load",
    "optimise_tokens",
    "to_pil",
    "to_tensor",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'vistok' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
