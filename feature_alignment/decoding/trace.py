"""A readable trace of a generation, round by round: origin of each token, why drafting stopped, milliseconds per stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from feature_alignment.cli.console import print_table
from feature_alignment.decoding.generation import Generation, Round

# kind of token -> (terminal color, marks in plain text)
STYLES = {"accepted": ("\033[32m", ("", "")), "rejected": ("\033[31;9m", ("(", ")")), "own": ("\033[1;34m", ("[", "]"))}
STOP_REASONS = {
    "length": "draft length reached",
    "EOS": "the draft ended the text",
    "low confidence": "one more draft token was not worth its cost",
    "no candidate": "the drafter had no more candidates",
    "off": "plain decoding: drafting does not pay here",
}


def styled(text: str, kind: str, color: bool) -> str:
    """A token with the style of its kind: accepted, rejected, or the target's own."""
    code, (before, after) = STYLES[kind]
    return f"{code}{text}\033[0m" if color else f"{before}{text}{after}"


def legend(color: bool) -> str:
    """The styles, explained."""
    names = (("accepted", "accepted"), ("rejected", "rejected"), ("own", "target's own"))
    return ", ".join(styled(name, kind, color) for kind, name in names)


def styled_tokens(r: Round, decode: Callable[[list[int]], str], color: bool) -> str:
    """The draft tokens of a round and the target's token after them.

    Args:
        r: the round
        decode: token ids -> text
        color: use terminal colors instead of marks
    """
    words = [styled(decode([t]), "accepted" if a else "rejected", color) for t, a in zip(r.proposed, r.accepted, strict=True)]
    if r.extra_token is not None:
        words.append(styled(decode([r.extra_token]), "own", color))
    return " ".join(words)


def trace_lines(generation: Generation, decode: Callable[[list[int]], str], color: bool) -> list[str]:
    """Two lines for each round: its tokens; then accepted tokens, the reason drafting stopped, milliseconds per stage.

    Args:
        generation: a finished text
        decode: token ids -> text
        color: use terminal colors instead of marks
    """
    lines = [f"  0  {styled(decode(generation.token_ids[:1]), 'own', color)}"]
    prefill = {stage: ms for stage in ("target_prefill", "draft_prefill") if (ms := generation.ms.get(stage))}
    lines.append(f"     prefill of both prompts; {_stages(prefill)}")
    for i, r in enumerate(generation.rounds):
        lines.append(f"{i + 1:3d}  {styled_tokens(r, decode, color)}")
        reason = STOP_REASONS[r.stop_reason]
        what = f"accepted {r.num_accepted} of {len(r.proposed)}; {reason}" if r.proposed else reason
        lines.append(f"     {what}{'; recomputed' if r.recomputed else ''}; {_stages(r.ms)}")
    return lines


def _stages(ms: dict[str, float]) -> str:
    return f"{sum(ms.values()):.2f} ms" + (f" = {' + '.join(f'{stage} {t:.2f}' for stage, t in ms.items())}" if len(ms) > 1 else "")


def print_trace(generation: Generation, decode: Callable[[list[int]], str], verbose: bool) -> None:
    """Print the rounds of a generation; in color on a terminal, unless NO_COLOR is set (no-color.org).

    Args:
        generation: Speculative generation.
        decode: Token ids -> text.
        verbose: Print each round with its stages instead of a table.
    """
    if verbose:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(f"\nrounds: {legend(color)}", *trace_lines(generation, decode, color), sep="\n")
        return
    rows = [
        (styled_tokens(r, decode, color=False), f"{i + 1}", f"{r.num_accepted}/{len(r.proposed)}", round(sum(r.ms.values()), 2))
        for i, r in enumerate(generation.rounds)
    ]
    print_table(f"rounds: {legend(color=False)}", ("draft tokens", "round", "accepted", "ms"), rows)
