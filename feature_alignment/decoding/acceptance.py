"""Acceptance rules: which draft tokens of a round are accepted. Pure functions of one round's tensors.

p is the target's distribution at the position of a draft token x, q the drafter's, τ the threshold:

    token     x is the target's own token (lossless)
    feature   the cosine of predicted and real target states is above τ
    relaxed   the same, at every position of the round, not only up to the first rejection
    typical   p(x) > min(ε, δ exp(-H(p))) with ε = τ and δ = sqrt(ε): typical acceptance of Medusa (Cai et al. 2401.10774), which Hydra
              (Ankner et al. 2402.05109) uses as well. ε is the probability that suffices whatever the entropy H(p), δ the share of
              exp(-H(p)) that suffices where p is spread out. Medusa's code has ε = 0.09, δ = 0.3; sqrt(ε) is its recommendation and that
              of eta sampling (Hewitt et al. 2210.15191). p is softmax of the target's logits at temperature 1
    kl        KL(p || q) < τ in nats, whatever x is: fuzzy speculative decoding (Holsman et al. 2502.20704)

The target's own token has p(x) >= exp(-H(p)), so `typical` accepts whatever `token` accepts; the other lossy rules may reject it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from feature_alignment.decoding.settings import RuleName

AcceptanceFunction = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]  # a custom rule: what it would accept, [g] bool
Rule = RuleName | AcceptanceFunction


def accepted_drafts(rule: Rule, draft_ids: Tensor, target_ids: Tensor, score: Tensor | None, threshold: float) -> Tensor:
    """Apply an acceptance rule to one round.

    Args:
        rule: name of a rule, or a function with the other four arguments
        draft_ids: [g] int64, the draft tokens
        target_ids: [g] int64, the target's own tokens at the same positions
        score: [g] float, see `rule_score`; only `token` and functions work without
        threshold: `kl` accepts below it, the other lossy rules above it

    Returns:
        [g] bool. All rules except `relaxed` stop at the first rejection.

    Raises:
        ValueError: the rule needs scores and there are none
    """
    if callable(rule):
        return rule(draft_ids, target_ids, score, threshold).cumprod(0).bool()
    if rule == "token":
        return (draft_ids == target_ids).cumprod(0).bool()
    if score is None:
        needs = "distributions, and this drafter has none" if rule == "kl" else "hidden states, and this drafter predicts none"
        raise ValueError(f"the rule {rule!r} compares {needs}")
    passes = score < threshold if rule == "kl" else score > threshold
    return passes if rule == "relaxed" else passes.cumprod(0).bool()


def rule_score(
    rule: Rule, draft_ids: Tensor, target_logits: Tensor, draft_logits: Callable[[], Tensor] | None, cosine: Tensor | None
) -> Tensor | None:
    """What a rule compares with its threshold; None for `token`, and where the drafter has no distribution or predicts no states.

    Args:
        rule: the acceptance rule
        draft_ids: [g] int64
        target_logits: [g, v], the target's at the position of each draft token
        draft_logits: computes [n, v], n >= g, the logits that the draft tokens were selected from; or None
        cosine: [g] of predicted and real target states, or None

    Returns:
        [g] float32: `typical_score`, `kl_divergence`, or the cosine
    """
    if rule == "token":
        return None
    if rule == "typical":
        return typical_score(draft_ids, target_logits)
    if rule == "kl":
        return None if draft_logits is None else kl_divergence(target_logits, draft_logits()[: len(draft_ids)])
    return cosine


def typical_score(draft_ids: Tensor, logits: Tensor) -> Tensor:
    """The bound on ε below which typical acceptance with δ = sqrt(ε) accepts each draft token.

    p > min(ε, sqrt(ε) exp(-H)) holds if ε < p or sqrt(ε) < p exp(H), that is for every ε < max(p, (p exp(H))²).

    Args:
        draft_ids: [g] int64
        logits: [g, v], the target's; may hold -inf

    Returns:
        [g] float32
    """
    log_p = logits.float().log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    log_x = log_p.gather(-1, draft_ids[:, None])[:, 0]
    return torch.maximum(log_x, 2 * (log_x + entropy)).exp()


def kl_divergence(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(p || q) at each position, in nats.

    Args:
        target_logits: [g, v], of p; may hold -inf
        draft_logits: [g, v], of q

    Returns:
        [g] float32; infinite where q is 0 and p is not
    """
    log_p, log_q = target_logits.float().log_softmax(-1), draft_logits.to(target_logits.device).float().log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def cosine_per_position(aligned: Tensor, target: Tensor) -> Tensor:
    """Cosine over the last axis in float32.

    Args:
        aligned: [.., d], predicted target states
        target: [.., d], real target states

    Returns:
        [..] float32
    """
    return F.cosine_similarity(aligned.float(), target.float(), dim=-1)
