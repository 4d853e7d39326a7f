"""A finished text round by round, for people: where each token came from, why drafting stopped, where the milliseconds went."""

from __future__ import annotations

from collections.abc import Callable

from feature_alignment.decoding.engine import Generation, Round

# kind of token: (colour for terminals, marks for plain text)
STYLES = {"kept": ("\033[32m", ("", "")), "rejected": ("\033[31;9m", ("(", ")")), "own": ("\033[1;34m", ("[", "]"))}
STOPPED = {
    "length": "as many as asked for",
    "EOS": "the draft ended the text",
    "unsure": "the next draft was not worth it",
    "no idea": "the drafter had no more",
    "off": "drafting does not pay",
}


def shown(text: str, kind: str, colour: bool) -> str:
    """A token as the draft it was: kept, rejected, or the target's own."""
    code, (before, after) = STYLES[kind]
    return f"{code}{text}\033[0m" if colour else f"{before}{text}{after}"


def legend(colour: bool) -> str:
    return ", ".join(shown(name, kind, colour) for kind, name in (("kept", "kept"), ("rejected", "rejected"), ("own", "target's own")))


def tokens_of(r: Round, decode: Callable[[list[int]], str], colour: bool) -> str:
    """One round's drafts and the token behind them."""
    words = [shown(decode([t]), "kept" if k else "rejected", colour) for t, k in zip(r.proposed, r.kept, strict=True)]
    if r.extra_token is not None:
        words.append(shown(decode([r.extra_token]), "own", colour))
    return " ".join(words)


def trace_lines(generation: Generation, decode: Callable[[list[int]], str], colour: bool) -> list[str]:
    """Two lines a round: its tokens; what was kept, why no more was drafted, milliseconds per stage.

    decode: token ids -> text
    """
    lines = [f"  0  {shown(decode(generation.token_ids[:1]), 'own', colour)}"]
    before = {stage: ms for stage in ("target_prefill", "draft_prefill") if (ms := generation.ms.get(stage))}
    lines.append(f"     both prompts read; {_stages(before)}")
    for i, r in enumerate(generation.rounds):
        lines.append(f"{i + 1:3d}  {tokens_of(r, decode, colour)}")
        what = f"kept {r.num_accepted} of {len(r.proposed)}; {STOPPED[r.stopped]}" if r.proposed else STOPPED[r.stopped]
        lines.append(f"     {what}{'; read again' if r.recomputed else ''}; {_stages(r.ms)}")
    return lines


def _stages(ms: dict[str, float]) -> str:
    return f"{sum(ms.values()):.2f} ms" + (f" = {' + '.join(f'{stage} {t:.2f}' for stage, t in ms.items())}" if len(ms) > 1 else "")
