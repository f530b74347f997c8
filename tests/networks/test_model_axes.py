"""Networks are fed contiguous batches in any order of x, y, z; volumes, places and outputs stay (I, J, K)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.errors import ModelError, OptionError, StoreExistsError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.networks.model_axes import MODEL_AXES, ModelAxes
from zpatch.networks.network import Network
from zpatch.planning.prediction_options import PredictOptions

CPU = torch.device("cpu")
HERE = PatchLocation((3, 4, 5), (4, 6, 8))
JIT_IS_DEPRECATED = "ignore:`torch.jit:DeprecationWarning"


def in_order(batch: np.ndarray[Any, Any], letters: str) -> np.ndarray[Any, Any]:
    """(B, C, I, J, K) as (B, C, *letters); an axis that is left out has one voxel."""
    return np.einsum(f"bcxyz->bc{letters}", batch)


def flat(letters: str, patch_size: Triple = (4, 6, 8)) -> tuple[int, ...]:
    """A patch size with one voxel along an axis that is left out."""
    return tuple(n if a in letters else 1 for a, n in zip("xyz", patch_size, strict=True))


@pytest.fixture
def volume(rng: np.random.Generator) -> zp.Subject:
    voxels = rng.uniform(-1, 1, (2, 20, 24, 28)).astype(np.float32)
    return zp.Subject(name="ann", t1=zp.ScalarImage(voxels))


def predict(subject: zp.Subject, out: Path, model: Any, **options: Any) -> np.ndarray[Any, Any]:
    """What a network gives for a subject, (C, I, J, K)."""
    given = {"image": "t1", "patch_size": 16, "patch_overlap": 4, "overlap_mode": "crop", **options}
    return np.asarray(zp.predict(model, [subject], out, **given)[0].prediction.data)


# The order


def test_any_order_of_two_or_three_axes_is_possible() -> None:
    assert len(MODEL_AXES) == 12
    assert {"xyz", "zyx", "yx", "xy", "yz"} < {*MODEL_AXES}


@pytest.mark.parametrize("letters", ["", "x", "xx", "xyy", "ijk", "czyx", "ZYX"])
def test_axes_that_mean_nothing_are_refused(letters: str) -> None:
    text = (
        r"^model_axes must have x, y and z in the order of the network's batches, as 'zyx', or two of them "
        rf"for a 2-D network, as 'yx'; not '{letters}'$"
    )
    with pytest.raises(OptionError, match=text):
        Network.of(ramps, PredictOptions.of(image="t1", patch_size=16, model_axes=letters))


@pytest.mark.parametrize(
    ("letters", "patch_size", "text"),
    [
        (
            "yx",
            (16, 16, 16),
            "leaves out z, along which patches have 16 voxels; .* there, as 16,16,1, or name",
        ),
        ("zy", (4, 16, 16), "leaves out x, along which patches have 4 voxels; .* there, as 1,16,16, or name"),
    ],
)
def test_patches_for_a_2d_network_are_flat(letters: str, patch_size: Triple, text: str) -> None:
    with pytest.raises(OptionError, match=text) as caught:
        Network.of(ramps, PredictOptions.of(image="t1", patch_size=patch_size, model_axes=letters))
    assert caught.value.option == "model_axes"


@pytest.mark.parametrize("letters", MODEL_AXES)
def test_a_batch_is_fed_in_the_order_of_the_letters_and_placed_back(
    letters: str, rng: np.random.Generator
) -> None:
    batch = torch.from_numpy(rng.uniform(-1, 1, (2, 3, *flat(letters))))
    axes = ModelAxes(letters)
    fed = axes.fed(batch)
    np.testing.assert_array_equal(fed, in_order(batch.numpy(), letters))
    assert fed.is_contiguous()
    assert torch.equal(axes.placed(fed), batch)


@pytest.mark.parametrize("letters", MODEL_AXES)
def test_the_memory_of_a_batch_is_fed_without_a_copy(letters: str) -> None:
    batch = ModelAxes(letters).new_batch(2, 3, flat(letters))  # type: ignore[arg-type]
    assert batch.shape == (2, 3, *flat(letters))
    assert ModelAxes(letters).fed(torch.from_numpy(batch)).data_ptr() == batch.ctypes.data


# The network


class Viewed(torch.nn.Module):
    """Adds to each voxel its place in the patch, by a ``view`` that needs contiguous input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        rows = batch.view(batch.shape[0], -1)
        return (rows + self.scale * torch.arange(rows.shape[1])).view(batch.shape)


def kinds(example: torch.Tensor) -> dict[str, Any]:
    net = Viewed().eval()
    return {
        "a module": net,
        "a function": lambda batch: net(batch),
        "TorchScript": torch.jit.script(net),
        "an exported program": torch.export.export(net, (example,)).module(),
    }


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("letters", ["xyz", "zyx", "yzx", "yx"])
@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_every_kind_of_network_is_fed_contiguous_batches(
    letters: str, tta: bool, rng: np.random.Generator
) -> None:
    stored = rng.uniform(-1, 1, (2, 1, *flat(letters)[::-1])).astype(np.float32)
    batch = torch.from_numpy(stored).permute(0, 1, 4, 3, 2)
    flips = [flip for n in range(4 if tta else 1) for flip in itertools.combinations((2, 3, 4), n)]
    axes, net = ModelAxes(letters), Viewed()
    alone = [axes.placed(net(axes.fed(batch.flip(flip)))).flip(flip).detach().numpy() for flip in flips]
    for kind, model in kinds(axes.fed(batch)).items():
        with (network := Network(model, CPU, tta=tta, axes=axes)).running():
            found = network(batch, "ann", [HERE, HERE])["prediction"]
        np.testing.assert_allclose(found, np.mean(alone, axis=0), rtol=1e-5, atol=1e-5, err_msg=kind)


@pytest.mark.parametrize("letters", ["zyx", "yx"])
def test_an_output_of_other_dimensions_is_refused(letters: str) -> None:
    network = Network(lambda batch: batch[..., None], CPU, axes=ModelAxes(letters))
    shape = (*(n for _, n in sorted(zip("xyz", (4, 6, 1), strict=True), reverse=True)),)
    text = rf"^subject 'ann': the model must give a tensor \(B, C, {', '.join(letters)}\) for a batch, not \("
    with pytest.raises(ModelError, match=text):
        network(torch.ones(1, 1, *shape[::-1]), "ann", [HERE])


def test_an_error_of_a_network_says_what_it_was_fed() -> None:
    network = Network(torch.nn.Conv3d(9, 1, 3), CPU, axes=ModelAxes("zyx"))
    with pytest.raises(ModelError, match=r"given \(2, 1, 8, 6, 4\) as \(B, C, z, y, x\): RuntimeError: "):
        network(torch.ones(2, 1, 4, 6, 8), "ann", [HERE, HERE])


@pytest.mark.parametrize(
    ("shape", "advice"), [((4, 6, 1), "yx"), ((1, 6, 8), "zy"), ((4, 6, 8), ""), ((1, 6, 1), "")]
)
def test_a_network_that_fails_on_flat_patches_may_be_two_dimensional(shape: Triple, advice: str) -> None:
    with pytest.raises(ModelError) as caught:
        Network(torch.nn.Conv2d(1, 1, 3), CPU)(torch.ones(1, 1, *shape), "ann", [HERE])
    ending = f"; for a 2-D network say model_axes={advice!r}"
    assert str(caught.value).endswith(ending) if advice else "model_axes" not in str(caught.value)


# The type


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
def test_a_network_is_fed_the_type_of_its_parameters(dtype: torch.dtype, tta: bool) -> None:
    net = torch.nn.Conv3d(1, 2, 3, padding=1).to(dtype)
    batch = torch.ones(1, 1, 4, 6, 8)
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with (network := Network(net, CPU, tta=tta)).running():
        found = network(batch, "ann", [HERE])["prediction"]
    assert {*seen} == {dtype}
    assert found.dtype == (torch.promote_types(dtype, torch.float32) if tta else dtype)
    plain = torch.nn.Conv3d(1, 2, 3, padding=1).to(dtype)
    exported = torch.export.export(plain, (batch.to(dtype),)).module()
    for model in (torch.jit.script(plain), exported):
        with (network := Network(model, CPU)).running():
            assert network(batch, "ann", [HERE])["prediction"].dtype == dtype


def test_a_network_without_parameters_is_fed_float32(volume: zp.Subject, tmp_path: Path) -> None:
    class Quantised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.add(batch.dtype)
            return batch

    seen: set[torch.dtype] = set()
    predict(volume, tmp_path / "module", Quantised())
    predict(volume, tmp_path / "function", lambda batch: seen.add(batch.dtype) or batch)
    assert seen == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_predicts(
    volume: zp.Subject, tmp_path: Path, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    net = torch.nn.Conv3d(2, 1, 1, bias=False).to(dtype)
    found = predict(volume, tmp_path / "out", net)
    assert found.dtype == np.float32
    with torch.inference_mode():
        wanted = net.float()(torch.from_numpy(volume.t1.data)[None])[0]
    np.testing.assert_allclose(found, wanted, atol=0.02)


# Predictions


def ramps(batch: torch.Tensor) -> torch.Tensor:
    """Depends on the last axis only: voxels in front of one."""
    return batch.cumsum(dim=-1)[:, :1]


@pytest.mark.parametrize("letters", ["xyz", "zyx", "yzx"])
def test_the_last_axis_of_a_network_is_the_last_letter(
    volume: zp.Subject, tmp_path: Path, letters: str
) -> None:
    found = predict(
        volume, tmp_path / "out", ramps, model_axes=letters, patch_size=(20, 24, 28), patch_overlap=0
    )
    axis = 1 + "xyz".index(letters[-1])
    np.testing.assert_allclose(found, volume.t1.data.cumsum(axis=axis)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("letters", "factors"), [("xyz", (4, 2, 1)), ("zyx", (1, 2, 4)), ("zxy", (2, 1, 4))])
def test_a_network_that_changes_the_resolution_does_so_along_its_own_axes(
    volume: zp.Subject, tmp_path: Path, letters: str, factors: Triple
) -> None:
    pool = torch.nn.AvgPool3d((4, 2, 1))
    found = predict(volume, tmp_path / "out", pool, model_axes=letters, patch_overlap=0)
    assert found.shape == (2, *(n // f for n, f in zip((20, 24, 28), factors, strict=True)))
    a, b, c = factors
    blocks = volume.t1.data.reshape(2, 20 // a, a, 24 // b, b, 28 // c, c).mean(axis=(2, 4, 6))
    np.testing.assert_allclose(found, blocks, atol=1e-5)


@pytest.mark.parametrize("letters", ["xy", "yx", "zx"])
def test_a_2d_network_is_run_plane_by_plane(volume: zp.Subject, tmp_path: Path, letters: str) -> None:
    size, overlap = flat(letters, (16, 16, 16)), tuple(n - 1 for n in flat(letters, (5, 5, 5)))
    net = torch.nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode="zeros")
    options: Any = {"patch_size": size, "patch_overlap": overlap, "model_axes": letters, "batch_size": 3}
    found = predict(volume, tmp_path / "out", net, **options)
    others = "xyz".translate({ord(a): None for a in letters})
    planes = np.einsum(f"cxyz->{others}c{letters}", volume.t1.data)
    with torch.inference_mode():
        wanted = np.einsum(f"{others}c{letters}->cxyz", net(torch.from_numpy(planes)).numpy())
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_prediction_with_other_axes_is_another_prediction(volume: zp.Subject, tmp_path: Path) -> None:
    predict(volume, tmp_path / "xyz", ramps, model_axes="xyz")
    predict(volume, tmp_path / "zyx", ramps, model_axes="zyx")
    for begun, other, shown in (
        ("xyz", "zyx", 'model_axes: null then, "zyx" now'),
        ("zyx", "xyz", 'model_axes: "zyx" then, null now'),
        ("zyx", "yzx", 'model_axes: "zyx" then, "yzx" now'),
    ):
        with pytest.raises(StoreExistsError, match=shown):
            predict(volume, tmp_path / begun, ramps, model_axes=other)


def test_the_default_axes_are_not_stored() -> None:
    assert Network(ramps, CPU).stored().keys() == {"model", "device", "amp", "tta"}
    assert Network(ramps, CPU, axes=ModelAxes("zyx")).stored()["model_axes"] == "zyx"
