"""A store: other libraries read it, its manifest decides what exists, and one process writes it at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import forked
import nibabel as nib
import numpy as np
import pytest
import zarr

import zpatch as zp
from zpatch.digests import sealed_line, unsealed
from zpatch.errors import (
    DamageError,
    NotAStoreError,
    StoreError,
    StoreExistsError,
    StoreLockedError,
)
from zpatch.records.names import MANIFEST, MANIFEST_TABLE
from zpatch.store.store import open_store
from zpatch.store.store_writer import StoreWriter


@pytest.fixture
def copy(cohort_store: Path, tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))


def source_of(folder: Path, value: int = 1) -> Path:
    """A folder with one subject of one small image."""
    (folder / "sub-01").mkdir(parents=True, exist_ok=True)
    voxels = np.full((4, 5, 6), value, np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(folder / "sub-01" / "t1.nii")
    return folder


def images_of(path: Path) -> Iterator[tuple[Path, zp.Image]]:
    """The folder of each image, and the image."""
    for subject in zp.Cohort(path):
        for name, image in subject.images.items():
            yield path / subject.name / name, image


def stored_order(image: zp.Image) -> Any:
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape), scaled=False)[0].T


def test_zarr_reads_the_same_voxels_under_names_of_dimensions(cohort_store: Path) -> None:
    root = zarr.open(cohort_store, mode="r")
    for folder, image in images_of(cohort_store):
        array = root[folder.relative_to(cohort_store).as_posix()]["0"]
        assert array.metadata.dimension_names == ("z", "y", "x")
        np.testing.assert_array_equal(array[:], stored_order(image))


def test_dask_reads_the_same_voxels(cohort_store: Path) -> None:
    for folder, image in images_of(cohort_store):
        np.testing.assert_array_equal(da.from_zarr(str(folder / "0")).compute(), stored_order(image))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_ome_zarr_py_reads_the_same_voxels_axes_and_scale(cohort_store: Path) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    for folder, image in images_of(cohort_store):
        [node] = Reader(parse_url(folder))()
        np.testing.assert_array_equal(node.data[0].compute(), stored_order(image))
        axes = [(axis["name"], axis["type"], axis["unit"]) for axis in node.metadata["axes"]]
        assert axes == [(name, "space", "millimeter") for name in "zyx"]
        [[scale, translation]] = node.metadata["coordinateTransformations"]
        np.testing.assert_allclose(scale["scale"], image.spacing[::-1])
        np.testing.assert_allclose(translation["translation"], image.affine[2::-1, 3])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_image_is_valid_ome_zarr_0_5(cohort_store: Path) -> None:
    models = pytest.importorskip("ome_zarr_models.v05")
    for folder, image in images_of(cohort_store):
        model = models.Image.from_zarr(zarr.open_group(folder, mode="r"))
        assert model.ome_attributes.version == "0.5"
        assert model.ome_attributes.multiscales[0].name == image.record.image


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("time_unit", "axes"), [("sec", "tzyx"), ("unknown", "czyx")])
def test_an_image_over_time_or_of_channels_is_valid_ome_zarr(
    tmp_path: Path, time_unit: str, axes: str
) -> None:
    models = pytest.importorskip("ome_zarr_models.v05")
    image = nib.Nifti1Image(np.zeros((2, 3, 4, 5), np.uint8), np.eye(4))
    image.header.set_xyzt_units("unknown", time_unit)
    (tmp_path / "source").mkdir()
    image.to_filename(tmp_path / "source" / "series.nii")
    zp.convert(tmp_path / "source", tmp_path / "store")
    group = zarr.open_group(tmp_path / "store" / "series" / "image", mode="r")
    multiscale = models.Image.from_zarr(group).ome_attributes.multiscales[0]
    assert [axis.name for axis in multiscale.axes] == list(axes)
    assert group["0"].metadata.dimension_names == tuple(axes)


def test_the_raw_header_is_an_array_that_nifti_zarr_finds(cohort_source: Path, cohort_store: Path) -> None:
    for folder, image in images_of(cohort_store):
        raw = zarr.open_array(folder / "nifti", mode="r")[:]
        assert raw.dtype == np.uint8
        assert image.record.source is not None
        source = gzip.decompress((cohort_source / image.record.source.path).read_bytes())
        assert raw.tobytes() == source[:352]


def test_the_manifest_has_a_line_for_each_image_and_each_document(cohort_store: Path) -> None:
    lines = (cohort_store / MANIFEST).read_bytes().splitlines()
    values = [unsealed(line, "line") for line in lines]
    images = [(v["subject"], v["image"]) for v in values if "image" in v]
    documents = [v["document"] for v in values if "document" in v]
    assert images == list(open_store(cohort_store).records)
    assert documents == ["zarr.json", *(f"{name}/zarr.json" for name in zp.Cohort(cohort_store).names)]


def test_a_record_covers_every_file_of_its_image(cohort_store: Path) -> None:
    for folder, image in images_of(cohort_store):
        files = {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
        assert {key: seal.bytes for key, seal in image.record.files.items()} == files
        assert image.record.stored_bytes == sum(files.values())


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_an_incomplete_last_line_is_ignored(copy: Path, kept: int) -> None:
    before = open_store(copy).records
    manifest = copy / MANIFEST
    whole, last = manifest.read_bytes()[:-1].rsplit(b"\n", 1)
    manifest.write_bytes(whole + b"\n" + last[:kept])
    assert list(open_store(copy).records) == list(before)[:-1]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"{}",
        b"[]",
        b"3",
        b"null",
        b'"check"',
        b'{"check": "00", "a": NaN}',
        b'{"check": "00"}',
        b"\xff\xfe",
        b"\x00",
        b'{"check": null, "document": "zarr.json"}',
        sealed_line({"subject": "a"}).encode(),
        sealed_line({"image": "b"}).encode(),
        sealed_line({"document": "zarr.json"}).encode(),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(copy: Path, line: bytes) -> None:
    lines = (copy / MANIFEST).read_bytes().split(b"\n")
    lines[2] = line or b" "
    (copy / MANIFEST).write_bytes(b"\n".join(lines))
    with pytest.raises(DamageError, match=r"manifest.jsonl, line 3 "):
        open_store(copy)


def test_a_bit_flip_in_the_manifest_is_an_error_that_names_the_line(
    copy: Path, rng: np.random.Generator, full: bool
) -> None:
    data = (copy / MANIFEST).read_bytes()
    for position in rng.integers(0, len(data) - 1, 1000 if full else 100).tolist():
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        (copy / MANIFEST).write_bytes(damaged)
        with pytest.raises(DamageError, match=r"manifest.jsonl, line \d+ "):
            open_store(copy)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"subject": "../elsewhere"}, "'../elsewhere' is not usable"),
        ({"codec": "pickle"}, "codec must be one of"),
        ({"dtype": "O"}, "dtype 'O'"),
        ({"kind": "cat"}, "kind 'cat'"),
        ({"shape": [0, 4, 4]}, "a shape of"),
        ({"chunks": [16, 16]}, "a shape of"),
        ({"shards": [17, 16, 16]}, "are not whole chunks"),
        ({"axes": "zy"}, "axes 'zy'"),
        ({"colour": "blue"}, "colour"),
        ({"files": [1]}, "no attribute 'items'"),
    ],
)
def test_an_invalid_record_is_damage_when_it_is_accessed(
    copy: Path, change: dict[str, Any], why: str
) -> None:
    lines = (copy / MANIFEST).read_bytes().splitlines()
    number = next(n for n, line in enumerate(lines) if b'"image"' in line)
    value = {**unsealed(lines[number], ""), **change}
    lines[number] = sealed_line(value).encode()
    (copy / MANIFEST).write_bytes(b"\n".join(lines) + b"\n")
    records = open_store(copy).records
    for key in set(records) - {(value["subject"], value["image"])}:
        assert records[key].subject == key[0]
    damage = f"manifest.jsonl, line {number + 1} .*{why}"
    with pytest.raises(DamageError, match=damage):
        records[value["subject"], value["image"]]
    with pytest.raises(DamageError, match=damage):
        list(records.values())


def test_the_last_line_of_an_image_wins(copy: Path) -> None:
    key, record = next(iter(open_store(copy).records.items()))
    with (copy / MANIFEST).open("a") as manifest:
        manifest.write(sealed_line(dataclasses.replace(record, split="test").to_json()) + "\n")
    records = open_store(copy).records
    assert records[key].split == "test"
    assert len(records) == 8


def test_a_store_of_a_newer_format_is_refused(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["zpatch"]["format"] = 2
    (copy / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match=r"copy.zarr: it is a store of format 2.*up to 1.*newer zpatch"):
        open_store(copy)


def plain_group(path: Path) -> None:
    zarr.open_group(path, mode="w")


def plain_array(path: Path) -> None:
    zarr.create_array(path, shape=(2,), dtype="u1")


def folder_of_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").touch()


def document_that_is_no_text(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_bytes(b"\xff\xfe\x00")


def document_that_is_no_json(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "it does not exist; make one with 'zpatch convert SOURCE STORE'"),
        (Path.touch, r"it cannot be opened \(Not a directory\)"),
        (Path.mkdir, r"it is no zpatch store \(no zarr.json\); make one with"),
        (folder_of_files, r"it is no zpatch store \(no zarr.json\); make one with"),
        (plain_group, "it is Zarr but no zpatch store"),
        (plain_array, "it is Zarr but no zpatch store"),
        (document_that_is_no_json, "no zpatch store"),
        (document_that_is_no_text, "no zpatch store"),
    ],
)
def test_a_path_that_is_not_a_store_is_refused_by_its_name(tmp_path: Path, make: Any, why: str) -> None:
    make(tmp_path / "thing")
    with pytest.raises(NotAStoreError, match=f"thing: .*{why}"):
        zp.Cohort(tmp_path / "thing")


def test_an_existing_store_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    store = tmp_path / "store"
    zp.convert(source_of(tmp_path / "source", 1), store)
    with pytest.raises(StoreExistsError, match="store: it exists already; say overwrite=True"):
        StoreWriter.create(store, {})
    assert (zp.Cohort(store)[0].t1.data == 1).all()
    StoreWriter.create(store, {}, overwrite=True).__exit__()
    assert len(zp.Cohort(store)) == 0


def test_a_conversion_into_an_existing_store_resumes_it_unless_overwrite_is_set(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    zp.convert(source_of(tmp_path / "source", 1), store)
    created = open_store(store).attributes["created"]
    (tmp_path / "source" / "sub-01").rename(tmp_path / "source" / "sub-02")
    zp.convert(tmp_path / "source", store)
    assert zp.Cohort(store).names == ["sub-01", "sub-02"]
    assert open_store(store).attributes["created"] == created
    zp.convert(tmp_path / "source", store, overwrite=True)
    assert zp.Cohort(store).names == ["sub-02"]


def test_a_conversion_never_resumes_a_store_of_predictions(tmp_path: Path) -> None:
    predictions = tmp_path / "predictions"
    with StoreWriter.create(predictions, {"tool": "zpatch predict", "prediction": {"image": "t1"}}):
        pass
    before = (predictions / MANIFEST).read_bytes()
    with pytest.raises(StoreExistsError, match=r"predictions: it holds predictions; .*choose another name"):
        zp.convert(source_of(tmp_path / "source"), predictions)
    assert (predictions / MANIFEST).read_bytes() == before
    zp.convert(tmp_path / "source", predictions, overwrite=True)
    assert zp.Cohort(predictions).names == ["sub-01"]


def test_a_replaced_store_holds_nothing_of_the_older_one(tmp_path: Path, cohort_store: Path) -> None:
    store = Path(shutil.copytree(cohort_store, tmp_path / "store"))
    zp.convert(source_of(tmp_path / "source"), store, overwrite=True)
    assert zp.Cohort(store).names == ["sub-01"]
    assert {entry.name for entry in store.iterdir()} <= {
        "zarr.json",
        MANIFEST,
        MANIFEST_TABLE,
        "sub-01",
        ".lock",
    }
    assert zp.verify(store).ok


def test_a_store_replaced_under_another_spelling_of_its_path_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zp.convert(source_of(tmp_path / "source", 1), tmp_path / "store")
    assert (zp.Cohort(tmp_path / "store")[0].t1.data == 1).all()
    monkeypatch.chdir(tmp_path)
    zp.convert(source_of(tmp_path / "source", 2), "store", overwrite=True)
    assert (zp.Cohort(tmp_path / "store")[0].t1.data == 2).all()


def test_a_store_replaced_by_another_process_is_read_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    zp.convert(source_of(tmp_path / "source", 1), store)
    assert (zp.Cohort(store)[0].t1.data == 1).all()
    program = "import sys, zpatch; zpatch.convert(*sys.argv[1:], overwrite=True)"
    source_of(tmp_path / "source", 2)
    assert forked.run(program, tmp_path / "source", store).returncode == 0
    assert (zp.Cohort(store)[0].t1.data == 2).all()


@pytest.mark.parametrize("make", [Path.touch, folder_of_files, plain_group, plain_array])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_is_not_a_store_is_never_overwritten(tmp_path: Path, make: Any, overwrite: bool) -> None:
    make(tmp_path / "precious")
    before = sorted((tmp_path / "precious").rglob("*"))
    with pytest.raises(StoreExistsError, match="precious: it exists and is no zpatch store; choose another"):
        zp.convert(source_of(tmp_path / "source"), tmp_path / "precious", overwrite=overwrite)
    assert sorted((tmp_path / "precious").rglob("*")) == before


def test_an_empty_folder_may_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    zp.convert(source_of(tmp_path / "source"), tmp_path / "store")
    assert len(zp.Cohort(tmp_path / "store")) == 1


def test_a_path_where_no_folder_can_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/store: it cannot be made"):
        StoreWriter.create(tmp_path / "file" / "store", {})


WRITER = """
import sys
from pathlib import Path
from zpatch.store.store_writer import StoreWriter
with StoreWriter.create(Path(sys.argv[1]), {}):
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_the_error_of_a_second_writer_names_the_first(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with forked.start(WRITER, store) as other:
        assert other.read_line() == "writing\n"
        host = os.uname().nodename
        with pytest.raises(StoreLockedError, match=rf"store: process {other.pid} on {host} is writing to it"):
            zp.convert(source_of(tmp_path / "source"), store, overwrite=True)
        assert len(zp.Cohort(store)) == 0
        other.communicate()
    zp.convert(tmp_path / "source", store, overwrite=True)
    assert len(zp.Cohort(store)) == 1


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with (
        StoreWriter.create(tmp_path / "store", {}),
        pytest.raises(StoreLockedError, match=f"process {os.getpid()}"),
    ):
        StoreWriter.create(tmp_path / "store", {}, overwrite=True)


def test_staging_is_removed_after_a_conversion(cohort_store: Path) -> None:
    assert not (cohort_store / ".staging").exists()
    assert not [f for f in cohort_store.rglob("*") if f.name.endswith(".partial")]


def test_staging_is_removed_after_a_writer_fails_and_its_images_do_not_exist(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), StoreWriter.create(tmp_path / "store", {}) as writer:
        writer.stage().write_raw_header(b"abc")
        raise RuntimeError
    assert not (tmp_path / "store" / ".staging").exists()
    assert len(zp.Cohort(tmp_path / "store")) == 0


def test_an_image_without_a_line_does_not_exist(copy: Path) -> None:
    lines = (copy / MANIFEST).read_text().splitlines(keepends=True)
    (copy / MANIFEST).write_text("".join(lines[:-1]))
    assert len(open_store(copy).records) == 7


def test_a_missing_shard_is_an_error_and_never_a_fill_value(copy: Path) -> None:
    image = zp.Cohort(copy)[0].t1
    [shard] = [key for key in image.record.files if key.startswith("0/c/")]
    (image.folder / shard).unlink()
    with pytest.raises(DamageError, match="it is missing; run 'zpatch verify "):
        image.read(zp.PatchLocation((0, 0, 0), (1, 1, 1)))


def delete(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


every_damage = pytest.mark.parametrize("damage", [delete, cut, flip])


@every_damage
def test_a_damaged_raw_header_is_never_exported(copy: Path, tmp_path: Path, damage: Any) -> None:
    damage(copy / "sub-01" / "seg" / "nifti" / "c" / "0")
    with pytest.raises(DamageError, match=r"sub-01/seg/nifti.*run 'zpatch verify'"):
        zp.export(copy, tmp_path / "out.nii", include=["sub-01"], images=["seg"])


@every_damage
@pytest.mark.parametrize("name", ["values", "row_start", "chunk_id", "count"])
def test_a_damaged_label_index_is_never_drawn_from(copy: Path, damage: Any, name: str) -> None:
    damage(copy / "sub-01" / "seg" / "index" / name / "c" / "0")
    with pytest.raises(DamageError, match=f"sub-01/seg/index/{name}.*run 'zpatch verify'"):
        zp.LabelSampler(4).locations(zp.Cohort(copy)["sub-01"], 5, rng=0)


def test_a_missing_index_is_an_error_that_names_it(copy: Path) -> None:
    shutil.rmtree(copy / "sub-01" / "seg" / "index")
    with pytest.raises(DamageError, match=r"sub-01/seg/index/values cannot be read .*run 'zpatch verify'"):
        zp.LabelSampler(4).locations(zp.Cohort(copy)["sub-01"], 5, rng=0)
