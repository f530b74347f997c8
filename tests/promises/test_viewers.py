"""Other libraries and viewers open stores and predictions, and read the same voxels.

Each runs in a separate process: some of them do not survive a fork, and none should affect other tests.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import zpatch as zp

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# look(folder) returns the stored voxels, and the axes, scale and translation as far as the library has them.
LOOKS = {
    "ome_zarr": """
def look(folder):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader
    [node] = Reader(parse_url(folder))()
    [[scale, translation], *_] = node.metadata["coordinateTransformations"]
    axes = [axis["name"] for axis in node.metadata["axes"]]
    return node.data, dict(axes=axes, scale=scale["scale"], translation=translation["translation"])
""",
    "ome_zarr_models": """
def look(folder):
    import zarr
    from ome_zarr_models.v05 import Image
    group = zarr.open_group(folder, mode="r")
    [multiscale] = Image.from_zarr(group).ome_attributes.multiscales
    first = multiscale.datasets[0].coordinateTransformations
    axes = [axis.name for axis in multiscale.axes]
    levels = [group[dataset.path] for dataset in multiscale.datasets]
    return levels, dict(axes=axes, scale=first[0].scale, translation=first[1].translation)
""",
    "ngff_zarr": """
def look(folder):
    from ngff_zarr import from_ngff_zarr
    images = from_ngff_zarr(folder, version="0.5").images
    first = images[0]
    known = {key: [getattr(first, key)[d] for d in first.dims] for key in ("scale", "translation")}
    return [image.data for image in images], dict(axes=list(first.dims), **known)
""",
    "niizarr": """
def look(folder):
    from niizarr import zarr2nii
    image = zarr2nii(folder)
    return [np.asarray(image.dataobj).T], dict(affine=image.header.get_best_affine().tolist())
""",
    "tensorstore": """
def look(folder):
    import tensorstore
    def open_level(path):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        return tensorstore.open(spec).result()
    levels = [open_level(path) for path in sorted(Path(folder).glob("[0-9]"))]
    return [level.read().result() for level in levels], dict(axes=list(levels[0].domain.labels))
""",
    "napari_ome_zarr": """
def look(folder):
    from napari_ome_zarr import napari_get_reader
    [(levels, metadata, kind)] = napari_get_reader(folder)(folder)
    assert kind == ("labels" if Path(folder).name in ("seg", "parts") else "image")
    axes, scale = list(metadata["axis_labels"]), list(metadata["scale"])  # it ignores translations
    if "channel_axis" in metadata:  # napari makes a layer of each channel
        axes.insert(metadata["channel_axis"], "c")
        scale.insert(metadata["channel_axis"], 1)
    return levels, dict(axes=axes, scale=scale)
""",
}
PROGRAM = """
import json, sys, warnings
from pathlib import Path
import numpy as np
warnings.simplefilter("ignore")
{look}
for folder in sys.argv[2:]:
    levels, metadata = look(folder)
    target = Path(sys.argv[1]) / Path(folder).name
    target.mkdir()
    for number, level in enumerate(levels):
        np.save(target / str(number), np.asarray(level))
    (target / "metadata.json").write_text(json.dumps(metadata))
"""
NEUROGLANCER = """
import json, subprocess, sys, warnings
from pathlib import Path
import numpy as np
warnings.simplefilter("ignore")
import neuroglancer
from neuroglancer.static_file_server import StaticFileServer
folder, browser, store, *images = sys.argv[1:]
with StaticFileServer(store, bind_address="127.0.0.1", daemon=True) as url:
    viewer = neuroglancer.Viewer()
    with viewer.txn() as state:
        for name in images:
            layer = neuroglancer.SegmentationLayer if name.endswith("seg") else neuroglancer.ImageLayer
            state.layers[name] = layer(source=f"zarr://{url}/{name}")
    options = "headless=new no-sandbox use-angle=swiftshader enable-unsafe-swiftshader disable-dev-shm-usage"
    switches = [*(f"--{option}" for option in options.split()), f"--user-data-dir={folder}/profile"]
    with subprocess.Popen([browser, *switches, str(viewer)], stderr=subprocess.DEVNULL) as window:
        try:
            for name in images:
                found = viewer.volume(name).result(timeout=60).read().result()
                np.save(f"{folder}/{name.replace('/', '-')}", np.asarray(found))
            picture = viewer.screenshot(size=[600, 400]).screenshot.image_pixels
            np.save(f"{folder}/picture", picture)
        finally:
            window.terminate()
neuroglancer.stop()
"""
RANGES = """
import json, sys, urllib.request
from pathlib import Path
from neuroglancer.static_file_server import StaticFileServer
seen = []
with StaticFileServer(sys.argv[1], bind_address="127.0.0.1", daemon=True) as url:
    for (first, stop), span in (((0, 100), "0-99"), ((17, 4000), "17-3999"), ((-20, None), "-20")):
        asked = urllib.request.Request(f"{url}/s/t1/0/c/0/0/0", headers={"Range": f"bytes={span}"})
        with urllib.request.urlopen(asked) as answer:
            served = answer.status, answer.read().hex(), answer.headers["Access-Control-Allow-Origin"]
        seen.append(((first, stop), served))
Path(sys.argv[2]).write_text(json.dumps(seen))
"""


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def run(program: str, *arguments: object) -> None:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Written:
    """An image in a store, and its folder."""

    folder: Path
    image: zp.Image

    @property
    def voxels(self) -> NDArray[Any]:
        assert self.image.record is not None
        whole = self.image.read(zp.PatchLocation((0, 0, 0), self.image.spatial_shape), scaled=False).T
        stored = np.moveaxis(whole, -1, 0)
        return stored.reshape(self.image.record.shape)


@pytest.fixture(scope="module")
def store(cohort_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a pyramid, a time series, and a label map; voxels are at whole millimetres."""
    folder = tmp_path_factory.mktemp("viewers")
    rng = np.random.default_rng(5)
    (folder / "source" / "s").mkdir(parents=True)
    affine = np.array([[2, 0, 0, -20], [0, 2, 0, 40], [0, 0, 3, -30], [0, 0, 0, 1.0]])
    t1 = rng.integers(-500, 2000, (150, 90, 70), dtype=np.int16)
    nib.Nifti1Image(t1, affine).to_filename(folder / "source" / "s" / "t1.nii")
    nib.Nifti1Image((t1 > 900).astype(np.uint8), affine).to_filename(folder / "source" / "s" / "seg.nii")
    series = nib.Nifti1Image(rng.normal(size=(20, 30, 10, 4)).astype(np.float32), affine)
    series.header.set_xyzt_units("mm", "sec")
    series.to_filename(folder / "source" / "s" / "bold.nii")
    zp.convert(folder / "source", folder / "store.zarr", pyramid=True, chunk=16)
    return folder / "store.zarr"


@pytest.fixture(scope="module")
def predictions(store: Path) -> Path:
    """Predictions for that store with coarser levels: integers, a label map, and an image of two channels."""

    def network(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        both = torch.cat([batch, -batch], 1)
        return {"classes": (batch > 0).to(torch.uint8), "logits": both, "parts": both}

    path = store.parent / "predictions.zarr"
    options: Any = {"reduce": {"classes": None, "logits": None, "parts": "argmax"}, "pyramid": True}
    zp.predict(network, zp.Cohort(store), path, image="t1", patch_size=64, overlap_mode="crop", **options)
    return path


@pytest.fixture(scope="module")
def written(store: Path, predictions: Path) -> list[Written]:
    subjects = [(path / "s", zp.Cohort(path)["s"]) for path in (store, predictions)]
    return [Written(folder / name, s.images[name]) for folder, s in subjects for name in s.images]


@pytest.mark.parametrize("library", LOOKS)
def test_the_same_voxels_axes_and_affines_are_read_by(
    library: str, written: list[Written], tmp_path: Path
) -> None:
    needs(library)
    if library == "niizarr":  # it looks for channels on the fifth axis of a NIfTI file only
        written = [one for one in written if one.folder.name != "logits"]
    run(PROGRAM.format(look=LOOKS[library]), tmp_path, *(one.folder for one in written))
    for one in written:
        record, seen = one.image.record, tmp_path / one.folder.name
        assert record is not None
        np.testing.assert_array_equal(np.load(seen / "0.npy").reshape(one.voxels.shape), one.voxels)
        levels = [np.load(seen / f"{n}.npy").shape for n in range(1, len(list(seen.glob("*.npy"))))]
        assert levels in ([], [level.shape for level in record.levels])
        metadata = json.loads((seen / "metadata.json").read_text())
        leading = [1.0] * (len(record.axes) - 3)
        np.testing.assert_allclose(metadata.get("affine", record.affine), record.affine)
        assert "".join(metadata.get("axes", record.axes)) == record.axes
        scale = [*leading, *one.image.spacing[::-1]]
        np.testing.assert_allclose(metadata.get("scale", scale), scale)
        translation = [*np.zeros(len(leading)), *one.image.affine[2::-1, 3]]
        np.testing.assert_allclose(metadata.get("translation", translation), translation)


def test_neuroglancer_reads_and_draws_them_from_a_plain_file_server(
    store: Path, predictions: Path, tmp_path: Path
) -> None:
    needs("neuroglancer")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")
    run(NEUROGLANCER, tmp_path, browser, store.parent, "store.zarr/s/t1", "predictions.zarr/s/classes")
    for path, name in ((store, "t1"), (predictions, "classes")):
        found = np.load(tmp_path / f"{path.name}-s-{name}.npy")
        np.testing.assert_array_equal(found.T, zp.Cohort(path)["s"].images[name].data[0])
    picture = np.load(tmp_path / "picture.npy")
    assert picture.shape[:2] == (400, 600)
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_its_file_server_gives_the_bytes_of_a_range(store: Path, tmp_path: Path) -> None:
    needs("neuroglancer")
    run(RANGES, store, tmp_path / "seen.json")
    shard = (store / "s" / "t1" / "0" / "c" / "0" / "0" / "0").read_bytes()
    for (first, stop), (status, bytes_, origins) in json.loads((tmp_path / "seen.json").read_text()):
        assert status == 206
        assert bytes.fromhex(bytes_) == shard[first:stop]
        assert origins == "*"
