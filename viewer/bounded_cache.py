"""What was made and may be wanted again, in no more memory than was allowed."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """The values used last, up to a number of bytes; the newest is kept even where it alone is larger.

    One value is made at a time: on one machine two would only make each other slower, and two readers of the same scan
    would make it twice.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int]) -> None:
        """``size``: of a value, in bytes."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._size = size
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``; ``make`` makes it where it is not here, and what it raises is raised."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            value = make()
            size = self._size(value)
            self._values[key] = value, size
            self.num_bytes += size
            while self.num_bytes > self.max_bytes and len(self._values) > 1:
                _, (_, dropped) = self._values.popitem(last=False)
                self.num_bytes -= dropped
            return value
