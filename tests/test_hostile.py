"""Files of somebody who means harm: nothing in them runs, nothing crashes, memory stays bounded, and each gets its message.

Every file is opened in a process of its own, which tells how it ended and how much memory it touched.
"""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import os
import pickle
import struct
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fork
from PIL import Image

from feature_alignment.adapters.chained import load_chained_adapter
from feature_alignment.adapters.hidden import HiddenAdapter, load_adapter
from feature_alignment.cli.config import Common, parse_config
from feature_alignment.cli.console import UserError
from feature_alignment.inputs.events import load_events
from feature_alignment.inputs.samples import read_samples
from feature_alignment.inputs.video import read_frames
from feature_alignment.models import pair
from feature_alignment.storage.answers import read_token_pairs
from feature_alignment.storage.files import load_pt, read_json

CANARY = "hacked"  # every payload would make a file of this name
MEMORY = 192 << 20  # bytes that opening a refused file may touch


def opened(open_it, folder: Path) -> tuple[str, int]:
    """The refusal's message and the memory it took; fails for anything but a refusal, a crash included."""
    reads, writes = os.pipe()
    pid = fork()
    if pid == 0:
        outcome = {"error": "died"}
        try:
            os.chdir(folder)
            before = memory("VmRSS")
            try:
                open_it()
                outcome = {"error": "it was accepted"}
            except UserError as error:
                outcome = {"message": str(error)}
            except BaseException as error:
                outcome = {"error": f"{type(error).__name__}: {error}"[:500]}
            outcome["memory"] = memory("VmHWM") - before
        finally:
            os.write(writes, json.dumps(outcome).encode()[:60_000])
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as stream:
        told = stream.read()
    status = os.waitpid(pid, 0)[1]
    assert status == 0 and told, f"crashed: {status}"
    outcome = json.loads(told)
    assert "error" not in outcome, outcome["error"]
    return outcome["message"], outcome["memory"]


def memory(line: str) -> int:
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) << 10


def refuses(open_it, folder: Path, message: str) -> None:
    said, touched = opened(open_it, folder)
    assert message in said and len(said) < 2500
    assert touched < MEMORY, f"{touched >> 20} MiB"
    assert not [p for p in (*folder.rglob(CANARY), Path.cwd() / CANARY) if p.exists()]


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


# ---- pickles, opcode by opcode

DEEP = b"}" + b")" + b"\x85" * 10**6 + b"K\x01s."  # {((((…),),),): 1}: Python's hash recurses until the stack ends
EVAL = b"cbuiltins\neval\nX" + struct.pack("<I", 25) + f"open('{CANARY}', 'w').close()"[:25].encode().ljust(25) + b"\x85R."


def doubling(times: int = 44) -> bytes:
    """encode(encode(…'ab', 'hex'), 'hex'): 44 times takes 32 TiB."""
    call = b"X\x03\x00\x00\x00hex\x86R"
    return b"c_codecs\nencode\nq\x00" + b"h\x00" * (times - 1) + b"C\x02ab" + call * times + b"."


def pickled_npy(data: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    return stream.getvalue() + data


def plain_npy(shape: str, rest: bytes = b"", descr: str = "[('x', '<i8'), ('y', '<i8'), ('t', '<i8'), ('p', '<i8')]") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + rest


def columns(**changed) -> dict:
    return {k: np.arange(9) for k in "xyt"} | {"p": np.zeros(9, np.uint8)} | changed


def lists_of_lists(levels: int = 12) -> list:
    """Ten to the twelfth numbers, in a few hundred bytes of references."""
    inner = [1] * 10
    for _ in range(levels):
        inner = [inner] * 10
    return inner


def huge_view() -> bytes:
    """ndarray((10**11,), 'u1', buffer, 0, (0,)): one byte, shown a hundred thousand million times."""
    return b"cnumpy\nndarray\n(\x8a\x05" + (10**11).to_bytes(5, "little") + b"\x85X\x02\x00\x00\x00u1C\x01aK\x00K\x00\x85tR."


NPY = {
    "a pickle that calls system": (pickled_npy(pickle.dumps(Payload())), "system"),
    "a column that calls system": (pickled_npy(pickle.dumps(columns(x=Payload()))), "system"),
    "a call inside a list": (pickled_npy(pickle.dumps(columns(x=[Payload()]))), "system"),
    "eval by its name": (pickled_npy(EVAL), "builtins.eval"),
    "NumPy's own way to run text": (pickled_npy(b"cnumpy.testing\nrunstring\n(X\x01\x00\x00\x00a}tR."), "numpy.testing"),
    "a name inside a name": (pickled_npy(b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__doc__\x93."), "ndarray.__doc__"),
    "an encoding that doubles": (pickled_npy(doubling()), "encoding 'hex'"),
    "a key a million tuples deep": (pickled_npy(DEEP), "steps to build"),
    "a view of one byte": (pickled_npy(huge_view()), "not callable"),
    "a list of lists of lists": (pickled_npy(pickle.dumps(columns(x=lists_of_lists()))), "x is a list"),
    "a type of a thousand million": (pickled_npy(b"cnumpy\ndtype\nX\x0e\x00\x00\x00(1000000000,)f\x85R."), "numpy.dtype"),
    "bytes that are not there": (pickled_npy(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc."), "cut off"),
    "an integer of a million digits": (pickled_npy(pickle.dumps(columns(x=[1 << 3_000_000] * 9))), "numbers"),
    "other objects in an array": (pickled_npy(pickle.dumps(columns(x=np.array([{}] * 9, dtype=object)))), "must be numbers"),
    "a shape of 10^12": (plain_npy("(1000000000000,)"), "describes"),
    "a shape below zero": (plain_npy("(-1,)"), "describes"),
    "a field of 10^10 numbers": (
        plain_npy("(1,)", descr="[('x', '<i8', (10000000000,)), ('y', 'u1'), ('t', 'u1'), ('p', 'u1')]"),
        "could not",
    ),
    "a header that computes": (plain_npy("(9**9**9,)"), "could not be read"),
    "a header of brackets": (plain_npy("(" * 9000 + ")" * 9000), "could not be read"),
    "an unknown version": (b"\x93NUMPY\x09\x09" + bytes(100), "could not be read"),
}


@pytest.mark.parametrize("name", NPY)
def test_npy(tmp_path, name):
    data, message = NPY[name]
    (tmp_path / "e.npy").write_bytes(data)
    refuses(lambda: load_events(tmp_path / "e.npy"), tmp_path, message)


def test_a_pickle_cannot_change_numpy_for_others(tmp_path):
    """Without a copy, setting a type's byte order would turn around every later array of it."""
    data = b"cnumpy\ndtype\nX\x02\x00\x00\x00i8\x89\x89\x87R(K\x03X\x01\x00\x00\x00>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."
    (tmp_path / "e.npy").write_bytes(pickled_npy(data))
    refuses(lambda: load_events(tmp_path / "e.npy"), tmp_path, "wanted a dict")
    with pytest.raises(UserError):
        load_events(tmp_path / "e.npy")
    assert np.dtype("i8").byteorder == "=" and np.array([1]).tobytes()[0] == (sys.byteorder == "little")


# ---- zip


def npz(path: Path, data: bytes, **changed: int) -> None:
    """An `.npz` of one member whose headers, both of them, are changed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("event_data.npy", data)
    raw = bytearray(path.read_bytes())
    central = raw.index(b"PK\x01\x02")
    places = {"flags": (6, 8, "<H"), "method": (8, 10, "<H"), "crc": (14, 16, "<I"), "size": (22, 24, "<I")}
    for key, value in changed.items():
        local, listed, form = places[key]
        struct.pack_into(form, raw, local, value)
        struct.pack_into(form, raw, central + listed, value)
    path.write_bytes(raw)


NPZ = {
    "four gigabytes by its own word": (plain_npy("(9,)", bytes(288)), {"size": 0xFFFFFF00}, "unpacked it takes 4,294,967,040"),
    "a shape its member does not hold": (plain_npy("(1000000000000,)", bytes(64)), {}, "describes"),
    "a pickle inside": (pickled_npy(pickle.dumps(Payload())), {}, "Python objects"),
    "locked with a password": (plain_npy("(9,)", bytes(288)), {"flags": 1}, "could not be read"),
    "packed in an unknown way": (plain_npy("(9,)", bytes(288)), {"method": 77}, "could not be read"),
    "a wrong checksum": (plain_npy("(9,)", bytes(288)), {"crc": 1}, "could not be read"),
}


@pytest.mark.parametrize("name", NPZ)
def test_npz(tmp_path, name):
    data, changed, message = NPZ[name]
    npz(tmp_path / "e.npz", data, **changed)
    refuses(lambda: load_events(tmp_path / "e.npz"), tmp_path, message)


# ---- HDF5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a link into another file", "not a group of this file"),
        ("a column linked into another file", "not a dataset of this file"),
        ("a column stored in another file", "stored in another file"),
        ("a view of other files", "stored in another file"),
        ("10^12 rows that were never written", "at most"),
        ("a piece of a gigabyte", "has chunks of"),
        ("texts instead of numbers", "wanted numbers"),
        ("a link to itself", "could not be read"),
    ],
)
def test_h5(tmp_path, name, message):
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 4)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        for key in "xytp":
            other[f"events/{key}"] = np.arange(9)
    with h5py.File(tmp_path / "e.h5", "w") as file:
        if name == "a link into another file":
            file["events"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "events")
        elif name == "a link to itself":
            file["events"] = h5py.SoftLink("/events")
        else:
            events = file.create_group("events")
            for key in "xytp":
                if name == "a column linked into another file" and key == "x":
                    events[key] = h5py.ExternalLink(str(tmp_path / "other.h5"), "events/x")
                elif name == "a column stored in another file" and key == "x":
                    events.create_dataset(key, (9,), np.int64, external=[(str(tmp_path / "secret"), 0, 72)])
                elif name == "a view of other files" and key == "x":
                    layout = h5py.VirtualLayout((9,), np.int64)
                    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "events/x", shape=(9,))
                    events.create_virtual_dataset(key, layout)
                elif name == "10^12 rows that were never written":
                    events.create_dataset(key, (10**12,), np.int64, chunks=(4096,))
                elif name == "a piece of a gigabyte":
                    events.create_dataset(key, (1 << 27,), np.int64, chunks=(1 << 27,), compression="gzip")
                elif name == "texts instead of numbers" and key == "t":
                    events.create_dataset(key, data=["a"] * 9)
                else:
                    events[key] = np.arange(9)
    refuses(lambda: load_events(tmp_path / "e.h5", 50), tmp_path, message)


# ---- recordings and videos


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"% evt 3.0\n% geometry " + b"9" * 10**5 + b"x480\n% end\n" + bytes(64), "holds 0 events"),
        (
            b"% Version 2\n% Width 65535\n% Height 65535\n\x0c\x08" + struct.pack("<II", 1, 16000 | 16000 << 14) * 9,
            "outside a sensor of 4096",
        ),
        (b"%\n" * 10**6, "names no format"),
        (b"#!AER-DAT4.0\r\n" + b"\xff" * 4096, "aedat"),
    ],
    ids=["a width of 100,000 digits", "pixels 16,000 apart", "a million lines of header", "lengths beyond the file"],
)
def test_recordings(tmp_path, data, message):
    (tmp_path / "e.raw").write_bytes(data)
    refuses(lambda: load_events(tmp_path / "e.raw"), tmp_path, message)


class Counting(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {secret}\nduration 1\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["a playlist of addresses", "a playlist of files", "a list of files", "a stream to listen to"],
)
def test_a_video_names_no_other_file_or_address(tmp_path, text):
    server = http.server.HTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_gif(tmp_path / "secret.gif")
    text = text.format(address=f"http://127.0.0.1:{server.server_port}/a.ts", secret=tmp_path / "secret.gif")
    (tmp_path / "v.mp4").write_text(text)
    Counting.asked.clear()
    refuses(lambda: read_frames(tmp_path / "v.mp4"), tmp_path, "could not be decoded")
    server.shutdown()
    assert not Counting.asked


def write_gif(path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), (30 * i, 0, 0)) for i in range(8)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)


@pytest.mark.parametrize(("side", "message"), [(7_000, "at most 33,554,432 pixels"), (65_535, "could not be decoded")])
def test_a_gif_of_many_pixels_a_side(tmp_path, side, message):
    write_gif(tmp_path / "v.gif")
    raw = bytearray((tmp_path / "v.gif").read_bytes())
    struct.pack_into("<HH", raw, 6, side, side)
    (tmp_path / "v.gif").write_bytes(raw)
    refuses(lambda: read_frames(tmp_path / "v.gif"), tmp_path, message)


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    raw = bytearray(stream.getvalue())
    struct.pack_into(">II", raw, 16, width, height)
    struct.pack_into(">I", raw, 29, zlib.crc32(raw[12:29]))
    return bytes(raw)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch hacked) run\nshowpage\n", "could not be read as an image"),
        (png(60_000, 60_000), "0.png"),
        (png(9_000, 9_000), "at most 33,554,432 pixels"),
        (b"not an image", "could not be read as an image"),
    ],
    ids=["a program for Ghostscript", "3.6 thousand million pixels", "81 million pixels", "no image"],
)
def test_images(tmp_path, data, message):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(data)
    refuses(lambda: read_frames(tmp_path / "frames"), tmp_path, message)


def test_an_image_in_a_zip_that_is_large_by_its_own_word(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png(64, 64) + bytes(1 << 28))
    refuses(lambda: read_frames(tmp_path / "v.zip"), tmp_path, "takes 268,435,")


def test_a_page_of_many_pixels(tmp_path):
    pages = [Image.new("1", (8, 8)), Image.new("1", (9_000, 9_000))]
    pages[0].save(tmp_path / "v.tif", save_all=True, append_images=pages[1:], compression="group4")
    refuses(lambda: read_frames(tmp_path / "v.tif"), tmp_path, "at most 33,554,432 pixels")


# ---- .pt


def adapter_file(path: Path, change=lambda saved: None) -> Path:
    adapter = HiddenAdapter(8, 8, 4)
    saved = {"meta": {"geometry": adapter.geometry, "draft_layers": [3]}, "state_dict": dict(adapter.state_dict())}
    change(saved)
    torch.save(saved, path)
    return path


def repacked(path: Path, program: bytes | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """The same `.pt` with another pickle, or packed."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, program if program is not None and name.endswith("data.pkl") else data)
    return path


def legacy(path: Path) -> Path:
    torch.save({"a": Payload()}, path, _use_new_zipfile_serialization=False)
    return path


def script(path: Path) -> Path:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    return path


def set_geometry(**changed):
    return lambda saved: saved["meta"]["geometry"].update(changed)


PT = {
    "a call inside": (lambda p: adapter_file(p, lambda s: s.update(extra=Payload())), "posix system"),
    "a call inside the old format": (legacy, "no zip"),
    "a compiled program": (script, "data.pkl"),
    "eval by its name": (lambda p: repacked(adapter_file(p), b"\x80\x02" + EVAL), "builtins eval"),
    "an encoding that doubles": (lambda p: repacked(adapter_file(p), b"\x80\x02" + doubling()), "_codecs encode"),
    "a key a million tuples deep": (lambda p: repacked(adapter_file(p), b"\x80\x02" + DEEP), "steps to build"),
    "a packed pickle": (lambda p: repacked(adapter_file(p), bytes(1 << 28), zipfile.ZIP_DEFLATED), "packed"),
    "a tensor of one number": (
        lambda p: adapter_file(p, lambda s: s["state_dict"].update({"up.bias": torch.zeros(1).expand(10**11)})),
        "shows more than the file holds",
    ),
    "weights that are not finite": (lambda p: adapter_file(p, lambda s: s["state_dict"]["up.bias"].fill_(np.nan)), "not finite"),
    "a geometry of 4 TB": (lambda p: adapter_file(p, set_geometry(d_draft=10**12)), "do not fit its geometry"),
    "a geometry of text": (lambda p: adapter_file(p, set_geometry(bottleneck="4")), "is damaged"),
    "a geometry of other names": (lambda p: adapter_file(p, set_geometry(evil=1)), "is damaged"),
    "layers that are none": (lambda p: adapter_file(p, lambda s: s["meta"].update(draft_layers="all")), "draft_layers"),
}


@pytest.mark.parametrize("name", PT)
def test_pt(tmp_path, name):
    make, message = PT[name]
    path = make(tmp_path / "adapter.pt")
    refuses(lambda: load_adapter(path), tmp_path, message)
    refuses(lambda: load_chained_adapter(path), tmp_path, "chained adapter" if "geometry" in name or "are" in name else message)


def test_a_tensor_alone_is_no_adapter(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "a.pt")
    refuses(lambda: load_adapter(tmp_path / "a.pt"), tmp_path, "is not a hidden adapter")
    assert load_pt(tmp_path / "a.pt", "").shape == (3,)


# ---- JSON and YAML


def manifest(folder: Path, **changed) -> dict[str, Path]:
    row = {"id": "a", "sequence": "a", "events": "e.npy", "video": "v.mp4", "question": "What?"} | changed
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "test.jsonl").write_text(json.dumps(row) + "\n")
    return {"test": folder / "data" / "test.jsonl"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"events": "../../etc/passwd"}, "--allow_outside"),
        ({"video": "/etc/passwd"}, "--allow_outside"),
        ({"events": "inner/../../out.npy"}, "--allow_outside"),
        ({"events": "link.npy"}, "--allow_outside"),
        ({"video": "linked/v.mp4"}, "--allow_outside"),
        ({"video": "circle"}, "--allow_outside"),
        ({"events": "a\0b"}, "--allow_outside"),
        ({"id": "../../../evil"}, "files are named after it"),
        ({"id": ".bashrc"}, "files are named after it"),
        ({"id": "x" * 300}, "files are named after it"),
        ({"id": {"a": 1}}, "wanted a text or a number"),
        ({"question": "<video> What?"}, "is a special token"),
        ({"question": "<event>"}, "is a special token"),
        ({"question": "What? \ud800"}, "no character"),
        ({"question": ["What?"]}, "wanted a text"),
        ({"question": "a" * 10**6}, "wanted a text of 1 to"),
        ({"event_start_ms": float("inf")}, "wanted 0 or more"),
        ({"event_start_ms": float("nan")}, "wanted 0 or more"),
        ({"facts": [1]}, "wanted a text as answer and an object"),
        ({"events": 5}, "line 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_manifests(tmp_path, changed, message):
    manifests = manifest(tmp_path, **changed)
    (tmp_path / "out.npy").touch()
    (tmp_path / "data" / "link.npy").symlink_to(tmp_path / "out.npy")
    (tmp_path / "data" / "linked").symlink_to(tmp_path)
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data" / "circle")
    refuses(lambda: read_samples(manifests, "test"), tmp_path, message)


def test_clips_elsewhere_are_read_where_that_is_said(tmp_path):
    manifests = manifest(tmp_path, events="../out.npy")
    with pytest.raises(UserError, match=r"data/\.\./out\.npy, which lies outside its folder .*/data\. If you trust"):
        read_samples(manifests, "test")
    assert read_samples(manifests, "test", allow_outside=True)[0].events == tmp_path / "data" / "../out.npy"
    (tmp_path / "way").symlink_to(tmp_path / "data")  # a manifest that is itself reached through a link
    inside = {"test": tmp_path / "way" / "test.jsonl"}
    manifest(tmp_path)
    assert read_samples(inside, "test")[0].id == "a"


def test_a_dsec_file_stays_in_its_folder(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A car."}]
    for name in ("/etc/passwd", "../../x/clip.npy", "..", "", "."):
        row = {"id": "1", "event_data": name, "mp4_data": "a/b.mp4", "conversations": turns}
        (tmp_path / "d.json").write_text(json.dumps([row]))
        refuses(lambda: read_samples({"test": tmp_path / "d.json"}, "test"), tmp_path, "d.json") if name not in ("", ".") else None


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, '{"results": [' + "[" * 10**5])
def test_json_without_an_end(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    refuses(lambda: read_json(tmp_path / "a.json", "make it"), tmp_path, "not valid JSON")
    refuses(lambda: read_samples({"test": tmp_path / "a.json"}, "test"), tmp_path, "a.json")
    refuses(lambda: parse_config(Common, ["--config", str(tmp_path / "a.json")], "x"), tmp_path, "a.json")


@pytest.mark.parametrize("tokens", [[10**30], [-1], [True], [1.5], "text", [[1]]])
def test_answers_that_are_no_ids(tmp_path, tokens):
    (tmp_path / "a.json").write_text(json.dumps({"results": [{"egpt_tokens": [1], "vl_tokens": tokens}]}))
    refuses(lambda: read_token_pairs(tmp_path / "a.json"), tmp_path, "list of token ids")


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "no aliases"),
        ("common: {seed: !!python/object/apply:os.system ['touch hacked']}", "seed"),
        ("common: !!python/object/new:subprocess.Popen [[touch, hacked]]", "must hold settings"),
        ("[" * 20_000, "10 levels"),
        ("a" * 2_000_000, "at most 100,000 characters"),
        ("common: {seed: .nan}", "seed"),
        ("common: {seed: 99999999999999999999999}", "seed"),
        ("common: {event_window_ms: .inf}", "finite"),
        ("common: {threads: 1000000}", "threads"),
        ("common: {seed: 1, seed: 2}", "`common.seed` is given in line 1 and again in line 1"),
        ("common: {seed: 1}\nhidden_adapter: {}\ncommon: {seed: 2}", "`common` is given in line 1 and again in line 3"),
        ("common: {manifests: {train: a, train: b}}", "`common.manifests.train` is given"),
        ("common: {seed: 1}\n---\ncommon: {seed: 2}", "not valid YAML"),
        ("common: {output_dir: }", "`common.output_dir` is empty"),
        ('common: {output_dir: "a\\0b"}', "output_dir"),
        ("common: {limit: 0}", "limit 0"),
    ],
    ids=lambda value: value[:30],
)
def test_yaml(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    refuses(lambda: parse_config(Common, ["--config", str(tmp_path / "a.yaml")], "hidden_adapter"), tmp_path, message)


# ---- checkpoints


@pytest.fixture
def copied(tiny_run, tmp_path) -> Common:
    import shutil

    shutil.copytree(tiny_run / "pair", tmp_path / "pair")
    return Common(target_id=tmp_path / "pair" / "video_llava", draft_id=tmp_path / "pair" / "eventgpt")


def edit(path: Path, **changed) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changed}))


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open('{CANARY}', 'w').close()\n")


def auto_map_in_the_config(folder):
    own_code(folder)
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})


def auto_map_in_the_tokenizer(folder):
    own_code(folder)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")


def auto_map_in_the_preprocessor(folder):
    own_code(folder)
    edit(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"})


def weights_elsewhere(folder):
    (folder / "model.safetensors").unlink()
    edit(folder / "model.safetensors.index.json", weight_map={"a": "../../../../etc/passwd"}, metadata={"total_size": 1})


def weights_that_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(10**5), "lm_head.weight": Payload()}, folder / "pytorch_model.bin")


def old_weights_that_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(10**5), "lm_head.weight": Payload()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def a_header_of_2_to_the_60(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])


def a_tokenizer_without_an_end(folder):
    (folder / "tokenizer.json").write_text('{"model":' * 10**5)


CHECKPOINTS = {
    auto_map_in_the_config: "code of its own",
    auto_map_in_the_tokenizer: "code of its own",
    auto_map_in_the_preprocessor: "code of its own",
    weights_elsewhere: "names weights outside its directory",
    weights_that_run: "could not be loaded",
    old_weights_that_run: "could not be loaded",
    a_header_of_2_to_the_60: "could not be loaded",
    a_tokenizer_without_an_end: "tokenizer could not be loaded",
    lambda folder: edit(folder / "config.json", attn_implementation="evil/kernel"): "attention code from another source",
    lambda folder: edit(folder / "adapter_config.json", base_model_name_or_path="/elsewhere"): "PEFT",
    lambda folder: edit(folder / "config.json", num_hidden_layers=10**9): "expected a number from 1 to 512",
    lambda folder: edit(folder / "config.json", hidden_size=1 << 16): "config.json describes",
    lambda folder: edit(folder / "config.json", vocab_size=1 << 22): "config.json describes",
    lambda folder: edit(folder / "config.json", vocab_size="1024"): "expected a number",
    lambda folder: edit(folder / "preprocessor_config.json", size={"shortest_edge": 10**6}): "expected a number from 1 to 4,096",
    lambda folder: edit(folder / "preprocessor_config.json", rescale_factor=float("nan")): "not finite",
    lambda folder: edit(folder / "preprocessor_config.json", resample=99): "gives no pixels",
    lambda folder: (folder / "config.json").write_text("[" * 10**5): "not valid JSON",
    lambda folder: (folder / "config.json").write_text("[]"): "could not be loaded",
}


@pytest.mark.parametrize(
    ("harm", "message"), CHECKPOINTS.items(), ids=[getattr(h, "__name__", "") + m[:24] for h, m in CHECKPOINTS.items()]
)
def test_checkpoints(copied, tmp_path, monkeypatch, harm, message):
    harm(copied.draft_id)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # whoever asks at the keyboard is told yes
    refuses(lambda: pair.load_draft(copied), tmp_path, message)
    if message == "code of its own":
        refuses(lambda: pair.check_pair(dataclasses.replace(copied)), tmp_path, message)
