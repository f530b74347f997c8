"""NRRD and MetaImage -> store -> NIfTI: in every convention, with the voxels and the affine of SimpleITK."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray

import zpatch as zp
from zpatch.cli import run
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.conversion_plan import plan_conversion
from zpatch.errors import SourceError
from zpatch.records.image_record import ImageRecord

SUFFIXES = [".mha", ".mhd", ".nrrd", ".nhdr"]
OBLIQUE = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
TURNED = np.array([[0, -1.0, 0], [0, 0, 1], [-1, 0, 0]])

any_suffix = pytest.mark.parametrize("suffix", SUFFIXES)


def image_of(voxels: NDArray[Any], direction: NDArray[np.float64] = OBLIQUE, *, vector: bool = False) -> Any:
    image = sitk.GetImageFromArray(voxels, isVector=vector)
    image.SetSpacing((1.0, 1.5, 2.5))
    image.SetOrigin((-40.5, 12.25, 100.0))
    image.SetDirection(direction.reshape(-1))
    return image


def save(path: Path, image: Any, *, compressed: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=compressed)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store.zarr"


@pytest.fixture
def ct(rng: np.random.Generator) -> NDArray[np.int16]:
    return rng.integers(-1000, 1000, (9, 10, 11), dtype=np.int16)


@pytest.fixture
def labels(rng: np.random.Generator) -> NDArray[np.uint8]:
    return rng.integers(0, 4, (9, 10, 11), dtype=np.uint8)


def converted(source: Path, store: Path, **options: Any) -> dict[tuple[str, str], ImageRecord]:
    records = zp.convert(source, store, **options).records
    zp.verify(store)
    return {(record.subject, record.image): record for record in records}


# Conventions


@any_suffix
def test_an_nnunet_folder_with_a_file_ending_converts(
    suffix: str, source: Path, store: Path, ct: NDArray[Any], labels: NDArray[Any]
) -> None:
    for case in ("a", "b"):
        save(source / "imagesTr" / f"{case}_0000{suffix}", image_of(ct))
        save(source / "labelsTr" / f"{case}{suffix}", image_of(labels))
    nib.save(nib.Nifti1Image(labels, np.eye(4)), source / "labelsTr" / "a.nii.gz")
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0}, "file_ending": suffix}
    (source / "dataset.json").write_text(json.dumps(dataset))
    plan = plan_conversion(source, ConvertOptions())
    assert plan.notes == (
        f"1 file (labelsTr/a.nii.gz) left out: the file_ending of the dataset is {suffix!r}",
    )
    records = converted(source, store)
    assert set(records) == {(case, name) for case in "ab" for name in ("ct", "seg")}
    cohort = zp.Cohort(store)
    for case in ("a", "b"):
        np.testing.assert_array_equal(cohort[case].ct.data[0].T, ct)
        np.testing.assert_array_equal(cohort[case].seg.data[0].T, labels)


def test_a_file_ending_that_is_not_read_is_an_error(source: Path) -> None:
    (source / "imagesTr").mkdir(parents=True)
    (source / "imagesTr" / "a_0000.png").touch()
    (source / "dataset.json").write_text('{"channel_names": {"0": "R"}, "file_ending": ".png"}')
    with pytest.raises(
        SourceError, match=r"dataset\.json: its file_ending is '\.png', and files that end in"
    ):
        zp.convert(source, source.parent / "store")


@any_suffix
@pytest.mark.parametrize("convention", ["folders", "flat", "bids", "csv", "monai", "decathlon"])
def test_every_convention_takes_them(
    convention: str, suffix: str, source: Path, store: Path, ct: NDArray[Any], labels: NDArray[Any]
) -> None:
    names = {
        "folders": ("sub-1/t1", "sub-1/seg"),
        "flat": ("sub-1_t1", "sub-1_seg"),
        "bids": ("sub-1/anat/sub-1_T1w", "sub-1/anat/sub-1_dseg"),
    }.get(convention, ("imagesTr/sub-1", "labelsTr/sub-1"))
    for name, voxels in zip(names, (ct, labels), strict=True):
        save(source / f"{name}{suffix}", image_of(voxels))
    entry = {"image": f"{names[0]}{suffix}", "label": f"{names[1]}{suffix}"}
    listed = source
    if convention == "csv":
        listed = source / "list.csv"
        listed.write_text(f"subject,t1,label:seg\nsub-1,{entry['image']},{entry['label']}\n")
    elif convention == "monai":
        listed = source / "list.json"
        listed.write_text(json.dumps({"training": [entry]}))
    elif convention == "decathlon":
        (source / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "training": [entry]}))
    records = converted(listed, store)
    assert sorted(record.kind for record in records.values()) == ["label", "scalar"]
    [subject] = zp.Cohort(store)
    for (_, name), record in records.items():
        right = ct if record.kind == "scalar" else labels
        np.testing.assert_array_equal(subject[name].data[0].T, right)


# There and back


@any_suffix
@pytest.mark.parametrize("direction", [np.eye(3), TURNED, OBLIQUE], ids=["straight", "turned", "oblique"])
@pytest.mark.parametrize("code", ["u1", "i2", "f4", "f8"])
def test_an_exported_file_is_the_one_that_simpleitk_converts(
    suffix: str, direction: NDArray[Any], code: str, source: Path, store: Path, ct: NDArray[Any]
) -> None:
    image = image_of(ct.astype(code), direction)
    save(source / "sub" / f"ct{suffix}", image)
    converted(source, store, chunk=4)
    [path] = zp.export(store, source.parent / "out")
    right = save(source.parent / "right.nii.gz", image)
    ours, theirs = nib.load(path), nib.load(right)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
    assert ours.get_data_dtype() == theirs.get_data_dtype()
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-4)
    again = sitk.ReadImage(str(path))
    for name in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(again, name)(), getattr(image, name)(), atol=1e-4)


@any_suffix
@pytest.mark.parametrize("compressed", [False, True])
def test_channels_are_channels_in_the_store_and_in_nifti(
    suffix: str, compressed: bool, source: Path, store: Path, rng: np.random.Generator
) -> None:
    voxels = rng.integers(-99, 99, (9, 10, 11, 3), dtype=np.int16)
    path = save(source / "sub" / f"dwi{suffix}", image_of(voxels, vector=True), compressed=compressed)
    [record] = converted(source, store, chunk=4).values()
    assert (record.axes, record.shape) == ("czyx", (3, 9, 10, 11))
    image = zp.Cohort(store)["sub"].dwi
    np.testing.assert_array_equal(image.data, voxels.transpose(3, 2, 1, 0))
    [exported] = zp.export(store, source.parent / "out")
    np.testing.assert_array_equal(np.asarray(nib.load(exported).dataobj), voxels.transpose(2, 1, 0, 3))
    if not compressed:
        mapped = zp.ScalarImage(path)
        np.testing.assert_array_equal(mapped.data, image.data)
        box = zp.PatchLocation((2, 3, 4), (5, 6, 4))
        np.testing.assert_array_equal(mapped.read(box), image.read(box))
        sent = pickle.loads(pickle.dumps(mapped))
        np.testing.assert_array_equal(sent.read(box), image.read(box))
        np.testing.assert_allclose(mapped.affine, image.affine)


@any_suffix
def test_spacing_and_orientation_are_those_of_the_same_nifti(
    suffix: str, source: Path, tmp_path: Path, ct: NDArray[Any], labels: NDArray[Any]
) -> None:
    for folder, end in (("source", suffix), ("nifti", ".nii.gz")):
        save(tmp_path / folder / "sub" / f"ct{end}", image_of(ct, TURNED))
        save(tmp_path / folder / "sub" / f"seg{end}", image_of(labels.astype("f4"), TURNED))
        converted(
            tmp_path / folder, tmp_path / f"{folder}.zarr", spacing=1.25, orient="RAS", pyramid=True, chunk=4
        )
    ours, right = (zp.Cohort(tmp_path / f"{name}.zarr")["sub"] for name in ("source", "nifti"))
    np.testing.assert_array_equal(ours.seg.data, right.seg.data)
    np.testing.assert_allclose(ours.ct.data, right.ct.data, atol=1)
    np.testing.assert_allclose(ours.ct.affine, right.ct.affine, atol=1e-4)
    assert ours.seg.dtype == np.uint8
    assert ours.ct.record.stats["mean"] == pytest.approx(right.ct.record.stats["mean"], rel=1e-3)


# Resuming, bad files, memory


def test_a_changed_file_of_voxels_is_converted_again(source: Path, store: Path, ct: NDArray[Any]) -> None:
    for subject in ("a", "b"):
        save(source / subject / "ct.mhd", image_of(ct), compressed=False)
    converted(source, store)
    assert zp.convert(source, store).done == ("a", "b")
    (source / "b" / "ct.raw").write_bytes((ct + 1).tobytes())
    report = zp.convert(source, store)
    assert (report.done, [record.subject for record in report.records]) == (("a",), ["b"])
    np.testing.assert_array_equal(zp.Cohort(store)["b"].ct.data[0].T, ct + 1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], "its header declares|broken zlib data"),
        (lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], "broken zlib data"),
        (lambda data: data.replace(b"MET_SHORT", b"MET_ODD"), "unknown voxel type 'MET_ODD'"),
    ],
    ids=["cut", "checksum", "type"],
)
def test_a_bad_file_fails_alone_and_leaves_nothing(
    damage: Callable[[bytes], bytes], says: str, source: Path, store: Path, ct: NDArray[Any]
) -> None:
    for subject in ("a", "b"):
        save(source / subject / "ct.mha", image_of(ct))
    path = source / "b" / "ct.mha"
    path.write_bytes(damage(path.read_bytes()))
    report = zp.convert(source, store)
    [failure] = report.failures
    assert failure.subject == "b"
    assert failure.reason.startswith(f"{path}: ")
    assert any(text in failure.reason for text in says.split("|"))
    assert sorted(entry.name for entry in store.iterdir() if entry.is_dir()) == ["a"]


@any_suffix
@pytest.mark.parametrize("channels", [1, 3])
def test_compressed_voxels_are_read_slab_by_slab(suffix: str, channels: int, source: Path) -> None:
    voxels = np.zeros((256, 128, 128, channels), np.uint8)[..., slice(None) if channels > 1 else 0]
    save(source / "sub" / f"t1{suffix}", image_of(voxels, vector=channels > 1))
    [image] = plan_conversion(source, ConvertOptions(chunk=16, max_memory=66 * 2**20)).images
    assert image.slab_bytes <= voxels.nbytes / 4
    tracemalloc.start()
    for slab in image.file.slabs(image.layout.slab_extent):
        assert slab.voxels.nbytes <= image.slab_bytes
        del slab
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22  # blocks of compressed and of decompressed bytes; slabs are not counted


def test_zlib_data_of_a_bomb_stop_at_the_limit(source: Path, tmp_path: Path) -> None:
    fields = ("NDims = 3", "DimSize = 2 2 2", "ElementType = MET_UCHAR", "CompressedData = True")
    header = "\n".join([*fields, "ElementDataFile = LOCAL", ""])
    source.mkdir()
    (source / "a.mha").write_bytes(header.encode() + zlib.compress(bytes(2**27), 1))
    with pytest.raises(SourceError, match=r"its zlib data go on for over 64\.0 MiB after its last voxel"):
        zp.convert(source, tmp_path / "store")


@pytest.mark.parametrize("name", ["scan.mha", "scan.nrrd", "scan.nii"])
def test_a_single_file_is_predicted_in_place_as_its_store_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    voxels = np.random.default_rng(0).integers(-50, 900, (20, 24, 28)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.75, 2))
    (tmp_path / "scans").mkdir()
    sitk.WriteImage(image, str(tmp_path / "scans" / name))
    monkeypatch.chdir(tmp_path)
    zp.convert("scans", "store.zarr")
    options = ("--model", "torch.nn:Identity", "--patch-size", "16", "--overlap", "4", "-q")
    assert run(["predict", f"scans/{name}", "one.zarr", *options]) == 0
    assert run(["predict", "store.zarr", "all.zarr", *options]) == 0
    one, other = (zp.Cohort(f"{kind}.zarr")["scan"].prediction for kind in ("one", "all"))
    np.testing.assert_array_equal(one.data, other.data)
    np.testing.assert_allclose(one.affine, other.affine)
    assert run(["predict", f"scans/{name}", "two.zarr", *options, "--axes", "zyx"]) == 2
