"""Networks are known by what they are: two that differ in anything have two identities."""

from __future__ import annotations

import cmath
import copy
import functools
import itertools
import math
import os
import random
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zpatch.networks.model_files import load_model
from zpatch.networks.model_identity import identity

JIT_IS_DEPRECATED = "ignore:`torch.jit:DeprecationWarning"


def network(**state: Any) -> torch.nn.Module:
    """A small network, the same at each call."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2), torch.nn.ReLU())
    model.load_state_dict({**model.state_dict(), **state})
    return model


def defined(code: str, name: str = "model") -> Any:
    """What some source code defines, as if it stood in one file each time."""
    scope: dict[str, Any] = {"__name__": "a_users_module", "torch": torch, "np": np}
    exec(code, scope)
    return scope[name]


def with_bound(value: Any) -> Callable[[Any], Any]:
    return lambda batch: (batch, value)


def with_default(value: Any) -> Callable[[Any], Any]:
    def model(batch: Any, other: Any = value, *, third: Any = value) -> Any:
        return batch, other, third

    return model


class Scaled(torch.nn.Module):
    """Has what is no parameter, and no part of its printed structure."""

    def __init__(self, scale: float = 1, offset: float = 0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("offset", torch.tensor(float(offset)), persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * self.scale + self.offset


class Weighted:
    """An object that can be called."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def __call__(self, batch: Any) -> Any:
        return batch * self.weight

    def method(self, batch: Any) -> Any:
        return batch + self.weight


class Holder:
    """An object that cannot be called."""

    def __init__(self, held: Any = None) -> None:
        self.held = held


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Unpicklable(Holder):
    def __getstate__(self) -> Any:
        raise TypeError("not this one")


@dataclass
class Config:
    threshold: float


def module_with(**settings: Any) -> torch.nn.Module:
    module = torch.nn.Identity()
    vars(module).update(settings)
    return module


def transformer(activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(8, 2, activation=activation)


def in_order(*names: str) -> torch.nn.Module:
    layers = {"a": torch.nn.ReLU(), "b": torch.nn.Tanh()}
    return torch.nn.Sequential(OrderedDict((name, layers[name]) for name in names))


FORWARD = """
class model(torch.nn.Module):
    def forward(self, batch):
        return {}
model = model()
"""

CALLED = """
class model:
    def __call__(self, batch):
        return {}
model = model()
"""


def exported() -> Any:
    return torch.export.export(network().eval(), (torch.ones(1, 1, 4, 6, 8),))


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "a weight": (network(), network(**{"0.bias": torch.tensor([0.0, 1e-7])})),
    "a buffer": (network(), network(**{"1.running_mean": torch.tensor([0.0, 1e-7])})),
    "an activation": (network(), network()[:2].append(torch.nn.GELU())),
    "a stride": (torch.nn.Conv3d(1, 1, 1, bias=False), torch.nn.Conv3d(1, 1, 1, stride=2, bias=False)),
    "the type of weights": (network(), network().half()),
    "an integer in the code": (defined("model = lambda b: b + 1"), defined("model = lambda b: b + 2")),
    "a float in the code": (defined("model = lambda b: b * 0.5"), defined("model = lambda b: b * 0.25")),
    "a text in the code": (defined("model = lambda b: b['x']"), defined("model = lambda b: b['y']")),
    "a tuple in the code": (
        defined("model = lambda b: b.flip((2, 3))"),
        defined("model = lambda b: b.flip((2, 4))"),
    ),
    "a sign in the code": (defined("model = lambda b: b + 1"), defined("model = lambda b: b - 1")),
    "what is called": (defined("model = lambda b: torch.sin(b)"), defined("model = lambda b: torch.cos(b)")),
    "a function inside": (
        defined("def model(b):\n def inner(v): return v + 1\n return inner(b)"),
        defined("def model(b):\n def inner(v): return v + 2\n return inner(b)"),
    ),
    "the code of forward": (defined(FORWARD.format("batch + 1")), defined(FORWARD.format("batch + 2"))),
    "a bound number": (with_bound(1), with_bound(2)),
    "a bound tensor": (with_bound(torch.zeros(3)), with_bound(torch.ones(3))),
    "the shape of a bound tensor": (with_bound(torch.zeros(4)), with_bound(torch.zeros(2, 2))),
    "a bound array": (with_bound(np.zeros(3)), with_bound(np.ones(3))),
    "a bound network": (with_bound(network()), with_bound(network(**{"0.bias": torch.ones(2)}))),
    "a bound function": (
        with_bound(defined("model = lambda b: b + 1")),
        with_bound(defined("model = lambda b: b + 2")),
    ),
    "a bound dict": (with_bound({"a": 1, "b": 2}), with_bound({"b": 1, "a": 2})),
    "a bound type": (with_bound(torch.float32), with_bound(torch.float16)),
    "a bound class": (with_bound(torch.nn.ReLU), with_bound(torch.nn.GELU)),
    "a default": (with_default(1), with_default(2)),
    "an argument of partial": (functools.partial(torch.add, other=1), functools.partial(torch.add, other=2)),
    "where one argument ends": (functools.partial(max, 1, 23), functools.partial(max, 12, 3)),
    "where one list ends": (with_bound([[1], [2]]), with_bound([[1, 2]])),
    "one of torch's functions": (torch.sigmoid, torch.tanh),
    "a method of torch's": (torch.Tensor.sigmoid, torch.Tensor.tanh),
    "one of numpy's functions": (np.sin, np.cos),
    "the object of a method": (Weighted(1).method, Weighted(2).method),
    "the method of an object": (Weighted(1).method, Weighted(1).__call__),
    "a value of an object": (Weighted(1), Weighted(2)),
    "a plain attribute": (Scaled(scale=1), Scaled(scale=2)),
    "a buffer that is not stored": (Scaled(offset=1), Scaled(offset=2)),
    "a function it has": (module_with(act=torch.sigmoid), module_with(act=torch.tanh)),
    "a lambda it has": (module_with(act=lambda b: b + 1), module_with(act=lambda b: b + 2)),
    "a dict it has": (module_with(cfg={"t": 1}), module_with(cfg={"t": 2})),
    "a dict in a list it has": (module_with(cfg=[{"t": 1}]), module_with(cfg=[{"t": 2}])),
    "a type it has": (module_with(dtype=torch.float16), module_with(dtype=torch.float32)),
    "an underscore attribute": (module_with(_scale=1), module_with(_scale=2)),
    "nothing or something": (module_with(scale=None), module_with(scale=2)),
    "an activation that is not printed": (transformer(torch.tanh), transformer(torch.sigmoid)),
    "the order of layers": (in_order("a", "b"), in_order("b", "a")),
    "a layer that is run twice": (
        torch.nn.Sequential(relu := torch.nn.ReLU()),
        torch.nn.Sequential(relu, relu),
    ),
    "an object in an object": (Weighted(Holder(1)), Weighted(Holder(2))),
    "an object in slots": (Weighted(Slotted(1)), Weighted(Slotted(2))),
    "an object that cannot be pickled": (Weighted(Unpicklable(1)), Weighted(Unpicklable(2))),
    "an object in a module": (module_with(cfg=Holder(1)), module_with(cfg=Holder(2))),
    "a dataclass in an object": (Weighted(Config(1)), Weighted(Config(2))),
    "a number of numpy's": (Weighted(np.float32(1)), Weighted(np.float32(2))),
    "the type of a number of numpy's": (Weighted(np.float32(1)), Weighted(np.int16(1))),
    "a type of numpy's": (Weighted(np.dtype("f4")), Weighted(np.dtype("i2"))),
    "objects in an array": (with_bound(np.array([Holder(1)])), with_bound(np.array([Holder(2)]))),
    "a sparse tensor": (with_bound(torch.ones(2).to_sparse()), with_bound(torch.zeros(2).to_sparse())),
    "the code of an object": (defined(CALLED.format("batch + 1")), defined(CALLED.format("batch + 2"))),
    "the module of a function": (math.sin, cmath.sin),
    "a queue": (Weighted(deque([1, 2])), Weighted(deque([1, 3]))),
    "bytes": (with_bound(b"a"), with_bound(b"b")),
    "a set": (with_bound({1, "a", (2, 3)}), with_bound({1, "a", (2, 4)})),
    "a key": (with_bound({(1, 2): 0}), with_bound({(1, 3): 0})),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_networks_differ_in(what: str) -> None:
    one, other = DIFFERENT[what]
    assert identity(one) != identity(other)


SAME: dict[str, Callable[[], Any]] = {
    "a network": network,
    "a copy": lambda: copy.deepcopy(network()),
    "a network in training mode": lambda: network().train(),
    "a network in evaluation mode": lambda: network().eval(),
}


@pytest.mark.parametrize("what", SAME)
def test_a_network_made_again_is_the_same(what: str) -> None:
    assert identity(SAME[what]()) == identity(network())


def around(value: Any) -> Holder:
    """An object that holds itself, and a value."""
    holder = Holder()
    holder.held = [{"self": holder}, value, holder]
    return holder


def test_a_network_may_hold_itself() -> None:
    assert identity(module_with(cfg=around(1))) == identity(module_with(cfg=around(1)))
    assert identity(module_with(cfg=around(1))) != identity(module_with(cfg=around(2)))


def test_a_reference_of_a_network_to_itself_makes_a_difference() -> None:
    outer, inner = Holder(), Holder()
    outer.held = inner
    inner.held = inner
    of_inner = identity(with_bound(outer))
    inner.held = outer
    assert identity(with_bound(outer)) != of_inner


def test_values_may_be_nested_more_deeply_than_python_recurses() -> None:
    chain = first = Holder()
    for _ in range(5000):
        chain.held = chain = Holder()
    assert identity(with_bound(first)) == identity(with_bound(first))


def test_equal_values_are_the_same_whether_they_are_one_object_or_two() -> None:
    one, other = [torch.ones(3), Holder((1, 2))], [torch.ones(3), Holder((1, 2))]
    assert identity(with_bound([one, one])) == identity(with_bound([one, other]))


def test_equal_objects_in_arrays_are_the_same() -> None:
    one, other = (np.array([Holder(1), "a"], dtype=object) for _ in range(2))
    assert identity(with_bound(one)) == identity(with_bound(other))


@pytest.mark.parametrize("where", [torch.device("cpu"), torch.device("cuda", 1)])
def test_where_a_network_is_makes_no_difference(where: torch.device) -> None:
    assert identity(module_with(_device=where)) == identity(module_with(_device=torch.device("meta")))


def test_what_a_module_leaves_out_when_it_is_pickled_makes_no_difference() -> None:
    class Forgetful(torch.nn.Identity):
        def __getstate__(self) -> Any:
            return {name: value for name, value in vars(self).items() if name != "trainer"}

    one, other = Forgetful(), Forgetful()
    other.trainer = "somebody"
    assert identity(one) == identity(other)


def test_a_module_that_refuses_to_be_pickled_is_known_all_the_same() -> None:
    class Refusing(Scaled):
        def __getstate__(self) -> Any:
            raise TypeError("not this one")

    assert identity(Refusing(scale=1)) == identity(Refusing(scale=1)) != identity(Refusing(scale=2))


def test_how_far_an_iterator_went_makes_no_difference() -> None:
    numbers = itertools.count()
    before = identity(Weighted(numbers))
    next(numbers)
    assert identity(Weighted(numbers)) == before


@pytest.mark.parametrize("source", [random.Random, np.random.RandomState, np.random.default_rng])
def test_chance_makes_no_difference(source: Callable[[], Any]) -> None:
    assert identity(Weighted(source())) == identity(Weighted(source()))


@pytest.mark.parametrize("make", [with_bound, with_default, Weighted, functools.partial(Scaled, 1)])
def test_a_function_made_again_with_equal_values_is_the_same(make: Callable[[Any], Any]) -> None:
    assert identity(make(0.5)) == identity(make(0.5))


def test_the_line_of_a_function_in_its_file_does_not_matter() -> None:
    code = "def model(b):\n    return [v + 1 for v in b]\n"
    assert identity(defined(code)) == identity(defined("# a comment\n\n" + code))


def test_the_order_of_equal_bound_dicts_does_not_matter() -> None:
    assert identity(with_bound({"a": 1, "b": 2})) == identity(with_bound({"b": 2, "a": 1}))


def test_a_function_that_is_bound_in_itself_has_an_identity() -> None:
    def countdown(n: int) -> Any:
        return countdown(n - 1) if n else 0

    assert identity(countdown) == identity(countdown)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.int64])
def test_tensors_of_any_type_have_an_identity(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    assert identity(with_bound(values)) == identity(with_bound(values.clone()))
    assert identity(with_bound(values)) != identity(with_bound(values.flip(0)))
    assert identity(with_bound(values.t())) == identity(with_bound(values.t().contiguous()))


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantized_weights_are_known_by_their_scale_too() -> None:
    one, same, other = (
        torch.quantize_per_tensor(torch.full((3,), scale), scale, 0, torch.qint8) for scale in (1.0, 1.0, 2.0)
    )
    assert torch.equal(one.int_repr(), other.int_repr())
    assert identity(with_bound(one)) == identity(with_bound(same)) != identity(with_bound(other))


def test_a_conjugated_tensor_is_known_by_its_values() -> None:
    values = torch.tensor([1 + 2j])
    assert identity(with_bound(values.conj())) == identity(with_bound(torch.tensor([1 - 2j])))


def test_another_process_finds_the_same_identity(tmp_path: Path) -> None:
    (tmp_path / "a_model.py").write_text(
        "import torch\n"
        "def make(scale):\n"
        "    torch.manual_seed(0)\n"
        "    network = torch.nn.Conv3d(1, 2, 3)\n"
        "    def model(batch):\n"
        "        inner = lambda b: b if b in {'x', 'y', 'z'} else (b, 1.5, None, torch.sin)\n"
        "        return {'a': network(batch) * scale, 'b': inner(batch)}\n"
        "    return model\n"
    )
    program = (
        "from a_model import make\n"
        "from zpatch.networks.model_identity import identity\n"
        "print(identity(make({})))"
    )

    def found(scale: float, seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", program.format(scale)]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    assert found(2.0, "1") == found(2.0, "2") != found(3.0, "1")


NETWORKS = """
import sys, warnings
from functools import partial
from pathlib import Path
from threading import Lock
import monai, torch
from zpatch.networks.model_identity import identity
warnings.simplefilter("ignore")
torch.manual_seed(0)
hash(Path("a"))  # which it keeps
networks = [
    monai.networks.nets.UNet(3, 1, 2, (4, 8), (2,)),
    monai.networks.nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12),
    torch.nn.TransformerEncoderLayer(8, 2, activation=torch.tanh),
    torch.nn.LSTM(2, 2),
    torch.compile(torch.nn.Conv3d(1, 1, 1)),
    torch.export.export(torch.nn.ReLU(), (torch.ones(1, 1, 4, 4, 4),)).module(),
    partial(id, {"a", "b", lambda b: b, torch.nn.ReLU, frozenset("xyz")}, {k: 1 for k in set("abc")}),
    partial(id, Lock(), object(), sys, {torch.sin: iter("a")}, Path("a")),
]
print(*map(identity, networks))
"""


def test_another_process_finds_the_same_identity_of_whatever_a_network_holds(full: bool) -> None:
    if not full:
        pytest.skip("networks of MONAI in other processes need --full")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", NETWORKS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in "12"
    ]
    one, other = (process.communicate()[0].split() for process in running)
    assert one == other
    assert len(set(one)) == 8


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_torchscript_is_known_by_what_it_has_and_by_all_its_methods() -> None:
    class Net(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def scaled(self, batch: torch.Tensor) -> torch.Tensor:
            return batch * self.scale

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.scaled(batch)

    class Other(Net):
        def scaled(self, batch: torch.Tensor) -> torch.Tensor:
            return batch + self.scale

    Other.__name__ = Other.__qualname__ = "Net"
    one, same, wider, other = map(torch.jit.script, (Net(1.0), Net(1.0), Net(2.0), Other(1.0)))
    assert identity(one) == identity(same)
    assert len({identity(one), identity(wider), identity(other)}) == 3


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_torchscript_is_known_by_its_code(tmp_path: Path) -> None:
    found = []
    for number, scale in enumerate((1.0, 1.0, 2.0)):

        class Net(torch.nn.Module):
            factor: torch.jit.Final[float]

            def __init__(self, factor: float) -> None:
                super().__init__()
                self.factor = factor

            def forward(self, batch: torch.Tensor) -> torch.Tensor:
                return batch * self.factor

        path = tmp_path / f"{number}.pt"
        torch.jit.save(torch.jit.trace(Net(scale), torch.ones(1, 1, 2, 2, 2)), path)
        found.append(identity(load_model(str(path))))
    assert found[0] == found[1] != found[2]


def test_an_exported_program_is_known_by_its_code(tmp_path: Path) -> None:
    found = []
    for number, scale in enumerate((1.0, 1.0, 2.0)):
        path = tmp_path / f"{number}.pt2"
        torch.export.save(torch.export.export(Scaled(scale), (torch.ones(1, 1, 2, 2, 2),)), path)
        found.append(identity(load_model(str(path))))
    assert found[0] == found[1] != found[2]


def test_the_module_of_a_program_is_known_by_its_parameters_and_structure() -> None:
    one, same = (identity(exported().module()) for _ in range(2))
    changed = exported().module()
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    longer = torch.nn.Sequential(network().eval(), torch.nn.Tanh())
    other = torch.export.export(longer, (torch.ones(1, 1, 4, 6, 8),)).module()
    assert one == same
    assert len({one, identity(changed), identity(other)}) == 3
