"""Vision tokens of the clips encoded last, so that further questions about a clip do not encode it again.

A clip is found by its pixels: two clips are the same if all their values are equal. On a CPU this comparison takes a fraction of the time
of a cryptographic hash of the same pixels, and it cannot confuse two clips.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class VisionCache:
    """The vision tokens of the last few clips.

    Args:
        size: number of clips that are kept
    """

    def __init__(self, size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size={size}: expected at least one clip")
        self.size = size
        self.hits = 0  # clips that did not have to be encoded
        self._clips: list[tuple[Tensor, Tensor]] = []  # pixels and vision tokens; the clip used last comes last

    def get(self, pixels: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """Vision tokens of a clip.

        Args:
            pixels: [1, t, 3, h, w]; a copy is kept
            encode: computes the clip's vision tokens [1, e, d] if they are not in the cache
        """
        at = next((i for i, (known, _) in enumerate(self._clips) if _is_same(known, pixels)), None)
        if at is None:
            self._clips.append((pixels.clone(), encode()))
            del self._clips[: -self.size]
        else:
            self.hits += 1
            self._clips.append(self._clips.pop(at))
        return self._clips[-1][1]

    def clear(self) -> None:
        """Forget all clips."""
        self._clips.clear()


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
