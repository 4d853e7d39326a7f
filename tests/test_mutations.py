"""Damaged and senseless input for all seven scripts: a message and exit code 2, or a result that says what it was made from.

A mutation is one file of a complete small run, changed. Then a script runs as its command would, in this process. It may refuse: exit
code 2, a message, nothing written. Or it may work, and then

- where a hash covers the changed file (states, texts, heads, adapters, results), the numbers are those of the untouched run: the file
  was not read, or what is wrong with it was made anew;
- where none can (settings, manifests, clips, checkpoints: they are the user's word), the new result names them by their hashes.

`-m slow` runs a thousand; the default run takes every seventeenth of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import main_of

from feature_alignment.adapters.chained import ChainedAdapter
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.cli import console
from feature_alignment.inputs.event_files import save_events
from feature_alignment.storage.files import content_hash
from feature_alignment.storage.identity import source_hash
from feature_alignment.storage.verification import WRONG, verify

MUTATIONS = 1000
SLICE = 17
SEED = 9
NASTY = (None, True, -1, 0, 3.5, 10**30, float("nan"), float("inf"), "", "x", "../../x", [], [[]], {}, {"a": 1}, "\ud800", "9" * 5000)

_CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
MODELS = [f"pair/{model}/{file}" for model in ("eventgpt", "video_llava") for file in _CHECKPOINT]
CLIPS = ["scenes/test.jsonl", "scenes/events/test-0000.npy", "scenes/video/test-0000.mp4"]
STATE_FILES = ("egpt_hidden_states.pt", "vl_hidden_states.pt", "egpt_event_states.pt", "positions.pt", "samples.jsonl", "meta.json")
HEADS = ["out/hidden_states/vl_lm_head.pt", "out/hidden_states/vl_embeddings.pt"]
ADAPTERS = [f"out/{kind}/{f}" for kind in ("adapter", "chained_adapter") for f in ("adapter.pt", "meta.json")]
TEXTS = ["out/token_pairs/train.json", "out/token_pairs/test.json"]


def states(*splits: str) -> list[str]:
    return [f"out/hidden_states/{split}/{file}" for split in splits for file in STATE_FILES]


UNFINISHED = [f"out/hidden_states/half.unfinished/{f}" for f in ("settings.json", "progress-0.txt", *STATE_FILES[:3])]
RESULTS = ["out/acceptance/acceptance.json", "out/token_baseline/comparison.json", "out/benchmark/benchmark.json"]
FEW = ["--split", "test", "--output_dir", "{new}", "--limit", "2", "--max_new_tokens", "4"]
ASKED = ["--split", "test", "--output_dir", "{new}", "--questions", "{root}/q.txt", "--answers", "{root}/answers.json"]
HALF = ["--split", "half", '--manifests={{"half": "{root}/scenes/test.jsonl"}}']
CHAINED = ["--adapter", "chained", "--bottleneck", "16"]
SHORT = ["--max_new_tokens", "4"]
QUICK = ["--limit", "1", "--max_new_tokens", "4", "--repeats", "1", "--warmup", "0", "--num_draft_tokens", "2"]

# script, its flags, the files that are changed under it, how often
PLANS: list[tuple[str, list[str], list[str], int]] = [
    ("extract_hidden_states", FEW, [*MODELS, *CLIPS, "tiny.yaml"], 22),
    ("extract_hidden_states", ASKED, ["q.txt", "answers.json"], 8),
    ("extract_hidden_states", ["--split", "test"], [*states("test"), *HEADS, TEXTS[1]], 8),
    ("extract_hidden_states", HALF, UNFINISHED, 6),
    ("hidden_adapter", ["--hidden_size", "8", "--repeats", "1"], ["tiny.yaml"], 4),
    ("train_hidden_adapter", [], [*states("train", "validation"), HEADS[0], *ADAPTERS[:2], "tiny.yaml"], 12),
    ("train_hidden_adapter", CHAINED, [*states("train", "validation"), *HEADS, *ADAPTERS[2:]], 10),
    ("measure_feature_acceptance", [], [*states("test", "train", "validation"), *HEADS, *ADAPTERS, RESULTS[0], "tiny.yaml"], 14),
    ("compare_token_baseline", [], [*TEXTS, *RESULTS[:2], "tiny.yaml"], 8),
    ("compare_token_baseline", ["--token_pairs", "{root}/answers.json", "--output_dir", "{new}"], ["answers.json"], 6),
    ("feature_sd_inference", SHORT, [*MODELS, *CLIPS, *ADAPTERS[:2], "tiny.yaml"], 10),
    ("feature_sd_inference", [*SHORT, "--draft", "chained"], ADAPTERS[2:], 3),
    ("feature_sd_inference", [*SHORT, "--draft", "ngram"], TEXTS[:1], 3),
    ("benchmark_feature_sd", QUICK, [*ADAPTERS, TEXTS[0], RESULTS[0], RESULTS[2], *CLIPS, "tiny.yaml"], 5),
]


# ---- ways to change a file


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - 1))]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b"\n", b"garbage", data))


def blank(data: bytes, rng: random.Random) -> bytes:
    begin = rng.randrange(len(data))
    size = min(len(data) - begin, rng.choice((4, 64, 4096)))
    return data[:begin] + rng.choice((b"\0", b"\xff", b" ")) * size + data[begin + size :]


def shuffle(data: bytes, rng: random.Random) -> bytes:
    third = max(1, len(data) // 3)
    return data[third:] + data[:third]


BYTES: list[Callable[[bytes, random.Random], bytes]] = [flip, flip, truncate, extend, blank, shuffle, lambda *_: b""]


def change_leaf(content, rng: random.Random):
    """One value anywhere in nested JSON becomes another, or is dropped."""
    places = []

    def walk(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(content)
    part, key = rng.choice(places)
    if rng.random() < 0.2:
        del part[key]
    else:
        part[key] = rng.choice(NASTY)


def change_json(path: Path, rng: random.Random) -> None:
    text = path.read_text()
    try:
        content = json.loads(text)
        change_leaf(content, rng)
        path.write_text(json.dumps(content))
    except ValueError:  # JSON lines
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        row = json.loads(lines[number].partition(" ")[2] if path.name.startswith("progress") else lines[number])
        change_leaf(row, rng)
        lines[number] = json.dumps(row)
        path.write_text("\n".join(lines) + "\n")


def change_tensor(path: Path, rng: random.Random) -> None:
    """Still a `.pt` that torch.save wrote: not finite, of another type, ragged, of another width, swapped with its neighbour."""
    content = torch.load(path, weights_only=True)
    while isinstance(content, dict) and "state_dict" not in content and "meta" not in content:
        content = content[rng.choice(sorted(content))]
    if isinstance(content, dict):  # an adapter
        if rng.random() < 0.4:
            change_leaf(content["meta"], rng)
        else:
            name = rng.choice(sorted(content["state_dict"]))
            content["state_dict"][name] = changed_tensor(content["state_dict"][name], rng)
    else:
        content = changed_tensor(content, rng)
    torch.save(content, path)


def changed_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    kind = rng.randrange(6)
    if kind < 2:
        flat = tensor.double().clone().flatten()
        flat[rng.randrange(len(flat))] = (float("nan"), float("inf"), 1e30)[rng.randrange(3)]
        return flat.view(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else flat.view(tensor.shape)
    return (tensor[:-1], tensor[..., :-1], torch.cat([tensor, tensor], -1), tensor.half())[kind - 2].clone()


def another_adapter(path: Path, rng: random.Random) -> None:
    """A good adapter that belongs elsewhere: other layers, another width, the other kind. Alone, as somebody would send it."""
    width = rng.choice((16, 32, 64, 96))
    adapter = rng.choice((HiddenAdapter(width, rng.choice((16, 32)), 4), ChainedAdapter(32, width, 5, 16)))
    meta = {"geometry": adapter.geometry, "draft_layers": rng.choice(([3], [2], [1, 2])), "prefix": "verifier"}
    torch.save({"meta": meta, "state_dict": dict(adapter.state_dict())}, path)
    (path.parent / "meta.json").unlink()


def change_events(path: Path, rng: random.Random) -> None:
    """Columns that are ragged, empty, not finite, of another type, out of order, or far away."""
    stream = {"x": np.arange(40) % 64, "y": np.arange(40) % 48, "t": np.arange(40) * 100, "p": np.arange(40) % 2}
    key = rng.choice("xytp")
    column = stream[key].astype(float)
    change = rng.choice(
        (
            lambda: column[:-1],
            lambda: column[:0],
            lambda: np.where(np.arange(40) == 7, np.nan, column),
            lambda: np.where(np.arange(40) == 7, -np.inf, column),
            lambda: column.astype(str),
            lambda: column[::-1],
            lambda: column * 1e17,
            lambda: -column - 5,
            lambda: column.astype(np.float16),
            lambda: column[:, None],
            lambda: column.astype(np.uint64) + (1 << 63),
            lambda: column + 0.5,
            lambda: None,
        )
    )
    save_events(path, stream | {key: change()})


def another_file(path: Path, rng: random.Random) -> None:
    """A neighbour's contents under this name: draft for target, one split for another, a text for a tensor."""
    others = sorted(p for p in (*path.parent.iterdir(), *path.parent.parent.glob(f"*/{path.name}")) if p.is_file())
    others = [p for p in others if p.resolve() != path.resolve()]
    shutil.copy(rng.choice(others), path) if others else path.write_text("something else")


def gone(path: Path, rng: random.Random) -> None:
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()


def mutate(path: Path, rng: random.Random) -> str:
    """Change the file at `path` in one of the ways that suit it; returns which."""
    ways: list[Callable] = [another_file, gone]
    if path.suffix in (".json", ".jsonl", ".yaml") or path.name.startswith("progress"):
        ways += [change_json] * 5
    if path.suffix == ".pt":
        ways += [change_tensor] * 4
    if path.name == "adapter.pt":
        ways += [another_adapter] * 4
    if path.suffix == ".npy":
        ways += [change_events] * 6
    way = rng.choice([*ways, *BYTES])
    if way in BYTES:
        path.write_bytes(way(path.read_bytes(), rng))
    else:
        way(path, rng)
    return getattr(way, "__name__", "change")


# ---- one mutation


class Scene:
    """A complete small run that can be changed and put back."""

    def __init__(self, root: Path, kept: Path) -> None:
        self.root, self.kept, self.new = root, kept, root / "new"
        (root / "q.txt").write_text(json.dumps(["What are the key elements in this scene?", "Where?"]))
        for script, argv in (
            ("extract_hidden_states", ASKED[:-2]),
            ("extract_hidden_states", HALF),
            ("benchmark_feature_sd", QUICK),
            *[("feature_sd_inference", [*SHORT, "--draft", draft]) for draft in ("aligned", "chained", "ngram")],
        ):
            code, said = self.run(script, argv)
            assert code == 0, said
        shutil.move(self.new / "token_pairs" / "test.json", root / "answers.json")
        shutil.rmtree(self.new)
        self.undo(root / "out" / "hidden_states" / "half")
        shutil.copytree(root, kept, symlinks=True)

    def undo(self, folder: Path) -> None:
        """Make a complete split look as if it had been killed after its first rows."""
        from feature_alignment.storage.progress_notes import note_line, unfinished_folder

        meta = json.loads((folder / "meta.json").read_text())
        positions = torch.load(folder / "positions.pt", weights_only=True)
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        ids, lengths, clips = (positions[key] for key in ("token_ids", "lengths", "clip_index"))
        notes = [{"row": i, "read": ids[i, : lengths[i]].tolist(), "event_row": int(clips[i]), **r} for i, r in enumerate(rows[:8])]
        (folder / "progress-0.txt").write_bytes(b"".join(map(note_line, notes)))
        (folder / "settings.json").write_text(json.dumps({k: meta[k] for k in ("schema", "settings", "made_from", "code", "plan")}))
        for name in ("meta.json", "positions.pt", "samples.jsonl"):
            (folder / name).unlink()
        folder.rename(unfinished_folder(folder))
        (folder.parents[1] / "token_pairs" / "half.json").unlink()

    def restore(self) -> None:
        for part in ("out", "new"):
            shutil.rmtree(self.root / part, ignore_errors=True)
        shutil.copytree(self.kept / "out", self.root / "out", symlinks=True)

    def run(self, script: str, argv: list[str]) -> tuple[int, str]:
        """Exit code and what was said on stderr, of the script as a command would run it."""
        console._repairs.clear()
        said = io.StringIO()
        signal.setitimer(signal.ITIMER_REAL, 60)
        code = 0
        argv = [word.format(root=self.root, new=self.new) for word in argv]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                console.run(lambda: main_of(script)(["--config", str(self.root / "tiny.yaml"), *argv]))
        except SystemExit as end:
            code = end.code
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return code, said.getvalue()


@pytest.fixture(scope="module")
def scene(finished, tmp_path_factory):
    def too_long(*_):
        raise AssertionError("took more than a minute")

    before = signal.signal(signal.SIGALRM, too_long), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "basicConfig", lambda **_: None)
        kept = tmp_path_factory.mktemp("mutations")
        shutil.copytree(finished, kept / "finished", symlinks=True)
        yield Scene(finished, kept / "scene")
        shutil.rmtree(finished)
        shutil.copytree(kept / "finished", finished, symlinks=True)
    for number, handler in zip((signal.SIGALRM, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a final name. What is unfinished says so by its name."""
    unfinished_folder = lambda p: any(part.endswith(".unfinished") for part in p.relative_to(folder).parts)  # noqa: E731
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not unfinished_folder(p)}


def numbers(folder: Path, but: str) -> dict[str, object]:
    """What a run found, without what it was run by and how long it took; of all files `but` one."""
    found: dict[str, object] = {}
    for name, data in tree(folder).items():
        if name == but:
            continue
        if (name.startswith("hidden_states/") and name.endswith((".pt", ".jsonl"))) or name.endswith("history.jsonl"):
            found[name] = data
        elif name.endswith("adapter/meta.json"):
            found[name] = json.loads(data)["weights_hash"]
        elif name.startswith(("acceptance/acc", "token_baseline/comp", "token_pairs/")) and name.endswith(".json"):
            found[name] = without_times({k: v for k, v in json.loads(data).items() if k not in ("meta", "content_hash", "files")})
        elif name.startswith("sd/"):
            found[name] = json.loads(data)["token_ids"]
        elif name == "benchmark/benchmark.json":
            rows = json.loads(data)["rows"]  # how far an adaptive row drafts is the clock's to say
            found[name] = [(r["draft"], r["accept"], r["exact_match"], r["adaptive"] or r["tokens_per_pass"]) for r in rows]
    return found


def without_times(content):
    """JSON without the wall-clock times in it."""
    if isinstance(content, dict):
        return {k: without_times(v) for k, v in content.items() if k not in ("seconds", "overhead_ms")}
    return [without_times(v) for v in content] if isinstance(content, list) else content


def plan(count: int = MUTATIONS) -> list[tuple[int, str, list[str], str]]:
    """Number, script, flags, file. The same for ever, by its seed."""
    rng = random.Random(SEED)
    weights = [often for *_, often in PLANS]
    chosen = rng.choices(PLANS, weights, k=count)
    return [(number, script, argv, rng.choice(files)) for number, (script, argv, files, _) in enumerate(chosen)]


def outcome_of(scene: Scene, number: int, script: str, argv: list[str], file: str) -> tuple[str, str]:
    """`refused` or `result`, and what was wrong ("" for nothing)."""
    rng = random.Random(f"{SEED} {number}")
    scene.restore()
    path = scene.root / file
    kept = path.read_bytes()
    try:
        way = mutate(path, rng)
        before, began = tree(scene.root / "out"), time.time()
        try:
            code, said = scene.run(script, argv)
        except BaseException as error:
            return "wrong", f"{way}: {type(error).__name__}: {error}"[:600]
        after = tree(scene.root / "out")
        leftover = [str(p) for p in scene.root.rglob("*") if p.name.endswith(".lock") or ".tmp" in p.name]
        if leftover:
            return "wrong", f"{way}: left over: {leftover}"
        if code == 2:
            if not said.rpartition("error: ")[2].strip() or "Traceback" in said:
                return "wrong", f"{way}: no message: {said[-300:]}"
            if after != before or tree(scene.new):
                changed = [k for k in after.keys() | before.keys() if after.get(k) != before.get(k)]
                return "wrong", f"{way}: refused, and wrote {changed or list(tree(scene.new))}"
            return "refused", ""
        if code != 0:
            return "wrong", f"{way}: exit code {code}: {said[-300:]}"
        return "result", judged(scene, script, file, began)
    finally:
        if file.startswith("out/"):
            scene.restore()
        else:
            if path.is_dir():
                path.rmdir()
            path.write_bytes(kept)


def judged(scene: Scene, script: str, file: str, began: float) -> str:
    """What is wrong with a result: numbers that changed though a hash covers the file; a result that does not say what it was made of."""
    if file.startswith("out/"):
        own = str(Path(file).relative_to("out"))
        wanted, got = numbers(scene.kept / "out", own), numbers(scene.root / "out", own)
        if script == "extract_hidden_states" and "half" in file:
            wanted |= {k.replace("/test", "/half"): v for k, v in wanted.items() if "/test" in k and k.startswith(("hidden", "token_p"))}
        differ = [k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k)]
        return f"numbers changed: {differ}" if differ else ""
    out = scene.new if scene.new.is_dir() else scene.root / "out"
    for record in (p for p in out.rglob("*.json") if p.stat().st_mtime > began):
        content = json.loads(record.read_text())
        if content.get("content_hash") != content_hash(content):
            return f"{record} is not sealed"
        meta = content.get("meta", content)
        for name, places in meta["inputs"].items():
            source = [Path(p) for p in places] if isinstance(places, list) else Path(places)
            if name in meta["made_from"] and meta["made_from"][name] != source_hash(source):
                return f"{record} does not name its {name}"
    return ""


def run_mutations(scene: Scene, numbers: range) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    wrong = []
    todo = plan()
    for number in numbers:
        outcome, why = outcome_of(scene, *todo[number])
        outcomes[f"{todo[number][1]}: {'wrong' if why else outcome}"] += 1
        if why:
            wrong.append(f"{number} {todo[number][1]} {todo[number][3]}: {why}")
    print(json.dumps(dict(sorted(outcomes.items())), indent=1))
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n".join(wrong)
    return outcomes


def test_a_slice_of_the_mutations(scene):
    outcomes = run_mutations(scene, range(0, MUTATIONS, SLICE))
    assert sum(n for name, n in outcomes.items() if name.endswith("refused")) > 20
    assert sum(n for name, n in outcomes.items() if name.endswith("result")) > 5


@pytest.mark.slow
def test_a_thousand_mutations(scene):
    outcomes = run_mutations(scene, range(MUTATIONS))
    assert sum(outcomes.values()) == MUTATIONS and len({name.partition(":")[0] for name in outcomes}) == 7


def test_the_untouched_run_is_what_it_says(scene):
    scene.restore()
    findings, compared = verify(scene.root / "out")
    assert not [f for f in findings if f.state in WRONG] and compared["rows"] > 50
    assert [f.about for f in findings] == [os.path.join("hidden_states", "half.unfinished")]


def test_a_byte_of_the_states_is_found_by_its_sample(scene):
    scene.restore()
    path = scene.root / "out" / "hidden_states" / "train" / "vl_hidden_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    findings = {(f.about, f.state): f.why for f in verify(scene.root / "out")[0]}
    assert "the states of 1 of 18 samples, e.g. train-000" in findings["hidden_states/train/vl_hidden_states.pt", "altered"]
    for made in ("adapter/meta.json", "acceptance/acceptance.json", "benchmark/benchmark.json", "token_baseline/comparison.json"):
        assert (made, "stale") in findings
    scene.restore()
