"""Batches of pictures, decoded and preprocessed while the networks are busy with the batch before."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from PIL import Image

from lyrics.model.pictures import Pictures, Recipes

T = TypeVar("T")
_BATCHES = 2  # decoded beforehand: what waits in memory is bounded by the size of a batch


def ahead(batches: Iterable[Sequence[T]], decode: Callable[[Sequence[T]], list[Image.Image]]) -> Iterator[Pictures]:
    """The pictures of each batch, in order."""
    recipes: Recipes = {}

    def make(batch: Sequence[T]) -> Pictures:
        return Pictures(decode(batch), recipes).prepare()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[concurrent.futures.Future[Pictures]] = collections.deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(make, batch))
                if len(waiting) > _BATCHES:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
