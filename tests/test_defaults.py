"""A default of a function that has a flag's name is the flag's default: one setting has one default, wherever it is asked for."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from feature_alignment.cli.config import Common
from feature_alignment.decoding.settings import DecodingConfig

PACKAGE = ROOT / "feature_alignment"
FIELDS = [*dataclasses.fields(Common), *dataclasses.fields(DecodingConfig)]
FLAGS = {f.name: f.default for f in FIELDS if f.default not in (None, dataclasses.MISSING)}
del FLAGS["dtype"]  # functions take a torch.dtype
FLAGS |= {"rank": 0, "row": 0, "position": 0, "before": 0}  # counted from 0 everywhere
FLAGS |= {"has_confidence": True, "confidence_floor": 0.0}  # nothing is cut off unless asked for
MODULES = sorted(str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def functions_of(path: Path) -> Iterator[tuple[str, inspect.Signature]]:
    """Name and signature of the functions and methods that a module defines: each `def` is run again, without decorators and body."""
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    tree = ast.parse(path.read_text())
    for node in [*tree.body, *(part for of_class in tree.body if isinstance(of_class, ast.ClassDef) for part in of_class.body)]:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns, node.body = [], None, [ast.copy_location(ast.Pass(), node)]
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            exec(compile(ast.Module([node], []), str(path), "exec"), space := dict(vars(module)))
            yield node.name, inspect.signature(space[node.name])


@pytest.mark.parametrize("module", MODULES)
def test_defaults_of_functions_are_those_of_the_flags(module):
    wrong = []
    for function, signature in functions_of(ROOT / module):
        for parameter in signature.parameters.values():
            name, default = parameter.name, parameter.default
            if name in FLAGS and default not in (None, parameter.empty, FLAGS[name]):
                wrong.append(f"{function}({name}={default!r}), flag: {FLAGS[name]!r}")
    assert not wrong
