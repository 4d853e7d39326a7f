"""The target's states with those of two earlier layers beside them, as EAGLE-3 reads them (Li et al. 2503.01840); for `ablations.py`.

The answers of a split are read again, all questions of a clip after one prefill. A fused state is [layer n/3, layer 2n/3, last layer]; the
LM head and the embeddings get zeros for the two earlier layers, so that everything else is trained and scored as it is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.cli.config import Common
from feature_alignment.inputs.samples import read_samples
from feature_alignment.models.batches import ClipBatch, plan_batches
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.pair import load_target
from feature_alignment.storage.hidden_states import HiddenStates

BATCH = 48  # questions read together


def target_with_layers(cfg: Common, vocab_size: int) -> Decoder:
    """Video-LLaVA whose hidden states are those of three layers side by side."""
    target = load_target(cfg)
    n = target.num_layers
    # Decoder takes its tapped layers when it is made; load_target has no such argument, because only this benchmark asks for it.
    target.taps = (max(1, n // 3), max(2, 2 * n // 3), n)
    target.hidden_size = 3 * target.width
    target.restrict_vocabulary(vocab_size)
    target.pack_linear()
    return target


@torch.inference_mode()
def fused(states: HiddenStates, split: str, target: Decoder, cfg: Common) -> HiddenStates:
    """`states` with target states [n, s, 3 d]; zeros for the prompt's, which this adapter does not read.

    Raises:
        ValueError: if the last layer's states are not those that were stored
    """
    by_id = {sample.id: sample for sample in read_samples(cfg.manifests, split)}
    samples = [by_id[row["id"]] for row in states.rows]
    wide = torch.zeros(*states.target.shape[:2], target.hidden_size)
    for rows in plan_batches(samples, BATCH):
        texts = [states.token_ids[row, : int(states.lengths[row])].tolist() for row in rows]
        for row, found in zip(rows, ClipBatch(target, [samples[row] for row in rows]).states(texts), strict=True):
            wide[row, : len(found)] = found
    last = wide[..., -target.width :]
    if not torch.allclose(last, states.target.float(), atol=1e-2 * float(states.target.float().abs().max())):
        raise ValueError(f"{split}: the states read again differ from those stored by {float((last - states.target.float()).abs().max())}")
    nothing = torch.zeros(1, 1, 1)
    assert states.prompt is not None
    prompt = nothing.expand(len(states.rows), states.prompt.shape[1], target.hidden_size)
    return dataclasses.replace(states, target=wide, prompt=prompt, prompt_inputs=prompt)


def beside_zeros(matrix: Tensor) -> Tensor:
    """LM head or embeddings [v, d] as [v, 3 d] for fused states."""
    return F.pad(matrix.float(), (2 * matrix.shape[1], 0))
