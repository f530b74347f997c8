"""Conversion: the store holds the voxels that nibabel reads; a bad case fails alone and with a reason."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

import zpatch as zp
from zpatch.chunks.layout import Layout
from zpatch.conversion.case_staging import label_dtype
from zpatch.conversion.conversion import run_conversion
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.conversion_plan import ConversionPlan, plan_conversion
from zpatch.conversion.source_files import fingerprint
from zpatch.digests import unsealed
from zpatch.errors import MemoryLimitError, OptionError, SourceError
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import MANIFEST, MANIFEST_TABLE
from zpatch.store import store_writer
from zpatch.volume_files import formats

RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def save(path: Path, voxels: NDArray[Any], affine: Any = None) -> Path:
    """A NIfTI file of these voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.eye(4) if affine is None else affine
    nib.Nifti1Image(voxels, affine, dtype=voxels.dtype).to_filename(path)
    return path


def volume(*shape: int, dtype: Any = np.int16) -> NDArray[Any]:
    return (np.arange(np.prod(shape)).reshape(shape) % 120).astype(dtype)


def noise() -> NDArray[Any]:
    """Voxels that do not compress, so that a header can be read without the end of the file."""
    return np.random.default_rng(0).integers(0, 2**16, (60, 60, 60), dtype=np.uint16)


def only(report: Any) -> ImageRecord:
    [record] = report.records
    return record


def only_image(store: Path) -> zp.Image:
    [subject] = zp.Cohort(store)
    [image] = subject.images.values()
    return image


def fails(source: Path, store: Path, why: str) -> None:
    """The only case of a source is refused, and no store is left."""
    with pytest.raises(SourceError, match=why):
        zp.convert(source, store)
    assert not store.exists()


def test_every_voxel_and_affine_is_that_of_nibabel(cohort_source: Path, cohort: zp.Cohort) -> None:
    assert sorted(cohort.names) == ["sub-01", "sub-02", "sub-03", "sub-04"]
    for subject in cohort:
        for name, image in subject.images.items():
            original = nib.load(cohort_source / subject.name / f"{name}.nii.gz")
            np.testing.assert_array_equal(image.data[0], np.asanyarray(original.dataobj))
            np.testing.assert_array_equal(image.affine, original.affine)
            assert image.spacing == pytest.approx(original.header.get_zooms())


def test_images_label_maps_and_sampling_maps_are_distinguished(source: Path, store: Path) -> None:
    for name in ("t1", "seg", "where"):
        save(source / "sub" / f"{name}.nii", volume(4, 5, 6))
    zp.convert(source, store, sampling_patterns=["where"])
    kinds = {name: type(image) for name, image in zp.Cohort(store)[0].images.items()}
    assert kinds == {"t1": zp.ScalarImage, "seg": zp.LabelMap, "where": zp.SamplingMap}


@pytest.mark.parametrize("code", ["u1", "i1", "i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize(("slope", "inter"), [(1, 0), (0.5, 10), (-2, 3)])
def test_statistics_are_those_of_numpy(
    source: Path, store: Path, rng: np.random.Generator, code: str, slope: float, inter: float
) -> None:
    voxels = rng.integers(0, 100, (6, 7, 8)).astype(code)
    voxels[:2] = 0
    path = save(source / "sub.nii", voxels)
    with path.open("r+b") as file:
        file.seek(112)
        file.write(np.array([slope, inter], "<f4").tobytes())
    stats = only(zp.convert(source, store)).stats
    values = np.asanyarray(nib.load(path).dataobj).astype(np.float64)
    near = 0.005 * abs(slope) * 100 if code in ("f4", "f8") else 1e-9
    for found, expected in ((stats, values), (stats["foreground"], values[voxels != 0])):
        assert found["count"] == expected.size
        assert (found["min"], found["max"]) == (expected.min(), expected.max())
        assert found["mean"] == pytest.approx(expected.mean())
        assert found["std"] == pytest.approx(expected.std())
        for name, q in (("percentile_0_5", 0.5), ("percentile_50", 50), ("percentile_99_5", 99.5)):
            assert found[name] == pytest.approx(np.percentile(expected, q), abs=near)
    where = np.argwhere(voxels)
    assert stats["foreground_box"] == [where.min(0).tolist(), (where.max(0) + 1).tolist()]


def test_nan_and_infinite_voxels_are_counted_and_warned_of(source: Path, store: Path) -> None:
    voxels = volume(4, 5, 6, dtype=np.float32)
    voxels[0, 0, :3], voxels[1, 1, 1], voxels[2, 2, :2] = np.nan, np.inf, -np.inf
    save(source / "sub.nii", voxels)
    record = only(zp.convert(source, store))
    assert (record.stats["nan"], record.stats["inf"]) == (3, 3)
    assert record.stats["mean"] == pytest.approx(voxels[np.isfinite(voxels)].mean())
    assert record.warnings == ("3 voxels are NaN", "3 voxels are infinite")
    np.testing.assert_array_equal(only_image(store).data[0], voxels)


def test_voxels_near_the_limit_of_their_type_are_converted(source: Path, store: Path) -> None:
    voxels = np.full((4, 5, 6), 1e200)
    voxels[0] = -1e200
    save(source / "sub.nii", voxels)
    stats = only(zp.convert(source, store)).stats
    assert (stats["min"], stats["max"]) == (-1e200, 1e200)
    np.testing.assert_array_equal(only_image(store).data[0], voxels)


def test_an_empty_image_has_statistics(source: Path, store: Path) -> None:
    save(source / "sub.nii", np.zeros((4, 5, 6), np.int16))
    stats = only(zp.convert(source, store)).stats
    assert (stats["min"], stats["max"], stats["std"]) == (0, 0, 0)
    assert stats["foreground"]["count"] == 0
    assert stats["foreground_box"] is None


def test_label_statistics_count_each_value(cohort_source: Path, cohort: zp.Cohort) -> None:
    for subject in cohort:
        labels = np.asanyarray(nib.load(cohort_source / subject.name / "seg.nii.gz").dataobj)
        values, counts = np.unique(labels, return_counts=True)
        expected = dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))
        assert subject.seg.statistics["labels"] == expected


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        ([0, 1, 255], "u1"),
        ([-1, 0, 127], "i1"),
        ([0, 256], "u2"),
        ([-1, 255], "i2"),
        ([0, 65536], "u4"),
        ([-1, 65536], "i4"),
        ([-1, 2**40], "i8"),
    ],
)
def test_integral_floats_are_stored_as_the_smallest_integer_and_exported_as_floats(
    source: Path, store: Path, tmp_path: Path, values: list[int], stored: str
) -> None:
    voxels = np.resize(np.array(values, np.float64), (4, 5, 6))
    path = save(source / "sub_seg.nii", voxels)
    record = only(zp.convert(source, store))
    assert (record.dtype, record.source_dtype) == (np.dtype(stored).newbyteorder("<").str, "<f8")
    np.testing.assert_array_equal(only_image(store).data[0], voxels)
    zp.export(store, tmp_path / "back.nii")
    assert (tmp_path / "back.nii").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("voxels", "why"),
    [
        (
            np.full((2, 3, 4), 1.5, np.float32),
            "label values must be whole numbers, not 1.5; say label_patt",
        ),
        (np.full((2, 3, 4), np.nan, np.float32), "cannot hold NaN or infinity; repair the file"),
        (np.full((2, 3, 4), np.inf, np.float32), "cannot hold NaN or infinity; repair the file"),
        (np.full((2, 3, 4), 1e30, np.float64), "fit no integer type"),
        (np.ones((2, 3, 4), np.complex64), "a label map cannot have voxels of type complex64"),
        (np.zeros((2, 3, 4), RGB), "a label map cannot have voxels of type"),
    ],
)
def test_voxels_that_cannot_be_labels_are_refused(
    source: Path, store: Path, voxels: NDArray[Any], why: str
) -> None:
    save(source / "sub_seg.nii", voxels)
    fails(source, store, f"sub_seg.nii: .*{why}")


def test_labels_with_a_fractional_slope_are_refused(source: Path, store: Path) -> None:
    path = save(source / "sub_seg.nii", volume(2, 3, 4))
    data = bytearray(path.read_bytes())
    data[112:116] = np.float32(0.5).tobytes()
    path.write_bytes(data)
    fails(source, store, "a label map cannot have the slope 0.5")


def test_label_values_too_large_for_the_index_fail_only_their_subject(source: Path, store: Path) -> None:
    save(source / "good" / "t1.nii", volume(2, 3, 4))
    save(source / "bad" / "seg.nii", np.full((2, 3, 4), 2**63, np.uint64))
    report = zp.convert(source, store)
    assert [failure.subject for failure in report.failures] == ["bad"]


def test_large_label_values_are_counted_exactly(source: Path, store: Path) -> None:
    save(source / "sub_seg.nii", np.full((2, 3, 4), 2**53 + 1, np.int64))
    assert only(zp.convert(source, store)).stats["labels"] == {str(2**53 + 1): 24}


def test_a_label_map_of_another_shape_than_its_image_is_refused(source: Path, store: Path) -> None:
    save(source / "sub" / "t1.nii", volume(4, 5, 6))
    save(source / "sub" / "seg.nii", volume(4, 5, 7))
    fails(source, store, r"seg.nii: its shape \(4, 5, 7\) is not that of .*t1.nii, \(4, 5, 6\); resample")


def shifted(voxels: float) -> NDArray[np.float64]:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = 2 * voxels
    return affine


def test_a_label_map_half_a_voxel_away_from_its_image_is_refused(source: Path, store: Path) -> None:
    save(source / "sub" / "t1.nii", volume(4, 5, 6), shifted(0))
    save(source / "sub" / "seg.nii", volume(4, 5, 6), shifted(0.6))
    fails(source, store, r"seg.nii: its affine puts voxels 0.6 voxels away from those of .*t1.nii; resample")


@pytest.mark.parametrize(("apart", "warned"), [(0, False), (0.0005, False), (0.002, True), (0.49, True)])
def test_a_label_map_a_small_distance_from_its_image_is_a_warning(
    source: Path, store: Path, apart: float, warned: bool
) -> None:
    save(source / "sub" / "t1.nii", volume(4, 5, 6), shifted(0))
    save(source / "sub" / "seg.nii", volume(4, 5, 6), shifted(apart))
    records = {record.image: record for record in zp.convert(source, store).records}
    assert records["t1"].warnings == ()
    assert any("its affine differs from that of t1 by" in w for w in records["seg"].warnings) == warned


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def not_nifti(path: Path) -> None:
    path.write_bytes(b"no NIfTI")


def vanished(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def bad_tail(path: Path) -> None:
    """Damage that is found only after all voxels have been streamed: the checksum of gzip data."""
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)


every_damage = pytest.mark.parametrize("damage", [truncated, not_nifti, vanished, bad_tail])


@every_damage
def test_a_bad_file_fails_its_whole_subject_and_no_other(source: Path, store: Path, damage: Any) -> None:
    for subject in ("a", "b", "c"):
        for image in ("t1", "t2"):
            path = save(source / subject / f"{image}.nii.gz", noise())
            if (subject, image) == ("b", "t2"):
                damage(path)
    report = zp.convert(source, store)
    [failure] = report.failures
    assert failure.subject == "b"
    assert str(source / "b" / "t2.nii.gz") in failure.reason
    assert {record.subject for record in report.records} == {"a", "c"}
    assert zp.Cohort(store).names == ["a", "c"]
    assert not (store / "b").exists()
    assert not (store / ".staging").exists()
    assert zp.verify(store).ok


@every_damage
def test_when_every_case_is_bad_there_is_an_error_and_no_store(
    source: Path, store: Path, damage: Any
) -> None:
    for subject in ("a", "b"):
        damage(save(source / subject / "t1.nii.gz", noise()))
    fails(source, store, r"no case of .*source can be converted: .*t1.nii.gz: .* \(and 1 more\)")


def test_a_bad_sampling_map_fails_only_its_subject(source: Path, store: Path) -> None:
    for subject, weight in (("good", 1), ("negative", -1), ("nan", np.nan)):
        save(source / subject / "where.nii", np.full((2, 3, 4), weight, np.float32))
    save(source / "channels" / "where.nii", np.ones((2, 3, 4, 2), np.float32))
    report = zp.convert(source, store, sampling_patterns=["where"])
    reasons = {failure.subject: failure.reason for failure in report.failures}
    assert "negative/where.nii holds negative weights; a sampling map must be" in reasons["negative"]
    assert "nan/where.nii holds NaN or infinite weights; a sampling map must be" in reasons["nan"]
    assert "channels/where.nii: a sampling map has one channel, not 2" in reasons["channels"]
    assert zp.Cohort(store).names == ["good"]


def plan_of(source: Path, **options: Any) -> ConversionPlan:
    return plan_conversion(source, ConvertOptions(**options))


def test_a_file_that_is_removed_after_planning_fails_only_its_subject(source: Path, store: Path) -> None:
    save(source / "a" / "t1.nii", volume(4, 5, 6))
    path = save(source / "b" / "t1.nii", volume(4, 5, 6))
    plan = plan_of(source)
    path.unlink()
    report = run_conversion(plan, store)
    assert [failure.subject for failure in report.failures] == ["b"]
    assert zp.Cohort(store).names == ["a"]


def test_a_plan_prints_its_figures_and_writes_nothing(source: Path, store: Path) -> None:
    save(source / "a" / "t1.nii", volume(10, 20, 30))
    save(source / "a" / "seg.nii", volume(10, 20, 30, dtype=np.uint8))
    save(source / "b" / "t1.nii", volume(10, 20, 30))
    not_nifti(save(source / "c" / "t1.nii", volume(1, 1, 1)))
    plan = plan_of(source)
    voxel_bytes = 6000 * (2 + 1 + 2)
    assert (len(plan.cases), len(plan.images), len(plan.failures)) == (2, 3, 1)
    assert plan.voxel_bytes == voxel_bytes
    assert plan.bytes_in == voxel_bytes + 3 * 352
    assert str(plan).startswith(
        "glob: 2 subjects, 3 images, 30.3 KiB in files -> 29.3 KiB of voxels in 3 shards"
    )
    assert "peak 64" in str(plan)
    assert [p.name for p in source.parent.iterdir()] == ["source"]


def test_a_plan_that_needs_more_memory_than_is_allowed_is_refused(source: Path, store: Path) -> None:
    save(source / "sub.nii", volume(4, 5, 6))
    with pytest.raises(MemoryLimitError, match=r"converting needs 64.0 MiB, more than the limit of 1.0 MiB;"):
        zp.convert(source, store, max_memory="1 MiB")
    assert not store.exists()
    zp.convert(source, store, max_memory="65 MiB")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"codec": "jpeg"}, "codec must be one of lz4, lz4hc, zstd, none, not 'jpeg'"),
        ({"chunk": 0}, "chunk must be at least 1 voxel, not 0"),
        ({"max_memory": "plenty"}, "'plenty' is not a number of bytes; write it like '2 GiB'"),
    ],
)
def test_an_invalid_option_is_refused_before_anything_is_read(
    source: Path, store: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(OptionError, match=why):
        zp.convert(source, store, **options)
    assert not store.exists()


@pytest.mark.parametrize("codec", ["lz4", "lz4hc", "zstd", "none"])
def test_every_codec_stores_the_same_voxels(source: Path, store: Path, codec: str) -> None:
    save(source / "sub.nii", volume(9, 8, 7))
    assert only(zp.convert(source, store, codec=codec)).codec == codec
    np.testing.assert_array_equal(only_image(store).data[0], volume(9, 8, 7))


@pytest.mark.parametrize(
    ("codec", "of_labels"), [("lz4", "lz4hc"), ("lz4hc", "lz4hc"), ("zstd", "zstd"), ("none", "none")]
)
def test_label_maps_of_an_lz4_cohort_are_packed_with_lz4hc(
    source: Path, store: Path, codec: str, of_labels: str
) -> None:
    save(source / "sub" / "ct.nii", volume(9, 8, 7))
    save(source / "sub" / "seg.nii", volume(9, 8, 7).astype(np.uint8))
    zp.convert(source, store, codec=codec)
    subject = zp.Cohort(store)[0]
    for image, packed in ((subject.ct, codec), (subject.seg, of_labels)):
        assert image.record is not None
        assert image.record.codec == packed
    metadata = json.loads((store / "sub" / "seg" / "0" / "zarr.json").read_text())
    assert (f'"cname": "{of_labels}"' in json.dumps(metadata)) == (codec != "none")


def test_volumes_with_thick_slices_get_flat_chunks(source: Path, store: Path) -> None:
    save(source / "sub.nii", volume(40, 40, 10), np.diag([1, 1, 5, 1]))
    record = only(zp.convert(source, store, chunk=16))
    assert record.chunks == (4, 32, 32)
    np.testing.assert_array_equal(only_image(store).data[0], volume(40, 40, 10))


@pytest.mark.parametrize(
    ("shape", "stored", "axes"),
    [
        ((5,), (1, 1, 5), "zyx"),
        ((5, 6), (1, 6, 5), "zyx"),
        ((5, 6, 7), (7, 6, 5), "zyx"),
        ((5, 6, 7, 1), (1, 7, 6, 5), "czyx"),
        ((5, 6, 7, 3), (3, 7, 6, 5), "czyx"),
        ((5, 6, 7, 1, 3), (3, 7, 6, 5), "czyx"),
        ((5, 6, 7, 2, 3), (6, 7, 6, 5), "czyx"),
    ],
)
def test_files_of_any_number_of_axes_are_stored_in_file_order(
    source: Path, store: Path, shape: tuple[int, ...], stored: tuple[int, ...], axes: str
) -> None:
    save(source / "sub.nii", volume(*shape))
    record = only(zp.convert(source, store, chunk=4))
    assert (record.shape, record.axes) == (stored, axes)
    image = only_image(store)
    assert image.shape == (stored[0] if len(stored) == 4 else 1, *stored[:-4:-1])
    np.testing.assert_array_equal(
        image.data, volume(*shape).T.reshape(image.shape[:1] + stored[-3:]).transpose(0, 3, 2, 1)
    )


def test_colours_become_three_channels(source: Path, store: Path, rng: np.random.Generator) -> None:
    colours = rng.integers(0, 255, (4, 5, 6, 3), dtype=np.uint8)
    save(source / "sub.nii", colours.view(RGB)[..., 0])
    record = only(zp.convert(source, store))
    assert record.colours == 3
    assert (record.shape, record.axes, record.dtype) == ((3, 6, 5, 4), "czyx", "|u1")
    np.testing.assert_array_equal(only_image(store).data, np.moveaxis(colours, -1, 0))


def with_layout(plan: ConversionPlan, layout: Layout) -> ConversionPlan:
    [case] = plan.cases
    images = tuple(dataclasses.replace(image, layout=layout) for image in case.images)
    return dataclasses.replace(plan, cases=(dataclasses.replace(case, images=images),))


@pytest.mark.parametrize("shards", [(2, 9, 12), (4, 3, 12), (4, 6, 4), (12, 3, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", ["t1", "seg", "where"])
def test_volumes_of_many_shards_and_tiled_planes_are_stored_whole(
    source: Path, store: Path, shards: tuple[int, ...], name: str
) -> None:
    save(source / "sub" / f"{name}.nii.gz", volume(11, 9, 12, dtype=np.float32))
    plan = plan_of(source, sampling_patterns=("where",))
    report = run_conversion(with_layout(plan, Layout((2, 3, 4), shards)), store)
    np.testing.assert_array_equal(only_image(store).data[0], volume(11, 9, 12))
    assert sum(key.startswith("0/c/") for key in only(report).files) > 1
    assert zp.verify(store).ok


def test_progress_adds_up_to_the_bytes_of_all_voxels(source: Path, store: Path) -> None:
    save(source / "a.nii", volume(9, 8, 7))
    save(source / "b.nii", volume(4, 5, 6, dtype=np.uint8))
    plan, amounts = plan_of(source), []
    run_conversion(plan, store, progress=amounts.append)
    assert sum(amounts) == plan.voxel_bytes == 9 * 8 * 7 * 2 + 4 * 5 * 6


def test_a_manifest_line_carries_the_fingerprint_of_its_source(source: Path, store: Path) -> None:
    path = save(source / "sub" / "t1.nii.gz", volume(4, 5, 6))
    zp.convert(source, store)
    values = [unsealed(line, "") for line in (store / MANIFEST).read_bytes().splitlines()]
    [line] = [value for value in values if "image" in value]
    assert line["source"] == {
        "path": "sub/t1.nii.gz",
        "bytes": path.stat().st_size,
        "mtime_ns": path.stat().st_mtime_ns,
        "checksum": fingerprint(path, path.parent).checksum,
    }


def test_two_conversions_of_the_same_files_give_the_same_bytes(
    cohort_source: Path, cohort_store: Path, store: Path
) -> None:
    zp.convert(cohort_source, store, chunk=16)
    files = {f.relative_to(store) for f in store.rglob("*") if f.is_file() and f.name != ".lock"}
    assert files == {
        f.relative_to(cohort_store) for f in cohort_store.rglob("*") if f.is_file() and f.name != ".lock"
    }
    timed = {Path(name) for name in ("zarr.json", MANIFEST, MANIFEST_TABLE)}  # of the conversion
    for file in files - timed:
        assert (store / file).read_bytes() == (cohort_store / file).read_bytes(), file


def test_the_root_document_names_the_version_and_the_source(cohort_source: Path, cohort_store: Path) -> None:
    attributes = json.loads((cohort_store / "zarr.json").read_text())["attributes"]["zpatch"]
    assert attributes["format"] == 1
    assert attributes["tool"] == f"zpatch {zp.__version__}"
    assert attributes["source"] == str(cohort_source)


def test_warnings_of_a_file_are_kept_with_its_image(source: Path, store: Path) -> None:
    path = save(source / "sub.nii", volume(4, 5, 6))
    path.write_bytes(path.read_bytes() + b"123")
    assert only(zp.convert(source, store)).warnings == ("3 trailing bytes after the last voxel",)
    assert only_image(store).record.warnings == ("3 trailing bytes after the last voxel",)


def test_trailing_bytes_in_gzip_data_are_a_warning(source: Path, store: Path) -> None:
    path = save(source / "sub.nii", volume(4, 5, 6))
    path.with_suffix(".nii.gz").write_bytes(gzip.compress(path.read_bytes() + b"123"))
    path.unlink()
    assert any("trailing bytes" in warning for warning in only(zp.convert(source, store)).warnings)


def test_a_report_is_plain_json(source: Path, store: Path) -> None:
    save(source / "a" / "t1.nii", volume(4, 5, 6))
    not_nifti(save(source / "b" / "t1.nii", volume(1, 1, 1)))
    report = json.loads(json.dumps(zp.convert(source, store).to_json()))
    assert (report["store"], report["already_there"]) == (str(store), [])
    cases = {case["subject"]: case for case in report["cases"]}
    assert {subject: case["status"] for subject, case in cases.items()} == {"a": "converted", "b": "failed"}
    [image] = cases["a"]["images"]
    assert (image["image"], image["voxel_bytes"]) == ("t1", 240)
    assert image["stored_bytes"] == zp.Cohort(store)[0].t1.record.stored_bytes
    assert "it is not a NIfTI file" in cases["b"]["reason"]


def test_a_source_without_a_good_case_leaves_an_existing_store_unchanged(source: Path, store: Path) -> None:
    path = save(source / "sub" / "t1.nii.gz", volume(4, 5, 6))
    zp.convert(source, store)
    not_nifti(path)
    with pytest.raises(SourceError):
        zp.convert(source, store, overwrite=True)
    np.testing.assert_array_equal(only_image(store).data[0], volume(4, 5, 6))


@pytest.mark.parametrize("stage", ["volume_files.formats.read_header", "conversion.case_staging.label_dtype"])
def test_an_unexpected_error_fails_its_case_only(
    stage: str, source: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subject in ("a", "b"):
        save(source / subject / "seg.nii", volume(4, 5, 6).astype(np.uint8))
    right = label_dtype if stage.endswith("label_dtype") else formats.read_header

    def odd(file: Any, *rest: Any, **options: Any) -> Any:
        if "b" in getattr(file, "path", file).parts:
            raise ZeroDivisionError("odd")
        return right(file, *rest, **options)

    monkeypatch.setattr(f"zpatch.{stage}", odd)
    report = zp.convert(source, store)
    assert [record.subject for record in report.records] == ["a"]
    [failure] = report.failures
    assert failure.reason.startswith(f"{source / 'b' / 'seg.nii'}: unexpected ZeroDivisionError: odd; leave")


def test_an_interrupted_commit_leaves_nothing_of_its_subject(
    cohort_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = store_writer.append_lines
    entered: list[str] = []

    def interrupted(path: Path, *lines: Any) -> None:
        entered.extend(line["document"] for line in lines if "document" in line)
        if len(set(entered)) == 3:  # that of the store, and those of two subjects
            raise KeyboardInterrupt
        written(path, *lines)

    monkeypatch.setattr(store_writer, "append_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zp.convert(cohort_source, tmp_path / "a.zarr")
    report = zp.verify(tmp_path / "a.zarr")
    assert (report.damages, report.leftovers) == ((), ())
    monkeypatch.undo()
    zp.convert(cohort_source, tmp_path / "a.zarr")
    assert zp.verify(tmp_path / "a.zarr").ok


def test_a_label_map_of_another_orientation_on_the_same_grid_converts_with_orient(tmp_path: Path) -> None:
    volume = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    image = nib.Nifti1Image(volume, np.diag([1.0, 2.0, 3.0, 1.0]))
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt("PIR")
        )
    )
    (tmp_path / "a").mkdir()
    turned.to_filename(tmp_path / "a" / "t1.nii")
    nib.Nifti1Image(volume.astype(np.uint8), image.affine).to_filename(tmp_path / "a" / "seg.nii")
    with pytest.raises(SourceError, match=r"its shape .* is not that of"):
        zp.convert(tmp_path, tmp_path / "plain")
    zp.convert(tmp_path, tmp_path / "store", orient="LPS")
    [subject] = zp.Cohort(tmp_path / "store")
    np.testing.assert_array_equal(subject.t1.data, subject.seg.data)
    np.testing.assert_allclose(subject.t1.affine, subject.seg.affine)
