"""A batch of pictures, and what is computed from them alone: once, whoever asks, and ahead of the networks."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from PIL import Image

T = TypeVar("T")
Recipes: TypeAlias = dict[Hashable, Callable[[Sequence[Image.Image]], Any]]


class Pictures(list[Image.Image]):
    """Pictures that remember what was made of them.

    Batches that share their `recipes` learn from each other what will be asked for: `prepare` makes it, in another
    thread, while the networks are busy with the batch before.
    """

    def __init__(self, images: Iterable[Image.Image], recipes: Recipes | None = None) -> None:
        super().__init__(images)
        self._recipes: Recipes = {} if recipes is None else recipes
        self._made: dict[Hashable, Any] = {}

    def prepare(self) -> "Pictures":
        """Make what earlier batches were asked for."""
        for key, make in list(self._recipes.items()):
            self._made.setdefault(key, make(self))
        return self

    def once(self, key: Hashable, make: Callable[[Sequence[Image.Image]], T], ahead: bool) -> T:
        if ahead:
            self._recipes.setdefault(key, make)
        if key not in self._made:
            self._made[key] = make(self)
        return self._made[key]

    def made(self, key: Hashable) -> Any:
        return self._made.get(key)


def once(images: Sequence[Image.Image], key: Hashable, make: Callable[[Sequence[Image.Image]], T], *, ahead: bool) -> T:
    """`make(images)`, at most once for `Pictures`; equal keys must mean equal results.

    Args:
        ahead: it needs no network, so later batches may have it made before they are asked.
    """
    return images.once(key, make, ahead) if isinstance(images, Pictures) else make(images)


def made(images: Sequence[Image.Image], key: Hashable) -> Any:
    """What was made of `Pictures` under that key; None where nothing was."""
    return images.made(key) if isinstance(images, Pictures) else None
