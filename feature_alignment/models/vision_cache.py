"""What does not depend on the question, of the clips read last: further questions about a clip do not encode it again.

A clip is found by its pixels: two clips are the same if all their values are equal. Comparing pixels takes a fraction of the time of a
cryptographic hash of them, and it cannot confuse two clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Clip:
    """Pixels, vision tokens, and the states on them for the prompt prefix read last."""

    pixels: Tensor
    vision: Tensor
    states: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


class VisionCache:
    """Vision tokens of the last few clips, and states on them.

    Args:
        size: number of clips that are kept
    """

    def __init__(self, size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size={size}: expected at least one clip")
        self.size = size
        self.hits = 0  # clips that did not have to be encoded
        self._clips: list[_Clip] = []  # the clip used last comes last

    def vision(self, pixels: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        """Vision tokens [1, e, d] of a clip.

        Args:
            pixels: [1, t, 3, h, w]; a copy is kept
            encode: computes the vision tokens of a new clip
        """
        at = next((i for i, clip in enumerate(self._clips) if _is_same(clip.pixels, pixels)), None)
        if at is None:
            self._clips.append(_Clip(pixels.clone(), encode()))
            del self._clips[: -self.size]
        else:
            self.hits += 1
            self._clips.append(self._clips.pop(at))
        return self._clips[-1].vision

    def states(self, vision: Tensor, prefix: tuple[int, ...], read: Callable[[], Tensor]) -> Tensor:
        """States on the vision tokens of a clip.

        Args:
            vision: vision tokens; only those that `vision` returned are known
            prefix: token ids of the prompt up to the last vision token
            read: computes the states of an unknown clip or prefix
        """
        clip = next((clip for clip in self._clips if clip.vision is vision), None)
        if clip is None:
            return read()
        if prefix not in clip.states:
            clip.states = {prefix: read()}
        return clip.states[prefix]

    def clear(self) -> None:
        """Forget all clips."""
        self._clips.clear()


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
