"""Options of the encoders as words of a command line: ``fit=resize num_slices=64 stages=1,2,3``."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

_TRUTH = {"true": True, "false": False}


def _truth(text: str) -> bool:
    if text not in _TRUTH:
        raise ValueError("expected true or false")
    return _TRUTH[text]


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError("expected a whole number") from error


def _three(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if len(words) != 3:
        raise ValueError("expected three whole numbers such as 2,3,4")
    return tuple(_whole(word) for word in words)


# Every option of any encoder -> how its text is read; which encoder has which is for load_volume_encoder to say.
OPTIONS: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {
        "feature": str,
        "fit": str,
        "image_size": _whole,
        "inner_norm": _truth,
        "intensity": str,
        "num_slices": _whole,
        "size": _whole,
        "stages": _three,
        "weights": str,
    }
)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments for ``load_volume_encoder`` from words ``name=value``.

    Raises:
        ValueError: not of this form, no such option, a value of another type, or an option given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise ValueError(f"option {word!r}: expected name=value, such as num_slices=64")
        if name not in OPTIONS:
            raise ValueError(f"option {word!r}: no encoder has {name!r}; the options are {', '.join(OPTIONS)}")
        if name in options:
            raise ValueError(f"option {name!r}: given twice")
        try:
            options[name] = OPTIONS[name](text)
        except ValueError as error:
            raise ValueError(f"option {word!r}: {error}") from error
    return options
