"""The token-level adapter of the earlier attempt, trained here: EventGPT's own text in, Video-LLaVA's text out, token for token.

    e0  e1  e2  …     what EventGPT says on its own          embedding 512 -> four causal layers -> logits over the vocabulary
     |   |   |
    p0  p1  p2  …     p[t] reads e[0..t] and is to be the target's token t: with no hidden state and no text of the target's

At the released vocabulary of 32,000 it has 45 M parameters. The earlier attempt scored it one place off; here p[t] is compared with
the target's token t, in the rounds decoding would form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feature_alignment.cli.console import progress

WIDTH, LAYERS, HEADS = 512, 4, 8
PAD = -100


class TokenAdapter(nn.Module):
    """vocabulary: of both texts; longest: positions it can read"""

    def __init__(self, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.geometry = {"vocabulary": vocabulary, "longest": longest}
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(longest, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, token_ids: Tensor) -> Tensor:
        """EventGPT's tokens [b, s] int64 -> logits [b, s, v] of the target's tokens in the same places."""
        s = token_ids.shape[1]
        x = self.tokens(token_ids) + self.places(torch.arange(s, device=token_ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(s, device=token_ids.device)
        return self.head(self.layers(x, mask=mask, is_causal=True))


def padded(texts: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    """[n, width] int64, cut or filled behind."""
    return torch.tensor([[*t[:width], *[fill] * (width - len(t))] for t in texts])


def pairs_of(rows: Sequence[dict[str, Any]], width: int) -> tuple[Tensor, Tensor]:
    """EventGPT's tokens (2, the end, goes on where its text is over) and the target's (PAD where its text is over): [n, width] each."""
    return padded([r["egpt_tokens"] for r in rows], width, 2), padded([r["vl_tokens"] for r in rows], width, PAD)


def train_token_adapter(
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    vocabulary: int,
    longest: int,
    num_epochs: int,
    device: str,
    seed: int,
) -> tuple[TokenAdapter, list[float]]:
    """Cross-entropy, AdamW; the epoch with the best validation accuracy is kept. Returns it and every epoch's accuracy.

    train, validation: rows with `egpt_tokens` and `vl_tokens`, of at most `longest` tokens
    """
    torch.manual_seed(seed)
    model = TokenAdapter(vocabulary, longest).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    read, wanted = (x.to(device) for x in pairs_of(train, longest))
    accuracies, best = [], model.state_dict()
    for _ in progress(range(num_epochs), desc="token adapter", unit="epoch"):
        model.train()
        for rows in torch.randperm(len(read)).split(32):
            loss = F.cross_entropy(model(read[rows]).flatten(0, 1), wanted[rows].flatten(), ignore_index=PAD)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        accuracies.append(float(matches(model.eval(), validation).double().sum()) / sum(len(r["vl_tokens"]) for r in validation))
        if accuracies[-1] == max(accuracies):
            best = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    return model.eval(), accuracies


@torch.inference_mode()
def matches(model: TokenAdapter, rows: Sequence[dict[str, Any]]) -> Tensor:
    """Where the drafted token is the target's: [n, longest] bool."""
    read, wanted = pairs_of(rows, model.geometry["longest"])
    device = model.head.weight.device
    said = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in read.split(64)])
    return said == wanted
