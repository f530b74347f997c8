"""Networks are known by what they are, run in evaluation mode, and fail with subject and place."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zpatch.errors import ModelError, OptionError
from zpatch.geometry import PatchLocation
from zpatch.network import Network, identity, load_model, torch_device

CPU = torch.device("cpu")
HERE = PatchLocation((3, 4, 5), (4, 6, 8))
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


FORWARD = """
class model(torch.nn.Module):
    def forward(self, batch):
        return {}
model = model()
"""


# Identity

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


@pytest.mark.parametrize("make", [with_bound, with_default, Weighted, functools.partial(Scaled, 1)])
def test_a_function_made_again_with_equal_values_is_the_same(make: Callable[[Any], Any]) -> None:
    assert identity(make(0.5)) == identity(make(0.5))


def test_where_a_function_stands_in_its_file_does_not_matter() -> None:
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
    program = "from a_model import make; from zpatch.network import identity; print(identity(make({})))"

    def found(scale: float, seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", program.format(scale)]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    assert found(2.0, "1") == found(2.0, "2") != found(3.0, "1")


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


# Running


def test_a_tensor_is_called_prediction_and_a_dict_keeps_its_names() -> None:
    batch = torch.ones(1, 1, 4, 6, 8)
    assert list(Network(lambda b: b, CPU)(batch, "ann", [HERE])) == ["prediction"]
    found = Network(lambda b: {"a": b, 1: b + 1}, CPU)(batch, "ann", [HERE])
    assert torch.equal(found["a"], batch)
    assert torch.equal(found["1"], batch + 1)


@pytest.mark.parametrize("tta", [False, True])
def test_a_network_that_fails_names_subject_places_and_shape(tta: bool) -> None:
    def model(batch: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such luck")

    there = PatchLocation((9, 9, 9), (4, 6, 8))
    with pytest.raises(ModelError) as caught:
        Network(model, CPU, tta=tta)(torch.ones(2, 1, 4, 6, 8), "ann", [HERE, there])
    assert str(caught.value) == (
        "the model failed on subject 'ann', patches at (3, 4, 5), (9, 9, 9), given (2, 1, 4, 6, 8): "
        "ValueError: no such luck"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_network_runs_in_evaluation_and_inference_mode_and_gets_its_modes_back() -> None:
    model = network().train()
    model[1].eval()
    net = Network(model, CPU)
    with net.running():
        assert torch.is_inference_mode_enabled()
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    with pytest.raises(ModelError), net.running():
        net(torch.ones(1, 9, 4, 6, 8), "ann", [HERE])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not torch.is_inference_mode_enabled()


def test_a_network_can_be_trained_on_after_it_ran() -> None:
    model = network()
    net = Network(model, CPU)
    with net.running():
        net(torch.ones(1, 1, 4, 6, 8), "ann", [HERE])
    model(torch.ones(2, 1, 4, 6, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_network_that_was_moved_can_be_trained_on_too() -> None:
    class Moved(torch.nn.Identity):
        def to(self, *args: Any, **options: Any) -> Any:
            assert not torch.is_inference_mode_enabled()  # else its parameters would be bound to it
            return super().to(*args, **options)

    with Network(Moved(), CPU).running():
        pass


@pytest.mark.parametrize("amp", [False, True])
def test_amp_runs_a_network_in_autocast(amp: bool) -> None:
    net = Network(network(), CPU, amp=amp)
    with net.running():
        assert torch.is_autocast_enabled("cpu") is amp
        output = net(torch.ones(1, 1, 4, 6, 8), "ann", [HERE])["prediction"]
    assert output.dtype == (torch.bfloat16 if amp else torch.float32)


def test_a_network_is_the_same_on_another_device() -> None:
    net = Network(network(), CPU, amp=True, tta=True)
    assert net.on(torch.device("meta")) == Network(net.model, torch.device("meta"), amp=True, tta=True)


# Test-time augmentation


def off_centre(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Depends on where a voxel lies in the patch."""
    i, j, k = (torch.arange(1.0, n + 1) for n in batch.shape[2:])
    return {"a": batch * i[:, None, None] + j[:, None] * k, "b": batch.cumsum(dim=4)[:, :, ::2]}


@pytest.mark.parametrize("shape", [(4, 6, 8), (4, 6, 1), (1, 1, 1)])
def test_tta_is_the_mean_over_all_flips(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    batch = torch.from_numpy(rng.uniform(-1, 1, (2, 3, *shape)))
    flips = [flip for n in range(4) for flip in itertools.combinations((2, 3, 4), n)]
    found = Network(off_centre, CPU, tta=True)(batch, "ann", [HERE, HERE])
    for key, output in found.items():
        wanted = np.mean([off_centre(batch.flip(f))[key].flip(f).numpy() for f in flips], axis=0)
        np.testing.assert_allclose(output, wanted, rtol=1e-12)


@pytest.mark.parametrize(("shape", "times"), [((4, 6, 8), 8), ((4, 6, 1), 4), ((1, 6, 1), 2), ((1, 1, 1), 1)])
def test_tta_flips_no_axis_of_one_voxel(shape: tuple[int, int, int], times: int) -> None:
    seen = []
    Network(lambda b: seen.append(b) or b, CPU, tta=True)(torch.ones(1, 1, *shape), "ann", [HERE])
    assert len(seen) == times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tta_of_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    batch = torch.tensor([1.0, 30000.0]).reshape(1, 1, 2, 1, 1).expand(1, 1, 2, 3, 3).to(dtype)
    found = Network(lambda b: b, CPU, tta=True)(batch, "ann", [HERE])["prediction"]
    assert found.dtype == torch.float32
    assert torch.equal(found, batch.float())


def test_tta_of_integers_is_a_mean_too() -> None:
    def model(batch: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0, 1, 1, 1]).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)

    found = Network(model, CPU, tta=True)(torch.ones(1, 1, 4, 2, 2), "ann", [HERE])["prediction"]
    assert found[0, 0, :, 0, 0].tolist() == [0.5, 1, 1, 0.5]


# Devices and models by name


def test_a_device_that_does_not_exist_is_refused() -> None:
    assert torch_device("cpu") == CPU
    assert torch_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(OptionError, match=r"device must be auto, cpu, cuda, cuda:1 or .* not 'gpu'"):
        torch_device("gpu")


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, as a user's is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "a_users_networks", raising=False)
    (tmp_path / "a_users_networks.py").write_text(
        "import torch\n"
        "def good(): return torch.nn.Identity()\n"
        "def bad(): raise RuntimeError('no weights here')\n"
        "def none(): return 5\n"
    )
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    (tmp_path / "broken.pt2").write_bytes(b"not a model")
    return "a_users_networks"


def test_a_factory_in_the_current_folder_is_found(user_module: str) -> None:
    assert isinstance(load_model(f"{user_module}:good"), torch.nn.Identity)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("missing.pt", "model 'missing.pt' is no file; name one, or a factory as package.module:factory"),
        ("a_users_networks:bad", "cannot be loaded: RuntimeError: no weights here"),
        ("a_users_networks:other", "cannot be loaded: AttributeError: .*other"),
        ("a_users_networks:none", "model 'a_users_networks:none' gave int, which cannot be called"),
        ("no_such_module:make", "cannot be loaded: ModuleNotFoundError: .*no_such_module"),
        (":make", "cannot be loaded: ValueError"),
        ("broken.pt", "model 'broken.pt' cannot be loaded: RuntimeError"),
        ("broken.pt2", "model 'broken.pt2' cannot be loaded"),
    ],
)
@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_a_model_that_cannot_be_loaded_is_an_error_with_its_name(
    user_module: str, spec: str, text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        load_model(spec)
