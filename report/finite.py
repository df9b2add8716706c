"""Numbers out of tables that people wrote."""

import math
from collections.abc import Iterable
from typing import Any


def finite_numbers(texts: Iterable[Any]) -> list[float]:
    """The finite numbers among ``texts``; anything else, such as BIDS's ``n/a``, is left out."""
    found = []
    for text in texts:
        try:
            found.append(float(text))
        except (TypeError, ValueError):
            continue
    return [number for number in found if math.isfinite(number)]
