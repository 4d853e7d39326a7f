"""What a generation says of itself: each round's drafts and the target's words, passes, times, and the dictionary that is saved."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import as_decoder, noisy_copy, prompt_of, tiny_llama

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.decoding.baseline_drafters import NGram, TableProposer
from feature_alignment.decoding.batch import speculate_batch
from feature_alignment.decoding.chained_proposer import ChainedProposer
from feature_alignment.decoding.draft_length import DraftLengthController
from feature_alignment.decoding.engine import speculate
from feature_alignment.decoding.generation import Generation, Round
from feature_alignment.decoding.plain import greedy
from feature_alignment.decoding.proposers import ModelProposer
from feature_alignment.decoding.stopwatch import Stopwatch

PROMPT = (1, 5, 9, 13)


def says(model, tokens: list[int]) -> int:
    return int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())


@pytest.mark.parametrize("accept", ["token", "feature", "relaxed"])
@pytest.mark.parametrize("seed", range(2))
def test_a_round_tells_what_the_target_would_have_said_to_each_draft(accept, seed):
    model = tiny_llama(seed)
    target = as_decoder(model)
    proposer = ModelProposer(as_decoder(noisy_copy(model, 0.05)), HiddenAdapter(32, 32, 8), target.lm_head)
    got = speculate(
        target, proposer, prompt_of(*PROMPT), prompt_of(*PROMPT), accept=accept, threshold=0.95, num_draft_tokens=3, max_new_tokens=21
    )
    at, passes, rejected = 1, 0, 0
    assert got.token_ids[0] == says(model, list(PROMPT))
    for r in got.rounds:
        text = [*PROMPT, *got.token_ids[:at]]
        assert r.target_tokens == [says(model, [*text, *r.proposed[:i]]) for i in range(len(r.proposed))]
        assert (r.cosine is None) is False and len(r.cosine) == len(r.accepted) == len(r.proposed)
        if accept == "token":
            wanted = [r.proposed[: i + 1] == r.target_tokens[: i + 1] for i in range(len(r.proposed))]
        else:
            wanted = [c > 0.95 for c in r.cosine]
            if accept == "feature":
                wanted = [all(wanted[: i + 1]) for i in range(len(wanted))]
        new = [d if k or accept != "relaxed" else w for d, k, w in zip(r.proposed, wanted, r.target_tokens, strict=True)]
        new = new if accept == "relaxed" else new[: sum(wanted)]
        assert r.accepted == wanted and r.num_accepted == sum(wanted) and r.extra_token == says(model, [*text, *new])
        assert got.token_ids[at : at + len(new) + 1] == [*new, r.extra_token]
        assert r.recomputed is (accept == "relaxed" and not all(wanted))
        assert set(r.ms) <= {"draft_prefill", "draft", "read", "adapter", "head", "verify", "accept", "rollback", "recompute"}
        assert ("recompute" in r.ms) is r.recomputed and r.ms["verify"] > 0 and r.stop_reason == "length"
        at, passes, rejected = at + len(new) + 1, passes + 1 + r.recomputed, rejected + wanted.count(False)
    assert rejected and at <= len(got.token_ids) == 21
    assert got.passes == passes + (len(got.token_ids) - at)  # what is left has no room for a draft
    assert got.tokens_per_pass == pytest.approx(20 / got.passes)
    total = {stage: sum(r.ms.get(stage, 0.0) for r in got.rounds) for stage in ("draft", "adapter", "head", "accept", "recompute")}
    assert {k: got.ms.get(k, 0.0) for k in total} == pytest.approx(total)
    assert got.decode_ms == pytest.approx(got.total_ms - got.ms["target_prefill"] - got.ms["draft_prefill"])
    assert [begin for _, begin, _ in got.spans] == sorted(begin for _, begin, _ in got.spans) and got.spans[0][1] >= 0


def test_what_is_saved_of_a_generation():
    kept = Round([5, 6], [5, 7], [True, False], None, 7, False, {"verify": 1.5}, "length")
    some = Generation([4, 5, 7, 2], 2, 9.0, {"target_prefill": 2.0, "draft_prefill": 1.0, "verify": 1.5}, [kept])
    assert some.decode_ms == 6.0 and some.tokens_per_pass == 1.5 and kept.num_accepted == 1
    saved = some.to_json()
    assert saved == {
        "token_ids": [4, 5, 7, 2],
        "passes": 2,
        "tokens_per_pass": 1.5,
        "total_ms": 9.0,
        "ms": some.ms,
        "rounds": [kept.to_json()],
    }
    assert math.isnan(Generation([2], 0, 1.0, {}).tokens_per_pass)


class OffAndOn(DraftLengthController):
    """Two passes without drafts, then two rounds with drafts, again and again."""

    plain_steps = 2

    def __init__(self):
        super().__init__(1.0)
        self.asked = -1

    def next_confidence_floor(self):
        self.asked += 1
        return None if self.asked % 3 == 0 else 0.0


@pytest.mark.parametrize("seed", range(2))
@torch.inference_mode()
def test_passes_without_drafts_are_part_of_the_text_and_of_what_drafts_are_made_from(seed):
    model = tiny_llama(seed)
    target, draft = as_decoder(model), as_decoder(noisy_copy(model, 0.1))
    torch.manual_seed(seed)
    adapter = ChainedAdapter(32, 32, 1, 16).eval()
    make = lambda: ChainedProposer(draft, adapter, target.head_weight, target.embeddings)  # noqa: E731
    prompt = prompt_of(*PROMPT)
    got = speculate(target, make(), prompt, prompt, num_draft_tokens=3, max_new_tokens=22, controller=OffAndOn())
    assert got.token_ids == greedy(target, prompt, 22).token_ids
    states = model.model(input_ids=torch.tensor([[*PROMPT, *got.token_ids]])).last_hidden_state[0, len(PROMPT) - 1 :]
    at, kinds = 1, []
    for r in got.rounds:
        kinds.append(r.stop_reason == "off")
        if r.proposed:
            fresh, watch = make(), Stopwatch()
            fresh.start(prompt, watch)
            wanted = fresh.propose(got.token_ids[:at], states[:at], len(r.proposed), watch).token_ids.tolist()
            assert r.proposed == wanted
        else:
            assert (r.target_tokens, r.accepted, r.extra_token, set(r.ms)) == ([], [], got.token_ids[at], {"verify"})
        at += r.num_accepted + 1
    assert kinds[:6] == [True, True, False, False, True, True] and len(got.token_ids) - at in (0, 1)


@pytest.mark.parametrize("gamma", [0, 1, 3])
@pytest.mark.parametrize("limit", [1, 2, 9])
def test_a_batch_is_each_of_its_prompts_alone(gamma, limit):
    """Prompts of unequal lengths, and drafts that are right, wrong and too few: the texts, what was kept in each round, the passes."""
    model = tiny_llama(0)
    target, prompts = as_decoder(model), [prompt_of(1, 5), prompt_of(1, 40, 3, 8, 11), prompt_of(1, 7, 7, 20)]
    texts = [greedy(target, p, limit).token_ids for p in prompts]
    wrong = [[t if i % 3 else 60 for i, t in enumerate(text)] for text in texts]
    make = lambda i: TableProposer(NGram([("", wrong[i])]))  # noqa: E731
    found = speculate_batch(target, [make(i) for i in range(3)], prompts, prompts, num_draft_tokens=gamma, max_new_tokens=limit)
    assert found.token_ids == texts
    rounds = []
    for i, p in enumerate(prompts):
        alone = speculate(target, make(i), p, p, num_draft_tokens=gamma, max_new_tokens=limit)
        kept = [r.num_accepted for r in alone.rounds]
        assert found.accepted[i][: len(kept)] == kept and set(found.accepted[i][len(kept) :]) <= {0}
        rounds.append(alone.passes)
        assert len(found.accepted[i]) == alone.passes
    assert (found.passes == max(rounds) and found.total_ms > 0 and "verify" in found.ms) or limit == 1
    with pytest.raises(ValueError, match="expected as many of each"):
        speculate_batch(target, [make(0)], prompts, prompts)
    with pytest.raises(ValueError, match="0 prompts"):
        speculate_batch(target, [], [], [])
