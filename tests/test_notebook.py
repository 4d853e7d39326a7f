"""The notebook is kept without outputs, and shows what is in the files of a run, here the tiny one."""

from __future__ import annotations

import base64
import io
import json
import re

import nbformat
import numpy as np
import pytest
from conftest import ROOT, main_of
from nbclient import NotebookClient
from PIL import Image

from feature_alignment.models.preprocessing import load_tokenizer

PATH = ROOT / "notebooks" / "inspect_tensors.ipynb"


@pytest.fixture(scope="module")
def shown(finished, tmp_path_factory):
    """What its cells print and draw on the tiny run: text, pictures as arrays [h, w, 3], pages."""
    notebook = nbformat.read(PATH, as_version=4)
    main_of("feature_sd_inference")(["--config", str(finished / "tiny.yaml"), "--draft", "own"])  # its drafts are not all kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATURE_ALIGNMENT_RUN", str(finished / "out"))
        for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):  # nothing into the home directory
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output.get("data", {}) for output in outputs]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(d["image/png"]))).convert("RGB")) for d in data if "image/png" in d]
    return {
        "text": "".join(output.text for output in outputs if output.get("name") == "stdout"),
        "complaints": "".join(output.text for output in outputs if output.get("name") == "stderr"),
        "pictures": pictures,
        "pages": [d["text/html"] for d in data if "text/html" in d],
    }


def test_it_is_kept_without_outputs():
    cells = nbformat.read(PATH, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 30 for cell in code)
    assert "/home/" not in PATH.read_text() and "/tmp/" not in PATH.read_text()


def test_it_draws_every_picture_and_complains_about_nothing(shown):
    assert not shown["complaints"]
    assert len(shown["pictures"]) == 3  # what both models see; cosines over the words; both spaces
    assert all(len(np.unique(p.astype(int) @ (1, 256, 65536))) > 20 for p in shown["pictures"])


def test_the_words_it_lists_are_those_in_the_files(shown, finished):
    row = json.loads((finished / "out" / "hidden_states" / "test" / "samples.jsonl").read_text().splitlines()[0])
    tokens = load_tokenizer(finished / "pair" / "video_llava").convert_ids_to_tokens(row["vl_tokens"])
    listed = re.findall(r"^ +(\d+) (\S+) +-?\d\.\d\d ", shown["text"], re.MULTILINE)
    assert listed == [(str(t), token.replace("▁", " ").strip()) for t, token in enumerate(tokens)]


def test_kept_and_rejected_drafts_are_marked_as_the_trace_has_them(shown, finished):
    (page,) = shown["pages"]
    rounds = json.loads((finished / "out" / "sd" / "test-0000-q0.json").read_text())["rounds"]
    decoded = page.split("</p>")[0]
    assert decoded.count("background") == sum(sum(r["kept"]) for r in rounds)
    assert decoded.count("line-through") == sum(len(r["kept"]) - sum(r["kept"]) for r in rounds) > 0
