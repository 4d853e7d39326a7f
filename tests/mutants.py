"""Mutants of Python source: one expression or statement replaced by a similar one that means something else.

What is only said (docstrings, log lines, messages of errors, types) is left alone.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
NAMES = {a: b for pair in ("min max", "any all", "argmin argmax", "floor ceil", "amin amax") for a, b in (pair.split(), pair.split()[::-1])}
IDENTITY = {"sorted", "reversed", "abs", "sqrt", "exp", "log", "strip", "lower", "cumprod", "clamp", "clip", "round"}
UNTESTED = {"debug", "info", "warning", "exception", "print", "progress", "tqdm", "set_description", "set_postfix"}
# Keywords that change how something looks or how long it may take, assert (`strict` of zip), or matter on a GPU alone.
NEUTRAL = {"strict", "device", "metadata", "help", "description", "epilog", "indent", "desc", "unit", "timeout"}
NEUTRAL |= {"dpi", "figsize", "layout", "fontsize", "alpha", "color", "colors", "ecolor", "marker", "markersize", "linewidth", "linestyle"}
NEUTRAL |= {"capsize", "loc", "bbox_to_anchor", "ncols", "va", "ha"}


@dataclass(frozen=True)
class Mutant:
    """`file` with the bytes from `start` to `end` replaced by `text`. A test that runs one of `lines` can notice it."""

    file: str
    line: int
    start: int
    end: int
    text: str
    lines: frozenset[int]

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def describe(self, source: bytes) -> str:
        first, last = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.end)
        tidy = lambda text: " ".join(text.decode().split())  # noqa: E731
        after = source[first : self.start] + self.text.encode() + source[self.end : last]
        return f"{self.file}:{self.line}\n  - {tidy(source[first:last])}\n  + {tidy(after)}"


def is_said(node: ast.AST) -> bool:
    """Words for people: docstrings, log lines, errors, types. Not what a test should hold."""
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return True
    if isinstance(node, ast.Expr):
        return is_said(node.value)
    if isinstance(node, ast.keyword):
        return node.arg in NEUTRAL
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in UNTESTED or name == "TypeVar" or name.endswith(("Error", "Warning"))
    return isinstance(node, ast.If) and ("TYPE_CHECKING" in ast.unparse(node.test) or "__name__" in ast.unparse(node.test))


def replacements(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """(what, by which text) for one node, its children left out."""
    put = lambda new: f"({ast.unparse(new)})"  # noqa: E731
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield node, put(ast.Compare(node.left, [*node.ops[:i], COMPARE[type(op)](), *node.ops[i + 1 :]], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        if not (isinstance(node.op, ast.Div) and any(isinstance(n, ast.JoinedStr | ast.Constant) for n in (node.right, node.left))):
            yield node, put(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield node, ast.unparse(ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value))
    elif isinstance(node, ast.BoolOp):
        yield node, put(ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values))
        for i in range(len(node.values)):
            yield node, put(ast.BoolOp(node.op, left) if len(left := node.values[:i] + node.values[i + 1 :]) > 1 else left[0])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node, put(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        by = not node.value if isinstance(node.value, bool) else node.value + 1 if isinstance(node.value, int) else node.value * 2 + 0.25
        yield node, repr(by)
    elif isinstance(node, ast.Slice):
        for end in ("lower", "upper"):
            if at := getattr(node, end):
                for new in (None, ast.BinOp(at, ast.Add(), ast.Constant(1))):
                    yield node, ast.unparse(ast.Slice(**{"lower": node.lower, "upper": node.upper, "step": node.step, end: new}))
    elif isinstance(node, ast.Call):
        yield from calls(node)
    yield from statements(node)


def calls(node: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    of = node.func.value if isinstance(node.func, ast.Attribute) else None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
    if name in NAMES:
        new = ast.Attribute(of, NAMES[name]) if of else ast.Name(NAMES[name])
        yield node.func, ast.unparse(new)
    if name in IDENTITY and (of is not None or node.args) and not (of is not None and ast.unparse(of) in ("torch", "np", "math")):
        yield node, f"({ast.unparse(of or node.args[0])})"
    if len(node.args) >= 2 and name not in NAMES and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        swapped = [node.args[1], node.args[0], *node.args[2:]]
        yield node, ast.unparse(ast.Call(node.func, swapped, node.keywords))
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None and not is_said(keyword):
            yield node, ast.unparse(ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :]))


def statements(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)):
        yield node, "pass"
    if isinstance(node, ast.Break | ast.Continue):
        yield node, "continue" if isinstance(node, ast.Break) else "break"
    if isinstance(node, ast.For | ast.While) and isinstance(node.body[-1], ast.Assign | ast.AugAssign | ast.Expr):
        yield node.body[-1], f"{ast.unparse(node.body[-1])}; break"
    if isinstance(node, ast.FunctionDef) and len(body := node.body[isinstance(node.body[0], ast.Expr) :]) > 1:
        yield body[0], "return"


def mutants(file: str, source: bytes) -> list[Mutant]:
    """Everything that could be a mutant of one file (see `is_mutant`), in the order of its lines."""
    offsets = [0]
    for row in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(row))
    tree, found = ast.parse(source), {}
    everything = frozenset(range(1, len(offsets)))

    def walk(node: ast.AST, lines: frozenset[int]) -> None:
        if is_said(node):
            return
        for what, text in replacements(node):
            start, end = (offsets[n - 1] + c for n, c in ((what.lineno, what.col_offset), (what.end_lineno, what.end_col_offset)))
            own = frozenset({what.lineno, *range(node.lineno, what.end_lineno + 1)}) if lines is None else lines
            found[start, end, text] = Mutant(file, what.lineno, start, end, text, own)
        inside = isinstance(node, ast.FunctionDef | ast.Lambda)
        for name, child in ast.iter_fields(node):
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST) and name not in ("annotation", "returns", "decorator_list", "type_params"):
                    body = frozenset(range(node.lineno, node.end_lineno + 1)) if inside and name == "args" else None
                    walk(one, body if inside else lines)

    walk(tree, everything)
    return sorted(found.values(), key=lambda m: (m.start, m.end, m.text))


def is_mutant(mutant: Mutant, source: bytes) -> bool:
    """Whether it compiles and is not the source itself, written in another way."""
    try:
        changed = mutant.apply(source)
        compile(changed, mutant.file, "exec", dont_inherit=True)  # refuses more than the parser: a `break` without a loop
        return ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    except (SyntaxError, ValueError):
        return False


def files_of(root: Path, package: str, modules: Sequence[str]) -> list[Path]:
    """The files that names stand for: a folder, a module (`decoding.engine`) or a path; all of them without a name."""
    found: set[Path] = set()
    for name in modules or [""]:
        path = (root / package).joinpath(*name.removesuffix(".py").removeprefix(f"{package}/").replace(".", "/").split("/"))
        new = {*path.rglob("*.py"), path.with_suffix(".py")}
        if not (new := {p for p in new if p.is_file()}):
            raise SystemExit(f"No module {name!r} in {root / package}.")
        found |= new
    return sorted(found)


def sample(root: Path, package: str, modules: Sequence[str], size: int, seed: int) -> list[Mutant]:
    """`size` mutants of the modules, at most one of a line."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for path in files_of(root, package, modules):
        for mutant in mutants(str(path.relative_to(root)), path.read_bytes()):
            lines.setdefault((mutant.file, mutant.line), []).append(mutant)
    rng, chosen = random.Random(seed), []
    order = sorted(lines)
    rng.shuffle(order)
    for key in order:
        if len(chosen) == size:
            break
        source = (root / key[0]).read_bytes()
        here = (m for m in rng.sample(lines[key], len(lines[key])) if is_mutant(m, source))
        chosen += [mutant for mutant, _ in zip(here, range(1), strict=False)]
    return sorted(chosen, key=lambda m: (m.file, m.start))
