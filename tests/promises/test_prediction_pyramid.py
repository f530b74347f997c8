"""Coarser levels of predictions, and what a prediction says of its network and its inputs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from ome_zarr_models.v05 import Image as OmeImage
from ome_zarr_models.v05.image_label import ImageLabel
from processes import local_cluster
from test_faults import assert_whole, contents
from test_prediction_faults import ARGUMENTS, Net, cohort, plans_of, predict, store

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import StoreError
from zpatch.prediction import shard_ledger
from zpatch.records.names import MANIFEST, UNFINISHED

pytestmark = pytest.mark.usefixtures("one_thread")
assert all((cohort, store))  # fixtures

HEADS: dict[str, Any] = {"reduce": {"seg": "argmax", "dist": None}, "pyramid": True}
LEVELS = [(160, 36, 40), (80, 18, 20), (40, 9, 10)]
LOST = "ann/seg/1/c/1/0/0"


def two_heads(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"seg": torch.cat([batch, 900 - batch, batch * 0 + 500], dim=1), "dist": batch * 0.5}


@pytest.fixture(scope="module")
def expected(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The contents of an undisturbed prediction."""
    folder = tmp_path_factory.mktemp("expected")
    predict(zp.Cohort(store), folder / "out.zarr", two_heads, **HEADS)
    found = contents(folder / "out.zarr")
    close_shards(folder)
    return found


def levels_in(folder: Path) -> list[NDArray[Any]]:
    """The levels of an image (z, y, x), as its OME metadata name them."""
    group: Any = zarr.open_group(folder, mode="r")
    [multiscale] = group.attrs["ome"]["multiscales"]
    return [np.asarray(group[dataset["path"]][:]) for dataset in multiscale["datasets"]]


def blocks(voxels: NDArray[Any]) -> NDArray[Any]:
    """The fine voxels (z, y, x, 8) of each coarse voxel; an odd last plane counts twice."""
    even = np.pad(voxels, [(0, n % 2) for n in voxels.shape], mode="edge")
    z, y, x = (n // 2 for n in even.shape)
    return even.reshape(z, 2, y, 2, x, 2).transpose(0, 2, 4, 1, 3, 5).reshape(z, y, x, 8)


def test_each_level_of_a_label_map_is_its_most_frequent_label_and_of_floats_the_mean(
    cohort: zp.Cohort, out: Path
) -> None:
    predict(cohort, out, two_heads, **HEADS)
    for name in ("seg", "dist"):
        levels = levels_in(out / "ann" / name)
        assert [level.shape for level in levels] == LEVELS
        np.testing.assert_array_equal(levels[0], zp.Cohort(out)["ann"][name].data[0].T)
        for fine, coarse in itertools.pairwise(levels):
            if name == "dist":
                np.testing.assert_allclose(coarse, blocks(fine).mean(axis=-1), rtol=1e-6)
            else:
                counts = (blocks(fine)[..., None] == np.arange(3)).sum(axis=-2)
                np.testing.assert_array_equal(coarse, counts.argmax(axis=-1))
    assert zp.verify(out).ok


def test_the_voxels_are_those_of_a_prediction_without_levels_which_is_the_default(
    cohort: zp.Cohort, out: Path, expected: dict[str, Any]
) -> None:
    predict(cohort, out, two_heads, **{**HEADS, "pyramid": None})
    plain = {key: value for key, value in contents(out).items() if "/c/" in key}
    assert {key: expected[key] for key in plain} == plain
    assert [key for key in expected if "/seg/1/" in key]
    assert not list(out.glob("*/*/1"))


def test_levels_and_labels_are_valid_ome_zarr_with_their_positions(cohort: zp.Cohort, out: Path) -> None:
    predict(cohort, out, two_heads, **HEADS)
    label = ImageLabel.from_zarr(zarr.open_group(out / "ann" / "seg", mode="r")).ome_attributes
    image = OmeImage.from_zarr(zarr.open_group(out / "ann" / "dist", mode="r")).ome_attributes
    assert label.image_label is not None
    assert label.image_label.version == "0.5"
    colours = {colour.label_value: colour.rgba for colour in label.image_label.colors or ()}
    assert colours.keys() == {0, 1, 2}
    assert len({repr(colour) for colour in colours.values()}) == 3
    assert "image-label" not in zarr.open_group(out / "ann" / "dist", mode="r").attrs["ome"]  # type: ignore[operator]
    for ome in (label, image):
        [multiscale] = ome.multiscales
        for dataset, factor in zip(multiscale.datasets, (1.0, 2.0, 4.0), strict=True):
            scale, translation = dataset.coordinateTransformations
            assert [*scale.scale] == [factor] * 3
            assert [*translation.translation] == [(factor - 1) / 2] * 3  # the affine is the identity


# Interrupted, damaged, added


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_a_failure_while_a_level_is_written_is_resumed_without_the_network(
    cohort: zp.Cohort, out: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    real, written = shard_ledger.halved_shard, list[Any]()

    def fail(*args: Any, **options: Any) -> Any:
        written.append(args)
        if len(written) > fail_at:
            raise OSError("no space left")
        return real(*args, **options)

    monkeypatch.setattr(shard_ledger, "halved_shard", fail)
    with pytest.raises((StoreError, OSError)):
        predict(cohort, out, two_heads, **HEADS)
    assert list((out / UNFINISHED / "ann").glob("*/.ledger/seg/*.json"))
    monkeypatch.setattr(shard_ledger, "halved_shard", real)
    predict(cohort, out, two_heads, **HEADS)
    assert_whole(out, expected)


@pytest.mark.parametrize("kill_at", [1, 6])
def test_a_process_killed_while_it_writes_a_level_is_finished_by_the_same_call(
    cohort: zp.Cohort, out: Path, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    real, written = shard_ledger.write_shard, list[Any]()

    def kill(array: Any, *args: Any) -> Any:
        written.extend([array] if len(array.shape) == 4 and array.shape[1] < LEVELS[0][0] else [])
        if len(written) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(array, *args)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(shard_ledger, "write_shard", kill)
        try:
            predict(cohort, out, two_heads, **HEADS)
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    predict(cohort, out, two_heads, **HEADS)
    assert_whole(out, expected)


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: os.truncate(file, 40)], ids=["lost", "cut"])
def test_a_damaged_shard_of_a_level_is_found_and_made_again_without_the_network(
    cohort: zp.Cohort, out: Path, harm: Any
) -> None:
    predict(cohort, out, Net(), pyramid=True)
    before, manifest = contents(out), (out / MANIFEST).read_bytes()
    lost = "ann/prediction/1/c/0/1/0/0"
    harm(out / lost)
    assert [damage.file for damage in zp.verify(out, quick=True).damages] == [lost]
    again = Net()
    predict(cohort, out, again, pyramid=True)
    assert again.patches == 1  # the first one, to see what the network gives
    assert_whole(out, before)
    assert (out / MANIFEST).read_bytes() == manifest


def test_changed_bytes_of_a_level_are_found_with_verify(
    cohort: zp.Cohort, out: Path, expected: dict[str, Any]
) -> None:
    predict(cohort, out, two_heads, **HEADS)
    data = bytearray((out / LOST).read_bytes())
    data[10] ^= 1
    (out / LOST).write_bytes(data)
    assert zp.verify(out, quick=True).ok
    assert not zp.verify(out).ok
    predict(cohort, out, two_heads, **HEADS, verify=True)
    assert_whole(out, expected)


def test_levels_are_added_to_a_finished_prediction_and_kept_without_the_network(
    cohort: zp.Cohort, out: Path, expected: dict[str, Any]
) -> None:
    net = Net()
    predict(cohort, out, net)
    assert not list(out.glob("*/*/1"))
    again = Net()
    predict(cohort, out, again, pyramid=True)
    assert again.patches == 1
    assert [level.shape[1:] for level in levels_in(out / "bob" / "prediction")] == LEVELS
    other = out.with_name("other.zarr")
    predict(cohort, other, Net(), pyramid=True)
    assert_whole(out, contents(other))
    before = (out / MANIFEST).read_bytes()
    for kept in (None, False, True):
        predict(cohort, out, Net(), pyramid=kept)
        assert_whole(out, contents(other))
        assert (out / MANIFEST).read_bytes() == before
    (out / "ann/prediction/2/zarr.json").unlink()
    predict(cohort, out, Net())  # without pyramid=True: levels that exist are mended
    assert_whole(out, contents(other))


# Shared


@pytest.mark.slow
def test_other_processes_and_a_cluster_give_the_same_levels(
    cohort: zp.Cohort, out: Path, expected: dict[str, Any], full: bool
) -> None:
    predict(cohort, out, two_heads, **HEADS, jobs=2)
    assert_whole(out, expected)
    if not full:
        return  # whoever writes the shards, one process makes the levels of them
    shutil.rmtree(out)
    with local_cluster(2) as cluster:
        predict(cohort, out, two_heads, **HEADS, scheduler=cluster.scheduler_address)
    assert_whole(out, expected)


# Plans and slides


def test_a_plan_says_that_levels_are_written_and_how_much_they_take(cohort: zp.Cohort) -> None:
    plain, *_ = plans_of(cohort)
    plan, *_ = plans_of(cohort, pyramid=True)
    assert (plain.levels, plan.levels, plan.to_json()["levels"]) == (0, 2, 2)
    voxels = sum(map(np.prod, LEVELS)) * 2 * 4
    assert (plain.bytes_out, plan.bytes_out) == (np.prod(LEVELS[0]) * 2 * 4, voxels)
    assert plan.shards_out > plain.shards_out
    assert " with 2 coarser levels; " in str(plan)
    assert "coarser" not in str(plain)
    jobs, *_ = plans_of(cohort, pyramid=True, jobs=2)
    assert jobs.peak_bytes > 2 * jobs.region_bytes


def write_plane(path: Path, shape: tuple[int, ...] = (300, 200), names: str = "yx") -> Path:
    array = zarr.create_array(
        path, shape=shape, chunks=(64,) * len(shape), dtype="u1", dimension_names=[*names]
    )
    array[:] = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    return path


@pytest.mark.parametrize("pyramid", [None, True, False])
def test_slides_have_levels_unless_they_are_not_wanted_and_one_plane_stays_one(
    tmp_path: Path, out: Path, pyramid: bool | None
) -> None:
    slide = zp.Subject(name="slide", image=zp.ScalarImage(write_plane(tmp_path / "slide.zarr")))
    options: Any = {"image": "image", "patch_size": (64, 64, 1), "patch_overlap": 0, "pyramid": pyramid}
    zp.predict(torch.nn.Identity(), [slide], out, **options)
    levels = [level.shape for level in levels_in(out / "slide" / "prediction")]
    coarser = [] if pyramid is False else [(1, 150, 100), (1, 75, 50), (1, 38, 25)]
    assert levels == [(1, 300, 200), *coarser]
    group: Any = zarr.open_group(out / "slide" / "prediction", mode="r")
    last = group.attrs["ome"]["multiscales"][0]["datasets"][-1]["coordinateTransformations"]
    factor = 2.0 ** len(coarser)
    assert last[0]["scale"] == [1.0, factor, factor]
    again = zp.predict(
        torch.nn.Identity(), zp.Cohort(out), out.with_name("again.zarr"), **{**options, "image": "prediction"}
    )
    assert len(again[0].prediction.record.levels) == len(coarser)  # a slide that was predicted is one again


@pytest.mark.parametrize("kind", ["volume", "memory"])
def test_volumes_and_planes_in_memory_have_no_levels(tmp_path: Path, out: Path, kind: str) -> None:
    data: Any = np.ones((300, 200, 1), np.float32)
    if kind == "volume":
        data = write_plane(tmp_path / "volume.zarr", (100, 70, 40), "zyx")
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(data))
    size = (64, 64, 1) if kind == "memory" else 32
    zp.predict(torch.nn.Identity(), [subject], out, image="t1", patch_size=size)
    assert len(levels_in(out / "ann" / "prediction")) == 1


# Names and paths


def test_a_record_has_the_network_and_the_inputs_and_neither_decides_what_is_resumed(
    store: Path,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    of_batches = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    example = (torch.zeros(2, 1, 20, 20, 20),)
    program = torch.export.export(torch.nn.Conv3d(1, 2, 3, padding=1), example, **of_batches)
    torch.export.save(program, "net.pt2")
    command = ["predict", str(store), "out.zarr", *map(str, ARGUMENTS), "--reduce", "argmax"]
    assert zpatch.cli.run([*command, "--model", "net.pt2", "--include", "ann", "--mask", "mask"]) == 0
    [record] = zp.Cohort(out).store.records.values()
    made = record.provenance
    assert made is not None
    assert (made.model, made.model_path, made.version) == ("net.pt2", str(tmp_path / "net.pt2"), "0.1.0")
    assert made.inputs == {name: str(store / "ann" / name) for name in ("t1", "mask")}
    capsys.readouterr()
    assert zpatch.cli.run(["info", "out.zarr"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line == f"predicted by net.pt2 ({tmp_path / 'net.pt2'}) from {store / 'ann'}, by zpatch 0.1.0"
    assert zpatch.cli.run(["info", "out.zarr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["provenance"]["model"] == "net.pt2"

    (tmp_path / "moved").mkdir()
    (tmp_path / "net.pt2").rename(tmp_path / "moved" / "other.pt2")
    before = (out / MANIFEST).read_bytes()
    (out / "ann/prediction/0/c/0/0/0").unlink()
    again = [*command, "--model", "moved/other.pt2", "--include", "ann", "--mask", "mask"]
    assert zpatch.cli.run(again) == 0
    assert (out / MANIFEST).read_bytes() == before
    assert zp.verify(out).ok


def test_networks_in_memory_have_the_names_of_their_classes_and_inputs_in_memory_no_path(out: Path) -> None:
    subject = zp.Subject(name="ann", t1=zp.ScalarImage(np.ones((8, 8, 8), np.float32)))
    nets = {"torch.nn.modules.linear.Identity": torch.nn.Identity(), f"{__name__}.identity": identity}
    for number, (name, net) in enumerate(nets.items()):
        place = out.with_name(str(number))
        made = zp.predict(net, [subject], place, image="t1", patch_size=8)[0].prediction.record.provenance
        assert (made.model, made.model_path, made.inputs) == (name, None, {"t1": None})


def identity(batch: torch.Tensor) -> torch.Tensor:
    return batch


def test_a_factory_has_the_path_of_its_module(
    store: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_pyramids.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Identity()\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["predict", str(store), "out.zarr", *map(str, ARGUMENTS), "--include", "bob"]
    assert zpatch.cli.run([*command, "--model", "nets_of_pyramids:net"]) == 0
    made = zp.Cohort(out)[0].prediction.record.provenance
    assert (made.model, made.model_path) == ("nets_of_pyramids:net", str(tmp_path / "nets_of_pyramids.py"))


def test_a_prediction_of_a_prediction_is_resumed_when_the_first_is_made_again_by_a_moved_model(
    cohort: zp.Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.zarr", tmp_path / "second.zarr"
    options: Any = {"image": "prediction", "patch_size": 20}
    predict(cohort, first, Net())
    identities = [subject.prediction.identity() for subject in zp.Cohort(first)]
    zp.predict(torch.nn.Identity(), zp.Cohort(first), second, **options)
    monkeypatch.setattr("zpatch.prediction.subject_job.version", lambda name: "9")
    predict(cohort, first, Net(), overwrite=True)
    assert [subject.prediction.identity() for subject in zp.Cohort(first)] == identities
    zp.predict(torch.nn.Identity(), zp.Cohort(first), second, **options)
