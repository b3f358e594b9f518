"""How a strategy corrects gradients, if by a sum: found by its own arithmetic, done to names."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, eq=False)
class Linear:
    """A sum of named arrays, each times a factor.

    ```
    x, y = Linear.of("x"), Linear.of("y")
    (2 * (x - y) + x).factors == {"x": 3.0, "y": -2.0}
    ```

    Whatever is not linear, a product of two or a square root, say, raises a TypeError.

    Attributes:
        factors: by name.
    """

    factors: Mapping[Hashable, float]

    @classmethod
    def of(cls, name: Hashable) -> Self:
        """Return the array of that name."""
        return cls({name: 1.0})

    def __add__(self, other: Any) -> Self:
        if not isinstance(other, Linear):
            return NotImplemented
        names = {**self.factors, **other.factors}
        return type(self)({n: self.factors.get(n, 0) + other.factors.get(n, 0) for n in names})

    def __mul__(self, factor: Any) -> Self:
        if not isinstance(factor, int | float):
            return NotImplemented
        return type(self)({name: its * factor for name, its in self.factors.items()})

    def __rmul__(self, factor: Any) -> Self:
        return self.__mul__(factor)

    def __neg__(self) -> Self:
        return self.__mul__(-1.0)

    def __sub__(self, other: Any) -> Self:
        return self.__add__(-other)

    def __truediv__(self, divisor: Any) -> Self:
        return self.__mul__(1 / divisor)
