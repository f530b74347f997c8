"""zpatch in MONAI's pipelines, and MONAI's networks in zpatch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.compat.monai import ZpatchPatchIterd, ZpatchReader, datalist
from zpatch.errors import OptionError, PatchLocationError
from zpatch.geometry.affines import crop_affine

PATCH_SIZE = 16

data = pytest.importorskip("monai.data", reason="MONAI is not installed")
transforms = pytest.importorskip("monai.transforms")


def files_of(folder: Path, subject: str) -> dict[str, str]:
    """The NIfTI files that a subject was converted from."""
    return {path.name.split(".")[0]: str(path) for path in sorted((folder / subject).iterdir())}


# The reader


@pytest.mark.parametrize("reader", [ZpatchReader, "zpatch.compat.monai.ZpatchReader"])
def test_an_image_of_a_store_loads_as_its_nifti_file_does(
    cohort: zp.Cohort, cohort_source: Path, reader: Any
) -> None:
    keys = ["t1", "seg"]
    for name, item in zip(cohort.names, datalist(cohort), strict=True):
        found = transforms.LoadImaged(keys, reader=reader, ensure_channel_first=True)(item)
        wanted = transforms.LoadImaged(keys, ensure_channel_first=True)(files_of(cohort_source, name))
        for key in keys:
            assert found[key].dtype == wanted[key].dtype == torch.float32
            torch.testing.assert_close(found[key].as_tensor(), wanted[key].as_tensor(), rtol=1e-6, atol=0)
            np.testing.assert_allclose(found[key].affine, wanted[key].affine, atol=1e-5)
            assert list(found[key].meta["spatial_shape"]) == list(wanted[key].meta["spatial_shape"])
            assert found[key].meta["space"] == wanted[key].meta["space"]
            assert found[key].meta["filename_or_obj"] == item[key]


def test_without_a_channel_axis_an_image_loads_as_its_nifti_file_does(
    cohort: zp.Cohort, cohort_source: Path
) -> None:
    path = datalist(cohort)[0]["t1"]
    found = transforms.LoadImage(reader=ZpatchReader())(path)
    assert found.shape == cohort[0].t1.spatial_shape
    explicit = transforms.EnsureChannelFirst(channel_dim="no_channel")(found)
    assert explicit.shape == cohort[0].t1.shape
    torch.testing.assert_close(explicit.as_tensor(), torch.from_numpy(cohort[0].t1.data).float())


def test_a_pipeline_of_monai_runs_on_loaded_images(cohort: zp.Cohort, cohort_source: Path) -> None:
    def steps(reader: Any) -> Any:
        return transforms.Compose(
            [
                transforms.LoadImaged(["t1", "seg"], reader=reader),
                transforms.EnsureChannelFirstd(["t1", "seg"]),
                transforms.Orientationd(["t1", "seg"], "LPS", labels=None),
                transforms.Spacingd(["t1", "seg"], pixdim=5, mode=["bilinear", "nearest"]),
                transforms.ScaleIntensityd("t1"),
            ]
        )

    found = steps(ZpatchReader)(datalist(cohort)[1])
    wanted = steps(None)(files_of(cohort_source, cohort.names[1]))
    for key in ("t1", "seg"):
        assert found[key].shape == wanted[key].shape
        torch.testing.assert_close(found[key].as_tensor(), wanted[key].as_tensor(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[key].affine, wanted[key].affine, atol=1e-4)


def test_a_box_is_read_alone_and_keeps_its_position(cohort: zp.Cohort) -> None:
    reader, image = ZpatchReader(), cohort[0].t1
    voxels, meta = reader.get_data(reader.read(datalist(cohort)[0]["t1"]), location=(3, 4, 5), size=(6, 7, 8))
    np.testing.assert_array_equal(voxels, image.data[0, 3:9, 4:11, 5:13])
    np.testing.assert_allclose(meta["affine"], crop_affine(image.affine, (3, 4, 5)))
    tensor = data.MetaTensor(voxels[None], meta={**meta, "original_channel_dim": 0})
    np.testing.assert_allclose(tensor.affine, crop_affine(image.affine, (3, 4, 5)))
    rest, _ = reader.get_data(image, location=(3, 4, 5))
    np.testing.assert_array_equal(rest, image.data[0, 3:, 4:, 5:])
    with pytest.raises(PatchLocationError, match="is not inside"):
        reader.get_data(image, location=(0, 0, 0), size=1000)


def test_images_read_together_are_channels_of_one(cohort: zp.Cohort) -> None:
    item = datalist(cohort)[0]
    both = transforms.LoadImage(reader=ZpatchReader, ensure_channel_first=True)([item["t1"], item["seg"]])
    expected = np.concatenate([cohort[0].t1.data, cohort[0].seg.data])
    np.testing.assert_array_equal(both.numpy(), expected.astype(np.float32))
    reader = ZpatchReader()
    with pytest.raises(OptionError, match="differ in shape or affine"):
        reader.get_data(reader.read([item["t1"], datalist(cohort)[1]["t1"]]))


def test_opening_an_image_reads_no_voxels(cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    from zpatch.compat import monai

    monkeypatch.setattr(monai, "read_group", lambda *_: pytest.fail("voxels were read"))
    assert ZpatchReader().read(datalist(cohort)[0]["t1"]).shape == cohort[0].t1.shape


def test_a_reader_is_asked_about_its_own_paths_only(cohort: zp.Cohort) -> None:
    reader = ZpatchReader()
    assert reader.verify_suffix(datalist(cohort)[0]["t1"])
    assert reader.verify_suffix(["a.zarr/sub-01/t1", Path("b.ome.zarr")])
    assert not reader.verify_suffix(["a.zarr/sub-01/t1", "t1.nii.gz"])
    assert isinstance(reader, data.ImageReader)


def test_images_that_are_in_no_store_cannot_be_listed(cohort: zp.Cohort) -> None:
    subject = cohort[0].with_images(mask=zp.LabelMap(np.zeros(cohort[0].spatial_shape, np.uint8)))
    with pytest.raises(OptionError, match="mask of subject 'sub-01' is in no store and has no path"):
        datalist([subject])


# Patches


def test_grid_patches_are_read_from_disk_with_their_coordinates(cohort: zp.Cohort) -> None:
    iterator = ZpatchPatchIterd(["t1", "seg"], PATCH_SIZE, 4)
    subject = cohort[0]
    found = list(data.GridPatchDataset([{**datalist(cohort)[0], "age": 41}], iterator))
    grid = zp.GridSampler(subject, PATCH_SIZE, 4)
    assert len(found) == len(grid)
    for (patch, coordinates), wanted in zip(found, grid, strict=True):
        assert torch.equal(patch["t1"].as_tensor(), wanted.t1.data)
        assert torch.equal(patch["seg"].as_tensor(), wanted.seg.data)
        np.testing.assert_allclose(patch["t1"].affine, wanted.t1.affine)
        box = zip(wanted.location.index_ini, wanted.location.index_fin, strict=True)
        assert coordinates.tolist() == [[0, 1], *map(list, box)] == patch["patch_coords"].tolist()
        assert patch["age"] == 41
        assert patch["original_spatial_shape"].tolist() == list(subject.spatial_shape)


def test_grid_patches_pass_through_transforms_and_a_loader_of_monai(cohort: zp.Cohort) -> None:
    dataset = data.GridPatchDataset(
        datalist(cohort)[:2],
        ZpatchPatchIterd("t1", PATCH_SIZE, padding_mode="reflect"),
        transform=transforms.ScaleIntensityd("t1"),
    )
    batches = list(data.DataLoader(dataset, batch_size=7, num_workers=2))
    count = sum(len(zp.GridSampler(cohort[n], PATCH_SIZE, 0, "reflect")) for n in range(2))
    assert sum(len(batch["t1"]) for batch, _ in batches) == count
    for batch, coordinates in batches:
        assert batch["t1"].shape[1:] == (1, PATCH_SIZE, PATCH_SIZE, PATCH_SIZE)
        assert coordinates.shape[1:] == (4, 2)
        assert batch["t1"].max() <= 1


# Networks


UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": "@classes",
    "channels": [4, 8],
    "strides": [2],
}


def test_a_network_of_monai_predicts(cohort: zp.Cohort, tmp_path: Path) -> None:
    networks = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    network = networks.UNet(3, in_channels=1, out_channels=3, channels=(4, 8), strides=(2,)).eval()
    predicted = zp.predict(
        network, cohort[:1], tmp_path / "p.zarr", image="t1", patch_size=PATCH_SIZE, patch_overlap=8
    )
    grid = zp.GridSampler(cohort[0], PATCH_SIZE, 8)
    aggregator = zp.PatchAggregator(cohort[0].spatial_shape, "hann", grid=grid)
    with torch.no_grad():
        for batch in zp.SubjectsLoader(grid, 4):
            aggregator.add_batch(network(batch.t1.data.float()), batch.patch_location)
    found = torch.from_numpy(predicted[0].prediction.data)
    torch.testing.assert_close(found, aggregator.get_output(), rtol=1e-4, atol=1e-4)


def test_the_network_of_a_bundle_predicts(cohort: zp.Cohort, tmp_path: Path) -> None:
    bundle = pytest.importorskip("monai.bundle")
    config = tmp_path / "bundle" / "configs" / "inference.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"classes": 4, "network_def": UNET}))
    parser = bundle.ConfigParser()
    parser.read_config(str(config))
    network = parser.get_parsed_content("network_def").eval()
    predicted = zp.predict(
        network, cohort[:1], tmp_path / "p.zarr", image="t1", patch_size=PATCH_SIZE, reduce="argmax"
    )
    labels = predicted[0].prediction
    assert labels.spatial_shape == cohort[0].spatial_shape
    assert set(np.unique(labels.data)) <= set(range(4))
    zp.export(predicted.store.path, tmp_path / "nifti")
    [file] = (tmp_path / "nifti").rglob("*.nii.gz")
    np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), labels.data[0])
