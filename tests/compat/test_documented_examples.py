"""The examples of TorchIO's documentation run unchanged, but for the import and for smaller sizes.

They are read from the docstrings of the installed TorchIO, which its pages show. Those of TorchIO 0.13 (pages
data/patch_training and data/patch_inference of ``torchio.readthedocs.io/en/v0.13.0``) are in
test_compat_torchio0.py, and those of patches/patch_training and patches/patch_inference of 1.x in
test_compat_torchio1.py.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from zpatch.compat import torchio1, torchio2
from zpatch.compat.transforms import is_torchio_2

SHAPE = (30, 32, 28)
SMALLER = {
    r"\b96\b": "12",
    r"\b88\b": "14",
    r"\b64\b": "12",
    r"\b(256, 256, 176)\b": str(SHAPE),
    "num_workers=4": "num_workers=2",
    "queue_length = 300": "queue_length = 20",
    r"\bmax_length=300": "max_length=20",
    r"'(\w+)\.(nrrd|mha|minc)'": r"'\1.nii.gz'",  # formats that are converted first
    "colin27_t2_tal_lin_dicom/": "t2.nii.gz",
    "colin27_t1_tal_lin.nii.gz": "t1.nii.gz",
    "colin27_seg1.nii.gz": "t1_seg.nii.gz",
}
PAGES1 = {
    "Queue": "patches/patch_training/#torchio.data.Queue",
    "GridSampler": "patches/patch_inference/#torchio.data.GridSampler",
    "WeightedSampler": "patches/patch_training/#torchio.data.WeightedSampler",
    "LabelSampler": "patches/patch_training/#torchio.data.LabelSampler",
    "SubjectsDataset": "data/dataset/#torchio.data.SubjectsDataset",
}
PAGES2 = {
    "Queue": "reference/data/queue/",
    "GridSampler": "reference/data/sampler/#torchio.GridSampler",
    "UniformSampler": "reference/data/sampler/#torchio.UniformSampler",
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: None) -> Path:
    """A folder with the files that the examples name."""
    rng = np.random.default_rng(0)
    voxels = {
        "t1": rng.random(SHAPE, np.float32),
        "t2": rng.random(SHAPE, np.float32),
        "t1_mri": rng.random(SHAPE, np.float32),
        "t1_seg": rng.integers(0, 3, SHAPE, np.uint8),
        "sampling": rng.random(SHAPE, np.float32),
    }
    for name, array in voxels.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Datasets:
    """The datasets of TorchIO, whose Colin27 would be fetched."""

    def __init__(self, tio: Any) -> None:
        self._tio = tio

    def Colin27(self) -> Any:  # noqa: N802 - TorchIO's name
        """A small brain."""
        return self._tio.Subject(
            t1=self._tio.ScalarImage("t1.nii.gz"),
            head=self._tio.LabelMap("t1_seg.nii.gz"),
            brain=self._tio.LabelMap("t1_seg.nii.gz"),
        )


class Module:
    """A module whose ``datasets`` need no network."""

    def __init__(self, tio: Any) -> None:
        self._tio, self.datasets = tio, Datasets(tio)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tio, name)


def run(text: str, module: Any, names: dict[str, Any]) -> dict[str, Any]:
    """Execute the examples of a docstring, as far as they can end."""
    for before, after in SMALLER.items():
        text = re.sub(before, after, text)
    for example in doctest.DocTestParser().get_examples(text):
        source = re.sub(r"^import torchio as tio$", "", example.source.strip(), flags=re.MULTILINE)
        if source.startswith("for patch in") and "sampler(subject, num" not in source:
            source += "\n    break"  # samplers draw without end
        exec(compile(source.replace("in iterator", "in generator"), "<example>", "exec"), names)
    return names


@pytest.mark.parametrize("name", PAGES1)
@pytest.mark.filterwarnings("ignore")
def test_an_example_of_torchio_1_runs(files: Path, name: str, capsys: Any) -> None:
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 1")
    tio = Module(torchio1)
    names: dict[str, Any] = {"tio": tio, "torch": torch, "local_rank": 0}
    text = getattr(torchio, name).__doc__
    found = run(text.partition(">>> # Usage with distributed training")[0], tio, names)
    if name == "Queue":
        assert found["inputs"].shape[1:] == found["logits"].shape[1:] == (1, 12, 12, 12)
        assert found["targets"].dtype == torch.uint8
    elif name == "GridSampler":
        assert len(list(files.glob("patch_*.nii.gz"))) == len(found["sampler"]) > 1
    elif name == "WeightedSampler":
        assert "tensor([" in capsys.readouterr().out
    elif name == "LabelSampler":
        assert capsys.readouterr().out.count("(1, 12, 12, 12)") >= 2
    else:
        subject = found["subject"]
        assert isinstance(subject, torchio1.Subject)
        assert subject.name == "Fernando Perez"
        assert 0 <= float(subject.t1.data.min()) <= float(subject.t1.data.max()) <= 1.01


@pytest.mark.parametrize("name", PAGES2)
def test_an_example_of_torchio_2_runs(files: Path, name: str) -> None:
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if not is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 2")
    subject = torchio2.Subject(t1=torchio2.ScalarImage("t1.nii.gz"))
    names: dict[str, Any] = {
        "tio": torchio2,
        "subject": subject,
        "subjects": [subject] * 3,
        "SubjectsLoader": torchio2.SubjectsLoader,
        "DataLoader": torchio2.SubjectsLoader,
        "model": torch.nn.Identity(),
    }
    found = run(getattr(torchio, name).__doc__, torchio2, names)
    if name == "GridSampler":
        torch.testing.assert_close(found["volume"], subject.t1.data)
    if name == "Queue":
        assert found["outputs"].shape[1:] == (1, 12, 12, 12)
        found["queue"].close()
