"""Speculative decoding from its definition, without a cache or a memory: everything is recomputed at every token. Slow and short."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from feature_alignment.adapters import tables
from feature_alignment.adapters.attending_texts import PromptedTexts
from feature_alignment.adapters.attending_training import Reader
from feature_alignment.decoding.acceptance import cosine_per_position
from feature_alignment.models.decoder import Decoder

# (emitted, drafts so far) -> the next draft, None for no idea, and the target state expected to emit it, where one is expected
NextDraft = Callable[[list[int], list[int]], tuple[int | None, Tensor | None]]


def states_behind(llama, tokens: Sequence[int]) -> Tensor:
    """[n, d]: the last states of one full pass."""
    return llama(input_ids=torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]


@torch.inference_mode()
def oracle(
    target: Decoder, prompt: Sequence[int], next_draft: NextDraft, accept: str, threshold: float, gamma: int, limit: int
) -> tuple[list[int], list[list[int]], list[int]]:
    """The text, the drafts of every round, and how many of them were kept."""
    says = lambda text: int(target.lm_head(states_behind(target.llama, [*prompt, *text])[-1]).argmax())  # noqa: E731
    emitted, proposed, accepted = [says([])], [], []
    while emitted[-1] not in target.eos_ids and len(emitted) < limit:
        room = min(gamma, limit - len(emitted) - 1)
        drafts, expected = [], []
        while len(drafts) < room and not target.eos_ids & {*drafts}:
            token, state = next_draft(emitted, drafts)
            if token is None:
                break
            drafts.append(token)
            expected.append(state)
        v = states_behind(target.llama, [*prompt, *emitted, *drafts])[-len(drafts) - 1 :]
        wanted = target.lm_head(v).argmax(-1).tolist()
        if accept == "token":
            keep = [d == w for d, w in zip(drafts, wanted, strict=False)]
        else:
            keep = [float(cosine_per_position(e, s)) > threshold for e, s in zip(expected, v, strict=False)]
        if accept == "relaxed":
            new = [d if k else w for d, w, k in zip(drafts, wanted, keep, strict=False)]
            new.append(says([*emitted, *new]))
        else:
            n = keep.index(False) if False in keep else len(keep)
            keep = [i < n for i in range(len(keep))]
            new = [*drafts[:n], wanted[n]]
        end = next((i + 1 for i, token in enumerate(new) if token in target.eos_ids), len(new))
        emitted += new[:end]
        if room > 0:
            proposed.append(drafts)
            accepted.append(sum(k for i, k in enumerate(keep) if i < end))
    return emitted, proposed, accepted


def by_model(model, taps: Sequence[int], prompt: Sequence[int], adapter, head) -> NextDraft:
    """Own (no target head given) and aligned drafts; `model` is the whole drafter, `taps` the layers its decoder reads."""

    def next_draft(emitted: list[int], drafts: list[int]) -> tuple[int, Tensor | None]:
        every = model.model(input_ids=torch.tensor([[*prompt, *emitted, *drafts]]), use_cache=False, output_hidden_states=True)
        g = torch.cat([every.hidden_states[k][0, -1] for k in taps])
        expected = None if adapter is None else adapter(g)
        return int((model.lm_head(g) if head is None else head(expected)).argmax()), expected

    return next_draft


def by_chain(draft: Decoder, draft_prompt, adapter, target: Decoder, prompt: Sequence[int], ids: Tensor | None = None) -> NextDraft:
    """ids: the token ids that may be drafted; None for all"""

    def next_draft(emitted: list[int], drafts: list[int]) -> tuple[int, Tensor]:
        seen = adapter.encode_events(draft.vision_states(draft_prompt.ids[None], draft.encode_vision(draft_prompt.pixels[None])))
        table = adapter.tokens(target.embeddings)
        states = states_behind(target.llama, [*prompt, *emitted])[len(prompt) - 1 : -1]  # states[i] emitted emitted[i]
        memory = adapter.read(states[None], table[torch.tensor([emitted])], None)[:, -1:]
        for token in drafts:
            memory = adapter.read(adapter.predict(memory, seen), table[torch.tensor([[token]])], memory[:, -1])
        expected = adapter.predict(memory, seen)[0, 0]
        logits = target.lm_head(expected)
        return int(logits.argmax() if ids is None else ids[logits[ids].argmax()]), expected

    return next_draft


def by_attending(draft: Decoder, draft_prompt, adapter, target: Decoder, prompt: Sequence[int]) -> NextDraft:
    """By the roll-out of training, from the target's states recomputed: no cache, no folded product."""
    reader, table, p = Reader(adapter, target.head_weight, target.embeddings), tables.NGramTable(adapter.table), adapter.num_prompt
    known = target.text_ids(prompt)[-p - 1 :]
    question = tables.question_number("")

    def next_draft(emitted: list[int], drafts: list[int]) -> tuple[int, Tensor]:
        text = [*emitted, *drafts]
        events = draft.vision_states(draft_prompt.ids[None], draft.encode_vision(draft_prompt.pixels[None]))
        states = states_behind(target.llama, [*prompt, *emitted])
        before, own = states[: len(prompt) - 1][-p:], states[len(prompt) - 1 : -1]
        read = target.embeddings_of(prompt[len(prompt) - len(before) :])
        room = own.new_zeros(len(drafts) + 1, own.shape[1])  # what stands there must not matter
        found = torch.tensor([[*tables.candidates_along(table, question, known, text), [(tables.NO_TOKEN, 0)] * tables.SOURCES]])
        texts = PromptedTexts(
            torch.cat([own, room])[None],
            torch.tensor([[*text, 0]]),
            torch.ones(1, len(text) + 1, dtype=torch.bool),
            events,
            torch.cat([before.new_zeros(p - len(before), before.shape[1]), before])[None],
            torch.cat([before.new_zeros(p - len(before), before.shape[1]), read])[None],
            torch.tensor(known[-1:]),
            torch.arange(p)[None] >= p - len(before),
            *found.unbind(-1),
        )
        *_, last = reader.roll_out(texts, torch.tensor([[len(emitted) - 1]]), len(drafts) + 1)
        return int(adapter.ids[last.logits[0, 0].argmax()]), last.expected[0, 0]

    return next_draft


def by_table(table, question: str = "") -> NextDraft:
    return lambda emitted, drafts: (table.next_token(question, [*emitted, *drafts]), None)


def by_both(table, model: NextDraft, sure: float, question: str = "") -> NextDraft:
    """The n-gram table where it is sure, else the model."""

    def next_draft(emitted: list[int], drafts: list[int]) -> tuple[int | None, None]:
        token, share = table.guess(question, [*emitted, *drafts])
        return (token if share >= sure else model(emitted, drafts)[0]), None

    return next_draft
