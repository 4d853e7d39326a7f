"""The token-level adapter of the earlier attempt, trained here: EventGPT's own text in, Video-LLaVA's text out, token by token.

    e0  e1  e2  …     EventGPT's free-running text           embedding 512 -> four causal layers -> logits over the vocabulary
     |   |   |
    p0  p1  p2  …     p[t] reads e[0..t] and predicts the target's token t; it reads no hidden state and no target token

At the released vocabulary of 32,000 it has 45 M parameters. The earlier attempt scored it shifted by one position; here p[t] is compared
with the target's token t, in the rounds that decoding would form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.cli.console import progress

WIDTH, LAYERS, HEADS = 512, 4, 8
PAD = -100  # label of positions after the target's text


class TokenAdapter(nn.Module):
    """Causal transformer encoder from the drafter's tokens to the target's tokens at the same positions."""

    def __init__(self, vocabulary: int, longest: int) -> None:
        """Build an adapter with random weights.

        Args:
            vocabulary: Number of token ids of both texts.
            longest: Largest number of positions it can read.
        """
        super().__init__()
        self.geometry = {"vocabulary": vocabulary, "longest": longest}
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(longest, WIDTH)  # names are keys of saved adapters
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits [b, s, v] of the target's tokens at the positions of EventGPT's tokens [b, s] int64."""
        s = token_ids.shape[1]
        x = self.tokens(token_ids) + self.places(torch.arange(s, device=token_ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(s, device=token_ids.device)
        logits: Tensor = self.head(self.layers(x, mask=mask, is_causal=True))
        return logits


def padded(texts: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    """Texts as [n, width] int64, truncated or padded at the end with `fill`."""
    return torch.tensor([[*t[:width], *[fill] * (width - len(t))] for t in texts])


def padded_pairs(rows: Sequence[dict[str, Any]], width: int, eos_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of the adapter.

    Args:
        rows: With `egpt_tokens` and `vl_tokens`.
        width: Positions per row.
        eos_id: End-of-text id, which pads EventGPT's text.

    Returns:
        EventGPT's tokens and the target's tokens, [n, width] int64 each; labels after the target's text are PAD.
    """
    return padded([r["egpt_tokens"] for r in rows], width, eos_id), padded([r["vl_tokens"] for r in rows], width, PAD)


def train_token_adapter(
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    vocabulary: int,
    longest: int,
    num_epochs: int,
    device: str,
    seed: int,
    eos_id: int,
) -> tuple[TokenAdapter, list[float]]:
    """Train with cross-entropy and AdamW; the epoch with the best validation accuracy is returned.

    Args:
        train: Rows with `egpt_tokens` and `vl_tokens` of at most `longest` tokens.
        validation: Rows of the same kind, of other clips.
        vocabulary: Number of token ids.
        longest: Positions of the adapter.
        num_epochs: Passes over the training rows.
        device: Device of the training.
        seed: Of weights and batch order.
        eos_id: End-of-text id, which pads EventGPT's text.

    Returns:
        The adapter and the validation accuracy of every epoch.
    """
    torch.manual_seed(seed)
    model = TokenAdapter(vocabulary, longest).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    inputs, labels = (x.to(device) for x in padded_pairs(train, longest, eos_id))
    accuracies, best = [], model.state_dict()
    for _ in progress(range(num_epochs), desc="token adapter", unit="epoch"):
        model.train()
        for rows in torch.randperm(len(inputs)).split(32):
            loss = F.cross_entropy(model(inputs[rows]).flatten(0, 1), labels[rows].flatten(), ignore_index=PAD)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        num_matches = float(token_matches(model.eval(), validation, eos_id).double().sum())
        accuracies.append(num_matches / sum(len(r["vl_tokens"]) for r in validation))
        if accuracies[-1] == max(accuracies):
            best = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    return model.eval(), accuracies


@torch.inference_mode()
def token_matches(model: TokenAdapter, rows: Sequence[dict[str, Any]], eos_id: int) -> Tensor:
    """Where the adapter's argmax equals the target's token.

    Args:
        model: Trained adapter.
        rows: n rows with `egpt_tokens` and `vl_tokens`.
        eos_id: End-of-text id, which pads EventGPT's text.

    Returns:
        [n, longest] bool; False after the target's text.
    """
    inputs, labels = padded_pairs(rows, model.geometry["longest"], eos_id)
    device = model.head.weight.device
    predicted = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in inputs.split(64)])
    return predicted == labels
