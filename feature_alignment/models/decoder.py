"""A causal language model of the pair with vision input: prefill, steps, rollback and teacher forcing over its key/value cache.

Hidden state t of a text is the state that *emits* token t:

    prompt            | x0   x1   x2   </s>       tokens
    state   h0 is on the last prompt token, h1 on x0, …       h[t] emits x[t]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from feature_alignment.cli.config import Steps, StepsSetting
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.samples import Sample
from feature_alignment.models import tree_attention
from feature_alignment.models.fixed import FixedCache, note_eager_fallback
from feature_alignment.models.fused import unsupported_reason
from feature_alignment.models.generation import GenerationRules, eos_set, most_likely
from feature_alignment.models.packed import LinearChoice, best_cpu_linear, multiplies_bfloat16, pack, packed_product, unsupported
from feature_alignment.models.state import Prompt, State, position_limit
from feature_alignment.models.vision_cache import VisionCache


class Decoder:
    """One model of the pair: its decoder layers, LM head, tokenizer and vision encoder behind one interface."""

    def __init__(
        self,
        llama: PreTrainedModel,
        lm_head: nn.Linear,
        tokenizer: PreTrainedTokenizerBase,
        encode_prompt: Callable[[str], Tensor],
        read_pixels: Callable[[Sample], Tensor],
        encode_vision: Callable[[Tensor], Tensor],
        splice: Callable[[Tensor, Tensor], Tensor],
        taps: Sequence[int] | None = None,
        device: str | None = None,
        placeholder: int = -1,
        vision_tokens: int = 0,
        full_model: PreTrainedModel | None = None,
        settings: GenerationConfig | None = None,
    ) -> None:
        """Wrap a loaded model; layers after the last tapped one are removed from it.

        Args:
            llama: Embedding, decoder layers and final norm.
            lm_head: Output head.
            tokenizer: The checkpoint's tokenizer.
            encode_prompt: Question -> prompt ids [s] int64 with vision placeholders.
            read_pixels: Sample -> pixels [t, 3, h, w] float32.
            encode_vision: Pixels [b, t, 3, h, w] -> vision tokens [b, e, d].
            splice: Prompt ids [b, s] and vision tokens [b, e, d] -> prompt embeddings.
            taps: Layers whose outputs are concatenated into a hidden state, ascending; default the last layer. The last layer is read
                after the final norm (`norm="post"`), earlier ones before it.
            device: Device of inputs, outputs and LM head; a device map may have put the layers elsewhere.
            placeholder: Token id that marks vision in a prompt.
            vision_tokens: Number of tokens a clip is encoded into.
            full_model: Model that contains `llama`, for transformers' own `generate`.
            settings: Generation settings of the checkpoint; by default only the EOS ids of the model's config apply.

        Raises:
            UserError: If `taps` are not ascending layer numbers of this model.
        """
        self.placeholder, self.vision_tokens, self.full_model = placeholder, vision_tokens, full_model
        self.llama, self.tokenizer, self._encode_prompt, self.read_pixels = llama, tokenizer, encode_prompt, read_pixels
        self._encode_vision, self._splice = encode_vision, splice
        self.num_layers: int = llama.config.num_hidden_layers
        self.taps: tuple[int, ...] = tuple(taps or (self.num_layers,))
        if list(self.taps) != sorted(set(self.taps)) or not 1 <= self.taps[0] <= self.taps[-1] <= self.num_layers:
            raise UserError(f"--draft_layers {list(self.taps)}: expected ascending layer numbers from 1 to {self.num_layers}.")
        self.settings = settings
        self.eos_ids = eos_set(llama.config.eos_token_id if settings is None else settings.eos_token_id)
        self.width: int = llama.config.hidden_size
        self.hidden_size = self.width * len(self.taps)
        # A device map may have put the head elsewhere, with hooks that move its input: the module stays there, its weight is copied.
        self._head_weight = lm_head.weight if device is None else lm_head.weight.detach().to(device)
        self._lm_head = lm_head
        self._packed_head: Callable[[Tensor], Tensor] | None = None
        self.linear = LinearChoice("torch", "not tried", {}, {})
        self.vocab_size = lm_head.weight.shape[0]
        # and each token attends to all before it, which a sliding window would not allow
        self._shares_keys = llama.config.num_key_value_heads != llama.config.num_attention_heads and not getattr(
            llama.config, "sliding_window", None
        )
        self.steps: Steps = "eager"
        self.fixed_cache: FixedCache | None = None  # of captured steps
        self.vision_cache: VisionCache | None = None  # off: a timed run pays for its own vision
        if self.taps[-1] < self.num_layers:  # an early exit: later layers are neither run nor cached
            llama.layers = llama.layers[: self.taps[-1]]
            llama.config.num_hidden_layers = self.taps[-1]
            llama.norm = nn.Identity()

    @property
    def norm(self) -> str:
        """Whether hidden states are read after ("post") or before ("pre") the final norm."""
        return "post" if self.taps == (self.num_layers,) else "pre"

    @property
    def norms(self) -> dict[int, str]:
        """`norm` of each tapped layer."""
        return {k: "post" if k == self.num_layers else "pre" for k in self.taps}

    @property
    def device(self) -> torch.device:
        """Device of inputs, outputs and LM head."""
        return self._head_weight.device

    def restrict_vocabulary(self, rows: int) -> None:
        """Use only the first `rows` ids of the head, so that no mode emits ids for which the drafter has no embedding."""
        self.vocab_size = rows
        if self._packed_head is not None:
            self._packed_head = packed_product(self.head_weight, is_mixed=self.linear.kind == "mixed")

    def use_steps(self, steps: StepsSetting) -> None:
        """Choose how steps run from the next prompt on.

        Captured steps need layers that `fused` supports. Models with other layers run eagerly, with a warning that
        `fixed.eager_fallbacks` keeps for the benchmark's meta.

        Args:
            steps: "eager", "graphs" (CUDA graphs over a fixed cache), "compiled" (also fused by torch.compile), or "auto": compiled on
                a GPU, eager elsewhere.
        """
        wanted: Steps = steps if steps != "auto" else "compiled" if self.device.type == "cuda" else "eager"
        reason = None if wanted == "eager" else unsupported_reason(self.llama)
        if reason is not None:
            note_eager_fallback(f"{wanted} steps of {type(self.llama).__name__} run eagerly", f"{reason} are not supported")
        self.steps = wanted if reason is None else "eager"
        self.fixed_cache = None if self.steps == "eager" else FixedCache(self.llama, self.taps, self.steps)

    def choose_linear(self) -> LinearChoice:
        """On a CPU, run the linear layers over packed weights from now on if a trial of about a second says that this is faster."""
        if self.steps != "eager":
            self.linear = LinearChoice("torch", f"steps are {self.steps}", {}, {})
        elif self.linear.kind == "torch":
            self._set_linear(best_cpu_linear(self.llama, self._lm_head if self.has_own_head else None))
        return self.linear

    def pack_linear(self, in_bfloat16: bool = False, is_mixed: bool = False) -> None:
        """Run the linear layers over packed weights wherever they can be packed, without a trial, so that every process does the same.

        Args:
            in_bfloat16: Multiply in bfloat16 where the CPU has instructions for it, the LM head excepted; numbers stay float32 between.
            is_mixed: One token goes through torch's own product.
        """
        if self.linear.kind == "torch" and unsupported(self.llama) is None:
            pack(self.llama, in_bfloat16 and multiplies_bfloat16(), is_mixed)
            self._set_linear(LinearChoice("mixed" if is_mixed else "packed", "asked for", {}, {}))

    def _set_linear(self, choice: LinearChoice) -> None:
        self.linear = choice
        if choice.kind != "torch" and self.has_own_head:
            self._packed_head = packed_product(self.head_weight, is_mixed=choice.kind == "mixed")
            if self.full_model is not None:  # so that transformers' own `generate` runs the same products
                pack(self.full_model, is_mixed=choice.kind == "mixed")

    @property
    def head_weight(self) -> Tensor:
        """[v, d]: weight of the LM head on the shared ids."""
        return self._head_weight[: self.vocab_size]

    @property
    def has_own_head(self) -> bool:
        """Whether the model runs to its last layer, so that its own LM head applies."""
        return bool(self.taps[-1] == self.num_layers)

    @torch.inference_mode()
    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [.., v] over the shared ids of post-norm states [.., d]; of several taps only the last is used."""
        hidden = hidden[..., -self.width :]
        return nn.functional.linear(hidden, self.head_weight) if self._packed_head is None else self._packed_head(hidden)

    def encode_prompt(self, question: str) -> Tensor:
        """Prompt ids [s] int64 with vision placeholders; UserError if the prompt exceeds the model's positions."""
        ids = self._encode_prompt(question)
        length, limit = int((ids != self.placeholder).sum()) + self.vision_tokens, position_limit(self.llama.config)
        if length >= limit:
            raise UserError(
                f"the question {question[:60]!r} makes a prompt of {length} tokens, vision included; {type(self.llama).__name__} was "
                f"trained for {limit} positions (max_position_embeddings), prompt and answer together. Ask a shorter question."
            )
        return ids

    def text_ids(self, ids: Sequence[int]) -> list[int]:
        """Ids of a prompt, -1 where they stand for vision or are not shared by both models."""
        return [-1 if i == self.placeholder or not 0 <= i < self.vocab_size else i for i in ids]

    def rules(self, prompt_ids: Tensor) -> GenerationRules:
        """The checkpoint's generation settings, applied to a text after the prompt `prompt_ids` [s]."""
        rows = self._head_weight.shape[0]
        return GenerationRules.of(self.settings, self.eos_ids, prompt_ids.tolist(), rows, self.tokenizer, self.device)

    def prepare(self, sample: Sample) -> Prompt:
        """Encode a sample's question and read its pixels."""
        return Prompt(self.encode_prompt(sample.question), self.read_pixels(sample), sample.question)

    @torch.inference_mode()
    def encode_vision(self, pixels: Tensor) -> Tensor:
        """Vision tokens [b, e, d] of pixels [b, t, 3, h, w]. They do not depend on the question; `vision_cache` keeps those of one clip."""

        def encode() -> Tensor:
            return self._encode_vision(pixels.to(self.device, self._head_weight.dtype))

        return encode() if self.vision_cache is None or len(pixels) > 1 else self.vision_cache.vision(pixels, encode)

    @torch.inference_mode()
    def vision_states(self, ids: Tensor, vision: Tensor) -> Tensor:
        """States of the last tapped layer on the vision tokens; the question is not read.

        Args:
            ids: [b, s] int64, prompts with placeholders at the same positions.
            vision: [b, e, d], vision tokens.

        Returns:
            [b, e, d].
        """
        at = (ids[0] == self.placeholder).nonzero()[:, 0]
        ids = ids[:, : int(at[-1]) + 1]

        def read() -> Tensor:
            here = ids.to(self.device)
            state = State(DynamicCache(config=self.llama.config), here, 0)
            return self._read(state, {"inputs_embeds": self._splice(here, vision)})[:, int(at[0]) :, -self.width :]

        return read() if self.vision_cache is None or len(ids) > 1 else self.vision_cache.states(vision, tuple(ids[0].tolist()), read)

    @property
    def embeddings(self) -> Tensor:
        """[v, d]: input embeddings of the shared ids."""
        weight: Tensor = self.llama.embed_tokens.weight
        return weight[: self.vocab_size].detach().to(self.device)

    @torch.inference_mode()
    def embeddings_of(self, ids: Sequence[int]) -> Tensor:
        """[n, d]: input embeddings of any n token ids of this model."""
        read: Tensor = self.llama.embed_tokens(torch.tensor(ids, dtype=torch.int64, device=self.device))
        return read.to(self.device)

    def prefill(self, prompts: Sequence[Prompt]) -> State:
        """Read prompts of equal length, vision included. Afterwards `state.last` is h0."""
        vision = self.encode_vision(torch.stack([p.pixels for p in prompts]))
        return self.prefill_encoded(torch.stack([p.ids for p in prompts]), vision)

    @torch.inference_mode()
    def prefill_encoded(self, ids: Tensor, vision: Tensor) -> State:
        """`prefill` with vision tokens that are already encoded.

        Args:
            ids: [b, s] int64, prompts with placeholders; they may end before the question.
            vision: [b, e, d], vision tokens.
        """
        ids = ids.to(self.device)
        cache = DynamicCache(config=self.llama.config)
        inputs = self._splice(ids, vision)
        state = State(cache, ids, 0, ids, inputs=inputs)
        state.prompt = self._read(state, {"inputs_embeds": inputs}, keep=1)
        if self.fixed_cache is not None and len(ids) == 1:
            state.cache = self.fixed_cache.load_prompts(cache, state)
        return state

    @torch.inference_mode()
    def step(self, state: State, token_ids: Tensor, **layout: Tensor) -> Tensor:
        """Read more tokens and advance `state` in place.

        Args:
            state: Of a prefilled batch.
            token_ids: [b, k] int64.
            **layout: `position_ids` [b, k] and `attention_mask`, where the rows' texts differ in length. A mask [b, 1, k, s] may be
                boolean (True: attends) or additive.

        Returns:
            [b, k, d], hidden states on these tokens.
        """
        return self._read(state, {"input_ids": token_ids, **layout})

    def _read(self, state: State, inputs: dict[str, Tensor], keep: int | None = None) -> Tensor:
        if isinstance(state.cache, FixedCache):
            hidden = state.cache.step(inputs["input_ids"], [state.length], state)
        else:
            hidden = self._forward(inputs, state.cache, keep)
        state.length += next(iter(inputs.values())).shape[1]
        state.last = hidden[:, -1]
        return hidden

    def _forward(self, inputs: dict[str, Tensor], cache: DynamicCache, keep: int | None = None) -> Tensor:
        mask, config = inputs.get("attention_mask"), self.llama.config
        usual = name = config._attn_implementation
        past, new = cache.get_seq_length(), next(iter(inputs.values())).shape[1]
        if mask is None and new > 1 and past and self._shares_keys and usual == "sdpa" and self.device.type == "cpu":
            mask = tree_attention.causal_mask(new, past, self._head_weight)
            inputs = {**inputs, "attention_mask": mask}
        if mask is not None and mask.ndim == 4:
            if mask.dtype == torch.bool or usual.startswith("flash"):  # only sdpa takes a boolean mask, flash takes no 4-D mask
                name = "sdpa"
            elif usual == "sdpa" and mask.device.type == "cpu":
                name = tree_attention.NAME
        with tree_attention.attention(config, name) if name != usual else nullcontext():
            out = self.llama(**inputs, cache=cache, use_cache=True, output_hidden_states=len(self.taps) > 1)
        if len(self.taps) == 1:
            last: Tensor = out.last_hidden_state
            return last.to(self.device)
        # hidden_states[k] is the output of layer k, pre-norm; only the very last one has passed the final norm
        tapped = [out.hidden_states[k] if keep is None else out.hidden_states[k][:, -keep:] for k in self.taps]
        return torch.cat([h.to(self.device) for h in tapped], dim=-1)

    def rollback(self, state: State, n: int) -> None:
        """Forget the last n positions, in place. `state.last` is stale until the next step."""
        if n:  # crop(0) empties the cache in some versions of transformers and does nothing in others
            if not isinstance(state.cache, FixedCache):
                state.cache.crop(-n)
            state.length -= n

    @torch.inference_mode()
    def generate(self, state: State, max_new_tokens: int) -> list[list[int]]:
        """Greedy answers of a freshly prefilled batch, each up to and including its end. `state` is restored."""
        assert state.ids is not None
        first, length, rules = state.last, state.length, [self.rules(ids) for ids in state.ids]
        answers: list[list[int]] = [[] for _ in rules]
        open_rows, logits = set(range(len(rules))), self.lm_head(first)
        while True:
            for answer, token in zip(answers, most_likely(rules, logits, answers), strict=True):
                answer.append(token)
            open_rows -= {row for row in open_rows if rules[row].end_of(answers[row][:-1], answers[row][-1:]) is not None}
            if not open_rows or len(answers[0]) == max_new_tokens:
                break
            latest = torch.tensor([[answer[-1]] for answer in answers], device=self.device)
            logits = self.lm_head(self.step(state, latest)[:, -1])
        self.rollback(state, state.length - length)
        state.last = first
        return [answer[: rule.end_of([], answer)] for answer, rule in zip(answers, rules, strict=True)]

    @torch.inference_mode()
    def teacher_force(self, state: State, token_ids: Tensor) -> Tensor:
        """The hidden states that emit given tokens, from one forward pass over them.

        Args:
            state: Freshly prefilled, one row per row of `token_ids`; advanced in place.
            token_ids: [b, n] int64.

        Returns:
            [b, n, d]: h0 (from the prompt) … h(n-1), which has read token_ids[:, : n - 1].
        """
        first = state.last[:, None]
        return first if token_ids.shape[1] == 1 else torch.cat([first, self.step(state, token_ids[:, :-1])], dim=1)
