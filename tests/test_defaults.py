"""A default of a function that has a flag's name is the flag's default: one setting has one default, wherever it is asked for."""

from __future__ import annotations

import dataclasses
import inspect
import types
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


def functions_of(path: Path) -> list[types.FunctionType]:
    """The functions and methods that a module defines, made anew from its source."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    __import__(name)
    space = {"__name__": name, "__package__": name.rpartition(".")[0], "__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), space)
    own = [x for x in space.values() if getattr(x, "__module__", None) == name]
    methods = [m for x in own if inspect.isclass(x) for m in vars(x).values()]
    return [f for f in [*own, *methods] if isinstance(f, types.FunctionType) and inspect.unwrap(f).__code__.co_filename == str(path)]


@pytest.mark.parametrize("module", MODULES)
def test_defaults_of_functions_are_those_of_the_flags(module):
    wrong = []
    for function in functions_of(ROOT / module):
        for parameter in inspect.signature(function).parameters.values():
            name, default = parameter.name, parameter.default
            if name in FLAGS and default not in (None, parameter.empty, FLAGS[name]):
                wrong.append(f"{function.__qualname__}({name}={default!r}), flag: {FLAGS[name]!r}")
    assert not wrong
