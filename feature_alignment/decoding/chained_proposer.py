"""The chained adapter as a drafter: it drafts from the target's last verified state and keeps a memory of the text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.folded import EventContext, FoldedChain
from feature_alignment.decoding.proposers import Draft, Proposer
from feature_alignment.decoding.stopwatch import Stopwatch
from feature_alignment.decoding.token_selection import Selected
from feature_alignment.models.decoder import Decoder
from feature_alignment.models.fixed import captured
from feature_alignment.models.state import Prompt

OUTSIDE = -1e30  # logit of an id outside the draft vocabulary
BLOCK_LENGTHS = (4, 8, 16, 24, 32)  # of a whole block at a confidence floor; few, because each is one CUDA graph


class ChainedProposer(Proposer):
    """The chained adapter drafts from the target's last verified state; EventGPT runs once, for its view of the clip.

    Between two draft tokens only the adapter's own width is touched (`FoldedChain`). At a fixed draft length, greedy decoding drafts a
    whole round without reading any value from the device. With a confidence floor, a GPU also drafts a whole block and reads its tokens
    and confidences once; a CPU, where reading is free, stops at the floor instead of drafting on.

    Args:
        draft: EventGPT
        adapter: the trained chained adapter
        head: [v, d_target], the target's LM head
        embeddings: [v, d_target], the target's input embeddings
        draft_ids: [n] int64, ascending: the only token ids that may be drafted; None for all
    """

    def __init__(self, draft: Decoder, adapter: ChainedAdapter, head: Tensor, embeddings: Tensor, draft_ids: Tensor | None = None) -> None:
        self.draft, self._adapter, self._vocab_size = draft, adapter, len(head)
        self._chain = FoldedChain(adapter, head, embeddings, draft_ids)
        self._context: EventContext | None = None
        self._drafts_blocks = head.device.type != "cpu"  # reads a whole round's tokens at once
        self._last_length = 8  # draft length at the last confidence floor
        self._block = captured(self._draft_block, draft.steps)
        self._confident_block = captured(partial(self._draft_block, with_confidence=True), draft.steps)
        self._rows = captured(self._draft_rows, draft.steps)
        self._first, self._next = captured(self._expect, draft.steps), captured(self._read_and_expect, draft.steps)

    @property
    def chain(self) -> FoldedChain:
        """The folded adapter."""
        return self._chain

    @property
    def event_context(self) -> EventContext:
        """What drafts after the current prompt attend to."""
        assert self._context is not None  # a prompt was started
        return self._context

    @torch.inference_mode()
    def start(self, prompt: Prompt, watch: Stopwatch) -> None:
        """See `Proposer`."""
        with watch("draft_prefill"):
            self._begin(self._read_clips([prompt]))

    @torch.inference_mode()
    def start_rows(self, others: Sequence[ChainedProposer], prompts: Sequence[Prompt], watch: Stopwatch) -> None:
        """`start` for this drafter and others of the same adapter, all of whose clips are read at once.

        Args:
            others: the other drafters
            prompts: for this one, then for each of the others; equal up to the last vision token
            watch: books the time
        """
        with watch("draft_prefill"):
            contexts = self._read_clips(prompts)
            for i, proposer in enumerate((self, *others)):
                proposer._begin(EventContext(*(part[i : i + 1] for part in contexts)))

    def _read_clips(self, prompts: Sequence[Prompt]) -> EventContext:
        """What drafts after each of several prompts attend to; the questions are not read."""
        vision = self.draft.encode_vision(torch.stack([p.pixels for p in prompts]))
        shortest = min(len(p.ids) for p in prompts)
        ids = torch.stack([p.ids[:shortest] for p in prompts])
        return self._chain.context(self._adapter.encode_events(self.draft.vision_states(ids, vision)))

    def _begin(self, context: EventContext) -> None:
        """Begin a text after events of this context."""
        if self._context is None:
            self._context = EventContext(*(part.clone() for part in context))  # of one row of a batch, for example
        else:
            for buffer, new in zip(self._context, context, strict=True):
                buffer.copy_(new)  # a CUDA graph reads the buffers of the first prompt
        self._memory: Tensor | None = None  # [1, w], of the verified text
        self._num_read = 0  # tokens of that text
        self._ahead: list[int] = []  # draft tokens read after it
        self._tip: Tensor  # [1, w], the memory after them

    @torch.inference_mode()
    def propose(self, emitted: Sequence[int], states: Tensor, num_tokens: int, watch: Stopwatch, confidence_floor: float = 0.0) -> Draft:
        """See `Proposer`. With a fixed length, a GPU also proposes tokens after one that ends the text; the loop drops them unread."""
        with watch("read"):
            self._catch_up(emitted, states)
        with watch("adapter"):
            if self.selector.is_plain_argmax and not self._drafts_blocks:
                return self._propose_until(num_tokens, confidence_floor)
            if self.selector.is_plain_argmax and confidence_floor == 0:
                return self._propose_fixed(num_tokens)
            if self.selector.is_plain_argmax:
                return self._propose_block(num_tokens, confidence_floor)
        return self._propose_one_by_one(emitted, num_tokens, watch, confidence_floor)

    @property
    def device(self) -> torch.device:
        """Device that drafts are made on."""
        return self.draft.device

    @torch.inference_mode()
    def redraft(self, num_tokens: int) -> Tensor:
        """Greedy draft tokens [g] after the text read last, without reading anything: the chain alone, to time it."""
        if self._drafts_blocks:
            token_ids: Tensor = self._block(self._tip, self._zeros(num_tokens))[0]
            return token_ids
        return self._chain.draft(self._tip, self.event_context, num_tokens).tokens[0]

    @torch.inference_mode()
    def reread(self, num_tokens: int) -> Tensor:
        """The memory [1, w] after as many verified tokens as a round reads, of any values: reading alone, to time it."""
        states = self._tip.new_zeros(1, num_tokens, self._adapter.geometry["d_target"])
        return self._chain.read(states, torch.zeros(1, num_tokens, dtype=torch.long, device=states.device), self._tip)[:, -1]

    def draft_rows(self, memory: Tensor, context: EventContext, num_tokens: int) -> Tensor:
        """Greedy draft tokens [b, g] of the rows of a batch, at most `num_tokens`; a CPU stops when every row's text has ended.

        Args:
            memory: [b, w], of each row's verified text
            context: of the rows' prompts
            num_tokens: at least 1
        """
        if not self._drafts_blocks:
            return self._chain.draft(memory, context, num_tokens, ends=self.selector.eos_ids).tokens
        token_ids: Tensor = self._rows(memory, *context, memory.new_zeros(num_tokens))
        return token_ids

    def _propose_until(self, num_tokens: int, confidence_floor: float) -> Draft:
        """Draft tokens of a greedy text on a CPU, where reading one is free: up to the floor, or to one that ends the text."""
        found = self._chain.draft(self._tip, self.event_context, num_tokens, confidence_floor > 0, self.selector.eos_ids, confidence_floor)
        self._tip = found.memory
        self._ahead += found.tokens[0, :-1].tolist()
        return self._drafted(found.tokens[0], found.hidden[0], found.confidence[0].tolist())

    def _propose_fixed(self, num_tokens: int) -> Draft:
        """Draft tokens of a greedy text, as many as asked for."""
        token_ids, hidden, _, _ = self._block(self._tip, self._zeros(num_tokens))  # the next round reads again what it follows
        return self._drafted(token_ids, hidden, [])

    def _propose_block(self, num_tokens: int, confidence_floor: float) -> Draft:
        """Draft up to twice the last length at once, read all tokens and confidences, and cut at the confidence floor."""
        length = min(num_tokens, next(n for n in BLOCK_LENGTHS if n >= min(2 * self._last_length, BLOCK_LENGTHS[-1])))
        token_ids, hidden, _, confidence = self._confident_block(self._tip, self._zeros(length))
        read = torch.cat([token_ids.double(), confidence.double()]).tolist()
        tokens, confidences = [int(token) for token in read[:length]], read[length:]
        chance, n = 1.0, 0
        while n == 0 or (n < length and chance >= confidence_floor and tokens[n - 1] not in self.selector.eos_ids):
            chance *= confidences[n]
            n += 1
        self._last_length = n  # the chain goes on from the verified text, or reads these tokens again
        return self._drafted(token_ids[:n], hidden[:n], confidences[:n])

    def _drafted(self, token_ids: Tensor, hidden: Tensor, confidences: list[float]) -> Draft:
        """The draft of g tokens [g] with their hidden layers [g, w] and confidences, if they were requested."""
        logits = None if self._chain.ids is not None else lambda: self._chain.logits(hidden)
        return Draft(token_ids, lambda: self._chain.states(hidden), confidence=confidences or None, logits=logits)

    def _propose_one_by_one(self, emitted: Sequence[int], num_tokens: int, watch: Stopwatch, confidence_floor: float) -> Draft:
        """Draft tokens whose selection depends on the text, on random numbers or on the confidence so far."""
        text: list[int] = []
        selected: list[Selected] = []
        hidden: list[Tensor] = []
        chance = 1.0
        while not text or (len(text) < num_tokens and chance >= confidence_floor and text[-1] not in self.selector.eos_ids):
            with watch("adapter"):
                if selected:
                    self._tip, z = self._next(hidden[-1], selected[-1].token, self._tip)
                else:
                    z = self._first(self._tip)
                hidden.append(z)
            with watch("head"):
                selected.append(self.selector.select(self._logits(z), [*emitted, *text], confidence=confidence_floor > 0))
                text.append(int(selected[-1].token))
            chance *= selected[-1].confidence
        self._ahead += text[:-1]
        return Draft.of(selected, lambda: self._chain.states(torch.cat(hidden)))

    def _catch_up(self, emitted: Sequence[int], states: Tensor) -> None:
        """Read the newly verified tokens with the target's states, then the tokens after them with predicted states."""
        n = len(states)
        if n > self._num_read:
            new = torch.tensor([emitted[self._num_read : n]], device=states.device)
            self._memory = self._tip = self._chain.read(states[None, self._num_read :], new, self._memory)[:, -1]
            self._num_read, self._ahead = n, []
        following, ahead = list(emitted[n:]), self._ahead
        if following[: len(ahead)] != ahead:
            assert self._memory is not None  # the target's prefill has emitted a token
            ahead, self._tip = [], self._memory
        for token in following[len(ahead) :]:
            ids = torch.tensor([token], device=states.device)
            self._tip = self._chain.go_on(self._first(self._tip), ids, self._tip)
        self._ahead = following

    def _zeros(self, num_tokens: int) -> Tensor:
        """A tensor whose shape tells the captured block its draft length."""
        return torch.zeros(num_tokens, dtype=torch.bool, device=self._tip.device)

    def _draft_block(self, memory: Tensor, length: Tensor, with_confidence: bool = False) -> tuple[Tensor, ...]:
        """`FoldedChain.draft` of one row as a function of tensors: `length` [g] holds any values. Returns the parts of `Drafts`."""
        found = self._chain.draft(memory, self.event_context, len(length), with_confidence)
        return found.tokens[0], found.hidden[0], found.memory, found.confidence[0]

    def _draft_rows(self, memory: Tensor, keys: Tensor, bias: Tensor, values: Tensor, length: Tensor) -> Tensor:
        """Draft tokens [b, g] of `FoldedChain.draft` as a function of tensors: `length` [g] holds any values."""
        return self._chain.draft(memory, EventContext(keys, bias, values), len(length)).tokens

    def _expect(self, memory: Tensor) -> Tensor:
        """The hidden layer [1, w] of the next predicted state, for the memory [1, w] of all tokens before it."""
        return self._chain.expect(memory, self.event_context)

    def _read_and_expect(self, z: Tensor, token: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Read one draft token [1] with its hidden layer z [1, w]; returns the memory [1, w] and the next hidden layer [1, w]."""
        memory = self._chain.go_on(z, token, memory)
        return memory, self._expect(memory)

    def _logits(self, z: Tensor) -> Tensor:
        """Draft logits [1, v] of a hidden layer [1, w]; ids that may not be drafted have probability 0.

        Their logits are finite: if generation rules forbid all ids that may be drafted, softmax of the logits stays a distribution.
        """
        logits = self._chain.logits(z)
        if self._chain.ids is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.new_full((1, self._vocab_size), OUTSIDE).index_copy_(1, self._chain.ids, logits)
