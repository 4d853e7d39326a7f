"""Standardized inputs during training, for the adapters that read states, tokens and events."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class InputScale(NamedTuple):
    """Mean and standard deviation per channel of the inputs. Channels differ in size by orders of magnitude."""

    target: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]
    event: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, target: Tensor, embeddings: Tensor, events: Tensor) -> InputScale:
        """The scale of a sample.

        Args:
            target: [p, d_target], the target's states
            embeddings: [v, d_target], its input embeddings
            events: [.., d_event], EventGPT's event states
        """
        return cls(*(_mean_and_std(x.float()) for x in (target, embeddings, events.flatten(0, -2))))


def standardized(x: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    """Map x [.., d] to mean 0 and standard deviation 1 per channel, by (mean, standard deviation), [d] each."""
    return (x - scale[0]) / scale[1]


def _mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.std(0, correction=0).clamp(min=1e-4)
