"""An input that is not there, or not there any more, is an error, and never an image of fill values."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from processes import children, eventually
from record import Some
from test_faults import assert_whole, contents

import zpatch as zp
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import DamageError, StoreExistsError

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (32, 36, 240)
OPTIONS: dict[str, Any] = {"image": "t1", "patch_size": 20, "patch_overlap": 8, "batch_size": 2}
MOMENTS = 10
CLONE_NEWNS = 0x20000  # of sched.h


class Net(torch.nn.Module):
    """Adds one, so that no predicted voxel is 0; ``at`` is called with the number of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.add = torch.nn.Parameter(torch.ones(1))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch + self.add


def net_calling(at: Callable[[int], None], pause_s: float = 0.0) -> Net:
    """The network, with a hook that is no part of what it is: it is called with the number of the batch."""
    net, calls = Net(), iter(range(10**6))

    def hook(*_: Any) -> None:
        at(next(calls))
        time.sleep(pause_s)

    net.register_forward_pre_hook(hook)
    return net


def voxels(seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(1, 900, SHAPE).astype(np.int16)


def write_zarr(path: Path, values: NDArray[Any], version: Any = 3, **how: Any) -> Path:
    chosen: dict[str, Any] = {"chunks": (16, 16, 16)} | how
    zarr.create_array(path, shape=values.shape, dtype=values.dtype, zarr_format=version, **chosen)[:] = values
    return path


def zarr_2(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    return zp.ScalarImage(write_zarr(path, values, version=2), axes="xyz")


def zarr_3(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    return zp.ScalarImage(write_zarr(path, values), axes="xyz")


def sharded(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    return zp.ScalarImage(write_zarr(path, values, shards=(32, 48, 32)), axes="xyz")


def read_by_zarr(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    return zp.ScalarImage(write_zarr(path, values, version=2, order="F"), axes="xyz")


def dask_graph(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    import dask.array as da

    return zp.ScalarImage(da.from_zarr(write_zarr(path, values)))


def preprocessed(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    return zarr_3(path, values).map(lambda array: array + 0)


def nifti(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    path.mkdir()
    nib.save(nib.Nifti1Image(values, np.eye(4)), path / "t1.nii")
    return zp.ScalarImage(path / "t1.nii")


def mapped(path: Path, values: NDArray[Any]) -> zp.ScalarImage:
    path.mkdir()
    values.tofile(path / "t1.raw")
    return zp.ScalarImage(np.memmap(path / "t1.raw", np.int16, "r", shape=SHAPE))


Kind = Callable[[Path, NDArray[Any]], zp.ScalarImage]
KINDS: list[Kind] = [zarr_2, zarr_3, sharded, read_by_zarr, dask_graph, preprocessed, nifti, mapped]
ZARR: list[Kind] = [zarr_2, zarr_3, sharded, read_by_zarr, dask_graph, preprocessed]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """Where the input is."""
    yield tmp_path / "input"
    close_shards(tmp_path)


def predict(image: zp.ScalarImage, out: Path, model: Any = None, **options: Any) -> zp.Cohort:
    return zp.predict(model or Net(), [zp.Subject(name="ann", t1=image)], out, **{**OPTIONS, **options})


def undisturbed(image: zp.ScalarImage, out: Path) -> dict[str, Any]:
    predict(image, out.with_name("undisturbed.zarr"))
    return contents(out.with_name("undisturbed.zarr"))


def batches(image: zp.ScalarImage, out: Path) -> int:
    seen: list[int] = []
    predict(image, out.with_name("counted.zarr"), net_calling(seen.append))
    return len(seen)


def moments(count: int) -> list[int]:
    """Numbers of batches, at ten moments of a run."""
    numbers: list[int] = np.unique(np.linspace(0, count - 1, MOMENTS).astype(int)).tolist()
    return numbers


# Reading


@pytest.mark.parametrize("kind", ZARR)
@pytest.mark.parametrize("how", ["renamed", "emptied", "replaced by another array"])
def test_an_array_that_is_away_is_an_error_that_names_it_and_can_be_read_again_when_it_is_back(
    source: Path, kind: Kind, how: str
) -> None:
    expected = voxels()
    image = kind(source, expected)
    np.testing.assert_array_equal(image.data[0], expected)
    away = source.rename(source.with_name("away"))
    if how == "emptied":
        source.mkdir()
    elif how != "renamed":
        write_zarr(source, voxels()[:5])
    problem = r"is not there|is not the file that was opened|its index does not match"
    with pytest.raises(DamageError, match=rf"/input.*({problem})"):
        image.data  # noqa: B018
    shutil.rmtree(source, ignore_errors=True)
    away.rename(source)
    np.testing.assert_array_equal(image.data[0], expected)


@pytest.mark.parametrize("kind", ZARR)
def test_metadata_that_were_written_again_or_copied_are_the_same_array(source: Path, kind: Kind) -> None:
    expected = voxels()
    expected[:16, :16, :16] = 0
    image = kind(source, expected)
    for document in (source / "zarr.json", source / ".zarray"):
        if document.exists():
            document.write_bytes(document.read_bytes())
    shutil.copytree(source, source.with_name("copy"))
    shutil.rmtree(source)
    source.with_name("copy").rename(source)
    np.testing.assert_array_equal(image.data[0], expected)


def test_an_array_that_was_away_while_its_files_were_opened_is_read_once_more(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = voxels()
    image = zarr_3(source, expected)
    away = source.with_name("away")
    source.rename(away)
    real = zp.chunks.gather.open_shard  # type: ignore[attr-defined]
    opened: list[int] = []

    def back_after_three(*arguments: Any) -> Any:
        shard = real(*arguments)
        opened.append(1)
        if len(opened) == 3:
            away.rename(source)
        return shard

    monkeypatch.setattr("zpatch.chunks.gather.open_shard", back_after_three)
    np.testing.assert_array_equal(image.data[0], expected)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", ZARR)
def test_an_array_of_which_chunks_were_never_written_is_predicted(
    source: Path, out: Path, kind: Kind, jobs: int
) -> None:
    expected = voxels()
    expected[:, :, 32:160] = 0
    image = kind(source, expected)
    predict(image, out, jobs=jobs)
    np.testing.assert_allclose(zp.Cohort(out)[0].prediction.data[0], expected + 1, rtol=1e-6)


# Predicting


@pytest.mark.slow
@pytest.mark.timeout(600)
@every_kind
def test_an_input_that_is_renamed_at_any_moment_is_an_error_or_the_same_prediction(
    source: Path, out: Path, some: Some, kind: Kind
) -> None:
    image = kind(source, voxels())
    expected, away = undisturbed(image, out), source.with_name("away")
    for moment in some(moments(batches(image, out)), 2):
        shutil.rmtree(out, ignore_errors=True)

        def rename(number: int, moment: int = moment) -> None:
            if number == moment:
                source.rename(away)

        with pytest.raises(DamageError, match=r"image 't1' of subject 'ann'|a dask array|/input"):
            predict(image, out, net_calling(rename))
        assert "ann" not in (zp.Cohort(out).names if (out / "manifest.jsonl").exists() else [])
        away.rename(source)
        predict(image, out)
        assert_whole(out, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ZARR)
@pytest.mark.parametrize("other", ["an empty array", "other voxels"])
def test_another_array_in_the_place_of_the_input_is_an_error_and_never_in_the_prediction(
    source: Path, out: Path, full: bool, some: Some, kind: Kind, other: str
) -> None:
    """Also if the right one is back when the same command runs again."""
    if not full and KINDS.index(kind) % 2 != (other == "other voxels"):
        pytest.skip("each kind with each other array needs --full; what it holds does not matter")
    image = kind(source, voxels())
    expected, away = undisturbed(image, out), source.with_name("away")
    for moment in some(moments(batches(image, out)), 1):
        shutil.rmtree(out, ignore_errors=True)

        def swap(number: int, moment: int = moment) -> None:
            if number == moment:
                source.rename(away)
                kind(source, voxels(seed=1) if other == "other voxels" else np.zeros(SHAPE, np.int16))

        with pytest.raises(DamageError):
            predict(image, out, net_calling(swap))
        shutil.rmtree(source)
        away.rename(source)
        predict(image, out)
        assert_whole(out, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
@every_kind
def test_an_input_that_is_renamed_under_jobs_is_an_error_or_the_same_prediction(
    source: Path, out: Path, full: bool, some: Some, kind: Kind
) -> None:
    if not full and kind not in (zarr_3, dask_graph, nifti):
        pytest.skip("other kinds need --full: without jobs they are all renamed in the quick run")
    image = kind(source, voxels())
    expected, away, marks = undisturbed(image, out), source.with_name("away"), source.with_name("marks")

    for moment in some(range(1, 14, 3), 1):
        shutil.rmtree(out, ignore_errors=True)
        marks.unlink(missing_ok=True)

        def rename(_: int, moment: int = moment) -> None:
            with marks.open("ab", buffering=0) as file:
                file.write(b".")
            if marks.stat().st_size >= moment and not away.exists():
                with contextlib.suppress(FileNotFoundError):  # the other job was faster
                    source.rename(away)

        with pytest.raises(DamageError):
            predict(image, out, net_calling(rename, pause_s=0.02), jobs=2)
        away.rename(source)
        predict(image, out, jobs=2)
        assert_whole(out, expected)
    assert children() == []


def test_an_input_whose_voxels_are_changed_in_place_is_an_error_and_its_prediction_is_made_again(
    source: Path, out: Path
) -> None:
    image = zarr_3(source, voxels())

    def change(number: int) -> None:
        if number == 3:
            zarr.open_array(source, mode="r+")[:16] = 7

    with pytest.raises(
        DamageError, match=r"the inputs of 'ann' were changed while|image 't1' of subject 'ann'"
    ):
        predict(image, out, net_calling(change))
    with contextlib.suppress(StoreExistsError):
        predict(image, out)
        np.testing.assert_allclose(zp.Cohort(out)[0].prediction.data, image.data + 1, rtol=1e-6)


def test_an_input_that_is_not_there_when_a_prediction_begins_is_an_error(source: Path, out: Path) -> None:
    for kind in ZARR:
        image = kind(source, voxels())
        shutil.rmtree(source)
        with pytest.raises(DamageError, match="is not there"):
            predict(image, out)


# Other processes


@pytest.mark.parametrize("kind", [nifti, mapped])
def test_a_mapped_file_is_sent_to_jobs_by_its_path_and_never_as_its_voxels(
    source: Path, out: Path, kind: Kind
) -> None:
    import cloudpickle

    image = kind(source, voxels())
    assert len(cloudpickle.dumps(image)) < 4000 < image.data.nbytes
    expected = undisturbed(image, out)
    predict(image, out, jobs=2)
    assert_whole(out, expected)


def can_unshare() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    return False


def run_scheduler(file: str) -> None:
    from distributed.cli.dask_scheduler import main

    main(["--port", "0", "--no-dashboard", "--scheduler-file", file])


def run_worker(file: str, commands: list[str]) -> None:
    """A worker, after commands in a mount namespace of its own."""
    from distributed.cli.dask_worker import main

    if commands:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["sh", "-c", " && ".join(commands)], check=True)
    main(["--scheduler-file", file, "--no-dashboard", "--nthreads", "1", "--no-nanny",
          "--local-directory", "scratch"])  # fmt: skip


@contextlib.contextmanager
def cluster(folder: Path, *commands: str) -> Iterator[str]:
    """A dask scheduler and a worker that runs commands first, which no other process sees; its file."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    with forked.start(run_scheduler, str(file), folder=folder):
        eventually(lambda: file.exists() and file.stat().st_size, "the scheduler's file")
        with forked.start(run_worker, str(file), commands, folder=folder):
            from distributed import Client

            with Client(scheduler_file=str(file), set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
            yield str(file)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not can_unshare(), reason="mount namespaces are not allowed here")
@pytest.mark.parametrize("sees", ["nothing", "the metadata alone", "an older copy"])
@pytest.mark.parametrize("kind", [zarr_3, nifti])
def test_a_worker_of_a_cluster_that_does_not_see_the_input_is_an_error_that_names_worker_and_path(
    source: Path, out: Path, tmp_path: Path, kind: Kind, sees: str, full: bool
) -> None:
    if not full and (kind, sees) not in (
        (zarr_3, "nothing"),
        (zarr_3, "the metadata alone"),
        (nifti, "an older copy"),
    ):
        pytest.skip("each kind with each view needs --full")
    older = tmp_path / "older"
    kind(older, np.zeros(SHAPE, np.int16))
    image = kind(source, voxels())
    expected = undisturbed(image, out)
    hidden = {
        "nothing": [f"mount -t tmpfs none {source}"],
        "the metadata alone": [
            f"mkdir {tmp_path}/meta",
            f"cp {source}/*.json {source}/.z* {tmp_path}/meta 2>/dev/null; true",
            f"mount --bind {tmp_path}/meta {source}",
        ],
        "an older copy": [f"mount --bind {older} {source}"],
    }[sees]
    with cluster(tmp_path, *hidden) as scheduler:
        with pytest.raises(
            DamageError, match=r"for process \d+ on .*all workers must see the same"
        ) as caught:
            predict(image, out, scheduler=scheduler)
        assert str(source) in str(caught.value)
    assert zp.Cohort(out).names == []
    with cluster(tmp_path) as scheduler:
        predict(image, out, scheduler=scheduler)
    assert_whole(out, expected)
