"""Answers to every sample of a data set, one at a time or in batches, as rows of a file of answers (docs/formats.md)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from feature_alignment.cli.console import UserError, progress, repairs_of
from feature_alignment.decoding.baseline_drafters import TableProposer
from feature_alignment.decoding.settings import DecodingConfig
from feature_alignment.decoding.speculative_pair import Prompts, SpeculativePair
from feature_alignment.inputs.samples import Sample
from feature_alignment.storage.answer_rows import AnswerRow, AnswersFile

RECORDED_SETTINGS = ("draft", "accept", "threshold", "num_draft_tokens", "adaptive", "temperature", "max_new_tokens")


def answer_missing(
    pair: SpeculativePair, file: AnswersFile, groups: Sequence[Sequence[tuple[Sample, str]]], name: str, fail_fast: bool = False
) -> tuple[Totals, float]:
    """Answer every sample that has no row yet, and append its row.

    Args:
        pair: models and drafter
        file: file of answers, begun
        groups: samples with their input hashes, as `file` was made with
        name: of the data set, for the progress bar
        fail_fast: stop at the first sample that cannot be answered

    Returns:
        totals over the new rows, and the seconds spent

    Raises:
        UserError: with `fail_fast`, a sample cannot be answered
    """
    todo, began, totals = file.todo, time.perf_counter(), Totals()
    table = pair.proposer if pair.cfg.draft == "previous" else None
    with progress(total=sum(map(len, groups)), initial=len(file.rows), desc=f"answer {name}", unit="sample") as bar:
        for group, is_missing in zip(groups, todo, strict=True):
            if is_missing:
                rows = answer(pair, [sample for sample, _ in group], fail_fast)
                file.append([{**row, "input_hash": input_hash} for row, (_, input_hash) in zip(rows, group, strict=True)])
                bar.set_postfix_str(totals.add(rows).progress_text(time.perf_counter() - began))
                bar.update(len(group))
            elif isinstance(table, TableProposer):  # as if this run had answered it
                for sample, _ in group:
                    table.remember(sample.question, file.rows[sample.id]["token_ids"])
    return totals, time.perf_counter() - began


def answer(pair: SpeculativePair, samples: Sequence[Sample], fail_fast: bool = False) -> list[AnswerRow]:
    """The rows of samples that are decoded together; one that cannot be read gets a row with its error.

    Args:
        pair: models and drafter
        samples: one, or a batch
        fail_fast: raise the first error

    Raises:
        UserError: with `fail_fast`, a sample cannot be answered
    """
    prepared: dict[str, Prompts] = {}
    rows: dict[str, AnswerRow] = {sample.id: {"id": sample.id, "question": sample.question} for sample in samples}
    for sample in samples:
        try:
            prepared[sample.id] = pair.prepare(sample)
        except (UserError, OSError) as error:
            if fail_fast:
                raise UserError(f"sample {sample.id}: {error}") from None
            rows[sample.id]["error"] = str(error)
        if repairs := repairs_of(sample.events, sample.video):
            rows[sample.id]["repaired"] = repairs
    for (key, _), decoded in zip(prepared.items(), _decode(pair, list(prepared.values()), len(samples) > 1), strict=True):
        rows[key] |= decoded
    return list(rows.values())


def _decode(pair: SpeculativePair, prompts: Sequence[Prompts], together: bool) -> Iterator[AnswerRow]:
    """The decoded part of the row of each prompt; in a batch, the milliseconds are each row's equal share of the batch's."""
    settings = recorded_settings(pair.cfg)
    if together and prompts:
        batch = pair.decode_batch(prompts)
        n = len(prompts)
        ms = {stage: value / n for stage, value in batch.ms.items()}
        decoded = [
            (ids, _of_rounds(accepted, pair.cfg.max_new_tokens), len(accepted), batch.total_ms / n, ms)
            for ids, accepted in zip(batch.token_ids, batch.accepted, strict=True)
        ]
    else:
        decoded = [(g.token_ids, [r.num_accepted for r in g.rounds], g.passes, g.total_ms, dict(g.ms)) for g in map(pair.decode, prompts)]
    for token_ids, accepted, passes, total_ms, ms in decoded:
        yield {
            "text": pair.text_of(token_ids),
            "token_ids": token_ids,
            "passes": passes,
            "tokens_per_pass": (len(token_ids) - 1) / passes if passes else None,
            "accepted": accepted,
            "total_ms": total_ms,
            "ms": ms,
            "settings": settings,
        }


def _of_rounds(accepted: list[int], max_new_tokens: int) -> list[int]:
    """Of a text's passes, the accepted draft tokens of those that had room for draft tokens, which the very last may not have had."""
    emitted_before = 1 + sum(n + 1 for n in accepted[:-1])
    return accepted[:-1] if emitted_before == max_new_tokens - 1 else accepted


def recorded_settings(cfg: DecodingConfig) -> dict[str, Any]:
    """The settings of drafting and decoding that each row records; the threshold only of lossy rules."""
    settings = {name: getattr(cfg, name) for name in RECORDED_SETTINGS if name != "threshold"}
    return settings if cfg.accept == "token" else {**settings, "threshold": cfg.acceptance_threshold}


@dataclass
class Totals:
    """Sums over rows.

    Args:
        answered: rows with an answer
        failed: rows with an error
        tokens: of all answers
        passes: of the target, after its prefill
        rounds: of speculative decoding
        accepted: draft tokens accepted in them
    """

    answered: int = 0
    failed: int = 0
    tokens: int = 0
    passes: int = 0
    rounds: int = 0
    accepted: int = 0

    def add(self, rows: Iterable[AnswerRow]) -> Totals:
        """Add rows; returns itself."""
        for row in rows:
            if "error" in row:
                self.failed += 1
                continue
            self.answered += 1
            self.tokens += len(row["token_ids"])
            self.passes += row["passes"]
            self.rounds += len(row["accepted"])
            self.accepted += sum(row["accepted"])
        return self

    @property
    def tokens_per_pass(self) -> float:
        """Tokens after the first of each answer per forward pass of the target; nan without a pass."""
        return (self.tokens - self.answered) / self.passes if self.passes else float("nan")

    @property
    def mean_accepted(self) -> float:
        """Draft tokens accepted in a round; nan without a round."""
        return self.accepted / self.rounds if self.rounds else float("nan")

    def progress_text(self, seconds: float) -> str:
        """Tokens per second and mean accepted length, as a progress bar shows them."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.tokens / seconds:.1f} tokens/s, {self.mean_accepted:.2f} accepted a round{failed}"
