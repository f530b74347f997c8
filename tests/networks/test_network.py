"""Networks run in evaluation mode, are sent to other processes, and fail with subject and place."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import forked
import numpy as np
import pytest
import torch
from test_model_identity import exported, network

from zpatch.errors import ModelError, OptionError
from zpatch.geometry.boxes import PatchLocation
from zpatch.networks.model_files import load_model
from zpatch.networks.model_identity import identity
from zpatch.networks.network import Network, torch_device

CPU = torch.device("cpu")
HERE = PatchLocation((3, 4, 5), (4, 6, 8))
JIT_IS_DEPRECATED = "ignore:`torch.jit:DeprecationWarning"


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_a_network_keeps_the_identity_it_was_made_with() -> None:
    def model(batch: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return batch

    calls: list[int] = []
    net = Network(model, CPU)
    made = net.identity
    assert made == identity(model)
    net(torch.ones(1, 1, 4, 6, 8), "ann", [HERE])
    assert made != identity(model)
    for kept in (net, net.on(torch.device("meta")), cloudpickle.loads(cloudpickle.dumps(net))):
        assert kept.identity == made
    with pytest.raises(TypeError, match="identity"):
        Network(model, CPU, identity="another")  # type: ignore[call-arg]


# Sending to other processes


def tripled(batch: torch.Tensor) -> torch.Tensor:
    return batch * 3


def traced_function() -> Any:
    offset = torch.arange(8.0)
    return torch.jit.trace(lambda batch: batch * 2 + offset, torch.ones(1, 1, 4, 6, 8))


def from_file(save: Callable[[Any, str], None], model: Any, name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save(model, str(Path(folder) / name))
        return load_model(str(Path(folder) / name))


SENT: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(network().eval()),
    "traced": lambda: torch.jit.trace(network().eval(), torch.ones(1, 1, 4, 6, 8)),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(network().eval())),
    "a script function": lambda: torch.jit.script(tripled),
    "a traced function": traced_function,
    "exported, from its file": lambda: from_file(torch.export.save, exported(), "net.pt2"),
    "scripted, from its file": lambda: from_file(torch.jit.save, SENT["scripted"](), "net.pt"),
    "frozen, from its file": lambda: from_file(torch.jit.save, SENT["frozen"](), "net.pt"),
    "a traced function, from its file": lambda: from_file(torch.jit.save, traced_function(), "net.pt"),
}


@pytest.mark.parametrize("kind", SENT)
@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_a_network_is_the_same_after_pickling(kind: str, rng: np.random.Generator) -> None:
    batch = torch.from_numpy(rng.uniform(-1, 1, (1, 1, 4, 6, 8)).astype(np.float32))
    net = Network(SENT[kind](), CPU, amp=False, tta=True)
    with net.running():
        wanted = net(batch, "ann", [HERE])["prediction"]
    back, again = cloudpickle.loads(cloudpickle.dumps([net, net]))
    assert back is again
    assert (back.device, back.amp, back.tta) == (CPU, False, True)
    assert back.identity == identity(back.model) == net.identity == identity(net.model)
    if isinstance(back.model, torch.nn.Module):
        assert back.model.eval() is back.model
    twice = cloudpickle.loads(cloudpickle.dumps(back))
    for found in (back, twice):
        with found.running():
            assert torch.equal(found(batch, "ann", [HERE])["prediction"], wanted)


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_another_process_loads_networks_and_finds_the_same_identities(tmp_path: Path) -> None:
    networks = [Network(make(), CPU) for make in SENT.values()]
    (tmp_path / "networks.pickle").write_bytes(cloudpickle.dumps(networks))
    program = (
        "import cloudpickle, pathlib, torch; from zpatch.networks.model_identity import identity\n"
        "for net in cloudpickle.loads(pathlib.Path('networks.pickle').read_bytes()):\n"
        "    with net.running(): net(torch.ones(1, 1, 4, 6, 8), 'ann', [])\n"
        "    print(net.identity, identity(net.model))"
    )
    found = subprocess.check_output([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, text=True)
    assert found.split() == [net.identity for net in networks for _ in range(2)]


# Running


def test_a_tensor_is_called_prediction_and_a_dict_keeps_its_names() -> None:
    batch = torch.ones(1, 1, 4, 6, 8)
    assert list(Network(lambda b: b, CPU)(batch, "ann", [HERE])) == ["prediction"]
    found = Network(lambda b: {"a": b, 1: b + 1}, CPU)(batch, "ann", [HERE])
    assert torch.equal(found["a"], batch)
    assert torch.equal(found["1"], batch + 1)


@pytest.mark.parametrize("tta", [False, True])
def test_two_outputs_of_one_name_are_refused(tta: bool) -> None:
    net = Network(lambda b: {0: b, "a": b, "0": b + 1}, CPU, tta=tta)
    with pytest.raises(
        ModelError, match=r"two outputs have the same name, in \[0, 'a', '0'\]; give each a different name"
    ):
        net(torch.ones(1, 1, 4, 6, 8), "ann", [HERE])


@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_frozen_torchscript_runs_though_it_has_no_mode(rng: np.random.Generator) -> None:
    batch = torch.from_numpy(rng.uniform(-1, 1, (1, 1, 4, 6, 8)).astype(np.float32))
    model = torch.jit.freeze(torch.jit.script(network().eval()))
    assert not hasattr(model, "training")
    for _ in range(2):
        with (net := Network(model, CPU)).running():
            found = net(batch, "ann", [HERE])["prediction"]
        torch.testing.assert_close(found, network().eval()(batch).detach())


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
    """Depends on the position of a voxel in the patch."""
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


def test_tta_does_not_modify_a_tensor_that_a_network_keeps() -> None:
    kept = torch.ones(1, 1, 4, 6, 8)
    Network(lambda b: kept, CPU, tta=True)(kept, "ann", [HERE])
    assert torch.equal(kept, torch.ones(1, 1, 4, 6, 8))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_tta_flips_outputs_of_any_extent(size: int, axis: int, rng: np.random.Generator) -> None:
    shape = [2, 1, 3, 3, 3]
    shape[axis] = size
    fixed = torch.from_numpy(rng.uniform(-1, 1, shape))
    flips = [flip for n in range(4) for flip in itertools.combinations((2, 3, 4), n)]
    found = Network(lambda b: fixed, CPU, tta=True)(torch.ones(2, 1, 4, 6, 8), "ann", [HERE, HERE])
    wanted = np.mean([fixed.flip(flip).numpy() for flip in flips], axis=0)
    np.testing.assert_allclose(found["prediction"], wanted, rtol=1e-12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read there")
def test_tta_holds_the_sum_and_a_quarter_beside_the_output() -> None:
    program = (
        "import re, torch; from pathlib import Path; from zpatch.networks.network import Network\n"
        "def peak():\n"
        "    return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "def run(*shape):\n"
        "    network = Network(lambda b: torch.ones(shape), torch.device('cpu'), tta=True)\n"
        "    network(torch.ones(1, 1, 2, 2, 2), 'ann', [])\n"
        "run(1, 1, 64, 64, 64); before = peak(); run(1, 2, 256, 128, 256)\n"
        "print((peak() - before) / (4 * 2 * 256 * 128 * 256))"
    )
    done = forked.run(program, malloc={forked.M_MMAP_THRESHOLD: 65536})  # so that what is freed is gone
    assert 2 <= float(done.stdout) <= 1 + 1.25  # beside the output


# Devices


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda", 99)])
def test_a_missing_device_is_refused_in_one_line(device: Any) -> None:
    with pytest.raises(OptionError) as caught:
        torch_device(device)
    assert str(caught.value).startswith("device 'cuda:99' cannot be used here (")
    assert str(caught.value).endswith("); choose another, or auto")


def test_the_error_of_a_device_has_the_first_line_of_torchs_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(size: int, device: torch.device) -> torch.Tensor:
        raise RuntimeError("invalid device ordinal\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr(torch, "empty", empty)
    text = r"^device 'cuda:7' cannot be used here \(invalid device ordinal\); choose another, or auto$"
    with pytest.raises(OptionError, match=text):
        torch_device("cuda:7")


def test_a_device_that_does_not_exist_is_refused() -> None:
    assert torch_device("cpu") == CPU
    assert torch_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(OptionError, match=r"device must be auto, cpu, cuda, cuda:1 or .* not 'gpu'"):
        torch_device("gpu")
