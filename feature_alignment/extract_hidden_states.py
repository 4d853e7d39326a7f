"""Task 1.1. Hidden states of both models on the same tokens.

    prompt            | x1   x2   x3   </s>          tokens both models read
    EventGPT (events) | g0 → g1 → g2 → g3            g[t] emits x(t+1)
    Video-LLaVA       | v0 → v1 → v2 → v3            v[t] emits x(t+1)

reads   a manifest of clips and questions, both checkpoints
writes  hidden_states/<split>/{egpt,vl}_hidden_states.pt, positions.pt, samples.jsonl; token_pairs/<split>.json; vl_lm_head.pt

    python feature_alignment/extract_hidden_states.py --config configs/demo.yaml --split train
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from feature_alignment.config import Common, as_plain, parse_config
from feature_alignment.console import print_json_line, print_table, run

if TYPE_CHECKING:
    from torch import Tensor

    from feature_alignment.inputs.samples import Sample
    from feature_alignment.models.pair import Decoder, Pair, Prompt, State


@dataclass(frozen=True)
class ExtractConfig(Common):
    """Write hidden states of both models, teacher-forced on one token sequence.

    Args:
        split: which manifest
        prefix: whose text both models read: the verifier's own greedy answer, the drafter's, or each its own (only to reproduce
            an earlier, misleading measurement)
        max_new_tokens: longest answer, EOS included
        batch_size: prompts of equal length that are read at once
        store_dtype: what the files hold
    """

    split: str = "train"
    prefix: Literal["verifier", "drafter", "own"] = "verifier"
    max_new_tokens: int = 64
    batch_size: int = 32
    store_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


def force_batch(model: Decoder, state: State, answers: Sequence[Sequence[int]]) -> Tensor:
    """States [b, s, d] that emit the given answers; positions behind an answer's end are meaningless."""
    import torch

    width = max(map(len, answers))
    ids = torch.tensor([[*a, *[0] * (width - len(a))] for a in answers], device=model.device)
    return model.teacher_force(state, ids)


def batches(
    samples: Sequence[Sample], todo: Sequence[int], pair: Pair, size: int
) -> Iterator[tuple[list[int], list[Prompt], list[Prompt]]]:
    """Rows whose prompts are equally long for both models, `size` at a time: no padding, so no position is ever shifted."""
    waiting: dict[tuple[int, int], list[tuple[int, Prompt, Prompt]]] = {}
    for row in todo:
        target, draft = pair.target.prepare(samples[row]), pair.draft.prepare(samples[row])
        group = waiting.setdefault((len(target.ids), len(draft.ids)), [])
        group.append((row, target, draft))
        if len(group) == size:
            yield tuple(map(list, zip(*group, strict=True)))
            group.clear()
    for group in waiting.values():
        if group:
            yield tuple(map(list, zip(*group, strict=True)))


def extract(pair: Pair, speaker: Decoder, samples: Sequence[Sample], cfg: ExtractConfig, writer: Any) -> None:
    """Fill `writer` with every row it does not have yet. `speaker` is the drafter at full depth: its own text needs its own head."""
    from tqdm import tqdm

    todo = [i for i in range(len(samples)) if i not in writer.done]
    with tqdm(total=len(samples), initial=len(samples) - len(todo), desc=f"extract {cfg.split}", unit="row", disable=None) as bar:
        for rows, target_prompts, draft_prompts in batches(samples, todo, pair, cfg.batch_size):
            target_state, draft_state = pair.target.prefill(target_prompts), pair.draft.prefill(draft_prompts)
            says = pair.target.generate(target_state, cfg.max_new_tokens)
            speaker_state = draft_state if speaker is pair.draft else speaker.prefill(draft_prompts)
            drafter_says = speaker.generate(speaker_state, cfg.max_new_tokens)
            if cfg.prefix == "own":  # paired by index, up to the shorter text
                lengths = [min(len(a), len(b)) for a, b in zip(says, drafter_says, strict=True)]
                read = [says, drafter_says]
            else:
                text = says if cfg.prefix == "verifier" else drafter_says
                lengths, read = [len(a) for a in text], [text, text]
            target_hidden = force_batch(pair.target, target_state, read[0])
            draft_hidden = force_batch(pair.draft, draft_state, read[1])
            for i, row in enumerate(rows):
                sample, n = samples[row], lengths[i]
                about = {"id": sample.id, "sequence": sample.sequence, "question": sample.question, "facts": sample.facts}
                about |= {"vl_tokens": says[i], "vl_text": pair.target.tokenizer.decode(says[i], skip_special_tokens=True)}
                about |= {"egpt_tokens": drafter_says[i], "egpt_text": speaker.tokenizer.decode(drafter_says[i], skip_special_tokens=True)}
                writer.write(row, draft_hidden[i].cpu(), target_hidden[i].cpu(), read[0][i][:n], about)
            bar.update(len(rows))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    cfg = parse_config(ExtractConfig, argv, "extract_hidden_states")
    import torch

    from feature_alignment import artifacts
    from feature_alignment.inputs.samples import read_samples
    from feature_alignment.models.pair import load_draft, load_pair

    samples = read_samples(cfg.manifests, cfg.split, cfg.limit, cfg.questions)
    out = cfg.out / "hidden_states" / cfg.split
    settings = {k: v for k, v in as_plain(cfg).items() if k not in ("resume", "output_dir", "threads", "batch_size")}
    settings["checkpoints"] = [artifacts.file_hash(p) for p in (cfg.target_id, cfg.draft_id) if p.is_dir()]
    settings["manifest"] = artifacts.file_hash(cfg.manifests[cfg.split])
    settings["questions"] = artifacts.file_hash(cfg.questions) if cfg.questions else None
    if cfg.resume and (out / "meta.json").is_file():
        meta = artifacts.read_json(out / "meta.json", "rm -r " + str(out))
        if meta.get("settings") == settings:
            print_json_line({"split": cfg.split, "rows": meta["rows"], "positions": meta["positions"], "reused": True, "written": str(out)})
            return meta
    pair = load_pair(cfg)
    speaker = pair.draft if pair.draft.has_own_head else load_draft(dataclasses.replace(cfg, draft_layers=None))
    sizes = {"draft": pair.draft.hidden_size, "target": pair.target.hidden_size}
    dtype = getattr(torch, cfg.store_dtype)
    (out / "meta.json").unlink(missing_ok=True)  # from here on an older complete run no longer counts as one
    writer = artifacts.HiddenStatesWriter(out, settings, len(samples), cfg.max_new_tokens, sizes, dtype)
    extract(pair, speaker, samples, cfg, writer)

    positions = sum(len(r["vl_tokens"] if cfg.prefix != "drafter" else r["egpt_tokens"]) for r in writer.rows.values())
    meta = artifacts.provenance(
        "extract_hidden_states",
        cfg,
        {"target": cfg.target_id, "draft": cfg.draft_id, "manifest": cfg.manifests[cfg.split]},
        settings=settings,
        prefix=cfg.prefix,
        rows=len(samples),
        positions=positions,
        draft_layers=list(pair.draft.taps),
        draft_norm=pair.draft.norm,
        target_norm="post",
        hidden_size_draft=sizes["draft"],
        hidden_size_target=sizes["target"],
        dtype=cfg.store_dtype,
    )
    artifacts.save_pt(cfg.out / "hidden_states" / "vl_lm_head.pt", pair.target.head_weight.detach().cpu().clone())
    keys = ("egpt_tokens", "egpt_text", "vl_tokens", "vl_text")
    results = [
        {"sample_id": r["id"], "sequence": r["sequence"], "query": r["question"], **{k: r[k] for k in keys}}
        for _, r in sorted(writer.rows.items())
    ]
    artifacts.write_json(cfg.out / "token_pairs" / f"{cfg.split}.json", {"meta": meta, "results": results})
    writer.finish(meta)
    print_table(
        f"hidden states of {cfg.split}, prefix: {cfg.prefix}",
        ("model", "rows", "positions", "width", "layers", "norm"),
        [
            ("EventGPT", len(samples), positions, sizes["draft"], "+".join(map(str, pair.draft.taps)), pair.draft.norm),
            ("Video-LLaVA", len(samples), positions, sizes["target"], str(pair.target.num_layers), "post"),
        ],
    )
    print_json_line({"split": cfg.split, "rows": len(samples), "positions": positions, "reused": False, "written": str(out)})
    return meta


if __name__ == "__main__":
    run(main)
