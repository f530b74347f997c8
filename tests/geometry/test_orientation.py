"""Volumes turned when they are converted; nibabel is the oracle for the position of every voxel."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zpatch as zp
from zpatch.conversion import conversion_options
from zpatch.errors import OptionError
from zpatch.geometry.orientation import Orientation, orientation_to

CODES = [
    "".join(letters)
    for axes in itertools.permutations(["RL", "AP", "SI"])
    for letters in itertools.product(*axes)
]
AFFINE = np.array([[1.0, 0, 0, 5], [0, 2, 0, -6], [0, 0, 3, 7], [0, 0, 0, 1]])

turns = st.builds(
    Orientation, st.permutations(range(3)).map(tuple), st.tuples(*(st.booleans() for _ in range(3)))
)
shapes = st.tuples(*(st.integers(1, 6) for _ in range(3)))


def as_stored(volume: np.ndarray) -> np.ndarray:
    return volume.transpose(2, 1, 0)[None]


@given(turns, shapes)
def test_turning_back_restores_the_file(turn: Orientation, shape: tuple[int, int, int]) -> None:
    voxels = as_stored(np.arange(np.prod(shape)).reshape(shape))
    turned = turn.turn(voxels)
    assert turned.shape[:0:-1] == turn.shape(shape)
    np.testing.assert_array_equal(turn.turn_back(turned), voxels)


@given(turns, shapes)
def test_every_voxel_keeps_its_world_position(turn: Orientation, shape: tuple[int, int, int]) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    turned = turn.turn(as_stored(numbers))[0].transpose(2, 1, 0)
    affine = turn.affine(AFFINE, shape)
    for index in np.ndindex(*turned.shape):
        origin = np.argwhere(numbers == turned[index])[0]
        np.testing.assert_allclose(affine @ [*index, 1], AFFINE @ [*origin, 1])


@pytest.mark.parametrize("codes", CODES)
def test_codes_have_the_meaning_that_nibabel_gives_them(codes: str) -> None:
    turn = orientation_to(AFFINE, codes)
    assert "".join(nib.aff2axcodes(turn.affine(AFFINE, (4, 5, 6)))) == codes


@pytest.mark.parametrize("codes", ["", "RA", "RAX", "RRA", "ras", "RASL"])
def test_unknown_codes_are_refused(codes: str, cohort_source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"orient must be three letters as RAS, LPS or PIR, not '{codes}'"):
        zp.convert(cohort_source, tmp_path / "a.zarr", orient=codes)
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA", "IRP", "AIL"])
def test_a_turned_store_is_nibabel_s_canonical_image_and_exports_the_original(
    codes: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_options, "SHARD_BYTES", 1)
    source = nib.Nifti1Image(rng.integers(0, 1000, (21, 19, 43)).astype(np.int16), AFFINE)
    ornt = nib.orientations.ornt_transform(
        nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(codes))
    )
    nib.save(source.as_reoriented(ornt), tmp_path / "turned.nii.gz")
    zp.convert(tmp_path, tmp_path / "a.zarr", orient="RAS", chunk=8)
    image = zp.Cohort(tmp_path / "a.zarr")["turned"].image
    assert len(list((tmp_path / "a.zarr/turned/image/0").rglob("c/*/*/*"))) >= 3
    np.testing.assert_array_equal(image.data[0], source.get_fdata())
    np.testing.assert_allclose(image.affine, AFFINE)
    [exported] = zp.export(tmp_path / "a.zarr", tmp_path / "out")
    assert gzip.decompress(exported.read_bytes()) == gzip.decompress(
        (tmp_path / "turned.nii.gz").read_bytes()
    )
    assert zp.verify(tmp_path / "a.zarr").ok


def test_predictions_of_turned_images_have_the_affine_of_the_turned_image(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.arange(720, dtype=np.float32).reshape(8, 9, 10), AFFINE), tmp_path / "a.nii")
    zp.convert(tmp_path, tmp_path / "a.zarr", orient="PIR")
    cohort = zp.Cohort(tmp_path / "a.zarr")
    found = zp.predict(lambda batch: batch, cohort, tmp_path / "p.zarr", image="image", patch_size=4)
    [exported] = zp.export(tmp_path / "p.zarr", tmp_path / "out")
    np.testing.assert_allclose(found[0].prediction.affine, cohort[0].image.affine)
    np.testing.assert_allclose(nib.load(exported).affine, cohort[0].image.affine)
