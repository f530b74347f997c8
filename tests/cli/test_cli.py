"""The command line: exit codes, one clear line for each bad input, and stdout for results only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import psutil
import pytest

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.cli import COMMANDS
from zpatch.digests import digest
from zpatch.records.manifest import append_lines
from zpatch.records.names import FORMAT, LOCK, MANIFEST, ROOT_DOCUMENT, STAGING

HEAVY = ("torch", "dask", "zarr", "nibabel", "numpy", "numcodecs", "rich")
NETS = """
import torch

def doubling():
    return lambda batch: batch * 2

def shrinking():
    calls = []
    def network(batch):
        calls.append(1)
        return batch if len(calls) == 1 else batch[:, :, 12:]
    return network

def two_heads():
    return lambda batch: {"seg": torch.cat([batch, 500 - batch], dim=1), "dist": batch.log()}

def failing():
    calls = []
    def network(batch):
        calls.append(1)
        if len(calls) > 1:
            raise ArithmeticError("too hard\\nfor me")
        return batch
    return network
"""
QUEUE = ("--queue", "--patch-size", "16", "--patches", "8", "--workers", "0", "--batch-size", "3")
BENCH = ("--seconds", "0.01", "--patch-size", "24", "-j", "1")
PREDICT = ("--image", "t1", "--patch-size", "24", "--overlap", "8")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Run a command that must fail with an exit code and one line, after a traceback with -v."""

    def run_it(*arguments: Any, code: int = 1) -> str:
        found, out, err = run(*arguments, "-q")
        assert (found, out) == (code, "")
        assert len(err.splitlines()) == 1, err
        assert err.startswith("zpatch: error: ")
        found, out, verbose = run(*arguments, "-v", "-q")
        assert (found, out) == (code, "")
        assert verbose.startswith("Traceback (most recent call last):")
        assert verbose.splitlines()[-1] == err.strip()
        return err.strip()

    return run_it


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new working folder, with some networks in it."""
    (tmp_path / "nets_of_cli.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    close_shards(tmp_path)


@pytest.fixture
def store(cohort_store: Path, here: Path) -> Path:
    """A copy of the small cohort, to be damaged."""
    shutil.copytree(cohort_store, here / "cohort.zarr")
    return here / "cohort.zarr"


def only(source: Path, target: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(source / name, target / name)
    return target


def everything_below(folder: Path) -> dict[str, bytes | None]:
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None
        for file in sorted(folder.rglob("*"))
    }


# All well


def test_a_cohort_goes_through_every_command(run: Run, cohort_source: Path, here: Path) -> None:
    code, out, err = run("convert", cohort_source, "cohort.zarr", "--chunk", "16")
    assert (code, out) == (0, "cohort.zarr\n")
    assert "4 subjects, 8 images" in err
    code, out, _ = run("info", "cohort.zarr")
    assert code == 0
    assert all(word in out for word in ("sub-04", "t1", "seg", "lz4", "spacing mm"))
    assert run("verify", "cohort.zarr")[:2] == (0, "")
    model = ("--model", "nets_of_cli:doubling")
    code, out, err = run("predict", "cohort.zarr", "out.zarr", *model, *PREDICT, "--include", "sub-01")
    assert (code, out) == (0, "out.zarr\n")
    assert "1 subjects, " in err
    code, out, _ = run("export", "out.zarr", "nifti", "--suffix", ".nii")
    assert (code, out) == (0, "nifti/sub-01/prediction.nii\n")
    source = nib.Nifti1Image.from_filename(cohort_source / "sub-01" / "t1.nii.gz").get_fdata()
    found = nib.Nifti1Image.from_filename(here / "nifti" / "sub-01" / "prediction.nii").get_fdata()
    np.testing.assert_allclose(found, source * 2, rtol=1e-6)


def test_each_output_is_reduced_in_its_way_and_values_that_are_not_finite_are_reported(
    run: Run, store: Path, here: Path
) -> None:
    voxels = {s.name: n for s in zp.Cohort(store) if (n := int((s["t1"].data <= 0).sum()))}
    command = ["predict", store, "out.zarr", "--model", "nets_of_cli:two_heads", *PREDICT, "--blend", "crop"]
    command += ["--reduce", "seg=argmax", "--reduce", "dist=none"]
    code, out, err = run(*command, "-q")
    assert (code, out) == (0, "out.zarr\n")
    [line] = err.splitlines()
    total = sum(voxels.values())
    assert line.startswith(f"warning: the network gave NaN or infinite values in {total} voxels: sub-0")
    assert line.endswith("; --strict stops at the first")
    said = run("info", "out.zarr")[1]
    for name, count in voxels.items():
        assert f"{name}/dist ({count})" in line
        assert f"warning: {name}/dist: the network gave NaN or infinite values in {count}" in said
    assert json.loads(run(*command, "--json")[1])["voxels_not_finite"] == total
    assert [image.kind for image in zp.Cohort("out.zarr")[0].images.values()] == ["label", "scalar"]


def test_strict_stops_at_the_first_value_that_is_not_finite(refused: Callable[..., str], store: Path) -> None:
    command = ["predict", store, "out.zarr", "--model", "nets_of_cli:two_heads", *PREDICT, "--strict"]
    command += ["--include", "sub-01"]
    text = r"subject 'sub-01': the output 'dist' is NaN or infinite in \d+ voxels of the patch at \(0, 0, 0\)"
    assert re.search(text + ", its input in 0; without --strict they are counted, and", refused(*command))


@pytest.mark.parametrize(
    ("reduce", "text"),
    [
        (["argmax"], "--reduce argmax would give class 0 everywhere, as the output 'dist' has one channel; "),
        (["seg=argmax"], "--reduce says nothing of the output 'dist'; add it, as none to keep its values"),
        (["seg=none", "dits=none"], "--reduce: no output 'dits' in the network; did you mean 'dist'?"),
        (["seg=argmin", "dist=none"], "--reduce must be 'argmax'"),
    ],
)
def test_reductions_that_do_not_fit_the_outputs_are_wrong_usage(
    refused: Callable[..., str], store: Path, reduce: list[str], text: str
) -> None:
    flags = [word for how in reduce for word in ("--reduce", how)]
    command = ["predict", store, "out.zarr", "--model", "nets_of_cli:two_heads", *PREDICT, *flags]
    assert text in refused(*command, code=2)
    assert not Path("out.zarr").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "SOURCE", "new.zarr"),
        ("convert", "SOURCE", "new.zarr", "--dry-run"),
        ("info", "cohort.zarr"),
        ("verify", "cohort.zarr"),
        ("verify", "cohort.zarr", "--quick"),
        ("export", "cohort.zarr", "nifti"),
        ("report", "cohort.zarr"),
        ("bench", "cohort.zarr", *BENCH),
        ("bench", "cohort.zarr", *QUEUE),
        ("predict", "cohort.zarr", "out.zarr", "--model", "nets_of_cli:doubling", *PREDICT),
        ("predict", "cohort.zarr", "out.zarr", "--model", "nets_of_cli:doubling", *PREDICT, "--dry-run"),
    ],
    ids=" ".join,
)
def test_stdout_holds_only_json(run: Run, store: Path, cohort_source: Path, command: tuple[str, ...]) -> None:
    code, out, _ = run(*(cohort_source if word == "SOURCE" else word for word in command), "--json")
    assert code == 0

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(out, parse_constant=no_constant)


def test_json_has_the_results_of_a_command(run: Run, cohort_source: Path, here: Path) -> None:
    report = json.loads(run("convert", cohort_source, "cohort.zarr", "--json")[1])
    assert [case["subject"] for case in report["cases"]] == ["sub-01", "sub-02", "sub-03", "sub-04"]
    assert [case["status"] for case in report["cases"]] == ["converted"] * 4
    assert sum(len(case["images"]) for case in report["cases"]) == 8
    again = json.loads(run("convert", cohort_source, "cohort.zarr", "--json")[1])
    assert (again["cases"], again["already_there"]) == ([], zp.Cohort("cohort.zarr").names)
    info = json.loads(run("info", "cohort.zarr", "--json")[1])
    assert [image["subject"] for image in info["images"]][::2] == zp.Cohort("cohort.zarr").names
    assert json.loads(run("verify", "cohort.zarr", "--json")[1])["ok"] is True


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "SOURCE", "new.zarr"),
        ("predict", "cohort.zarr", "out.zarr", "--model", "nets_of_cli:doubling", *PREDICT),
    ],
    ids=["convert", "predict"],
)
def test_a_dry_run_writes_nothing(
    run: Run, store: Path, here: Path, cohort_source: Path, command: tuple[str, ...]
) -> None:
    before = everything_below(here)
    code, out, _ = run(*(cohort_source if word == "SOURCE" else word for word in command), "--dry-run")
    assert code == 0
    assert "sub-03" in out
    assert everything_below(here).keys() == before.keys()


def test_quiet_prints_results_only(run: Run, cohort_source: Path, here: Path) -> None:
    assert run("convert", cohort_source, "cohort.zarr", "-q") == (0, "cohort.zarr\n", "")
    assert run("verify", "cohort.zarr", "-q") == (0, "", "")


def codecs_of(store: Path) -> set[str]:
    return {record.codec for record in zp.Cohort(store).store.records.values()}


def test_defaults_come_from_a_config_file(run: Run, cohort_source: Path, here: Path) -> None:
    (here / "zpatch.toml").write_text('[convert]\ncodec = "zstd"\nchunk = 16\n')
    assert run("--config", "zpatch.toml", "convert", cohort_source, "a.zarr")[0] == 0
    assert codecs_of(here / "a.zarr") == {"zstd"}
    assert run("--config", "zpatch.toml", "convert", cohort_source, "b.zarr", "--codec", "none")[0] == 0
    assert codecs_of(here / "b.zarr") == {"none"}


def test_defaults_come_from_the_environment(
    run: Run, cohort_source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZPATCH_CONVERT_CODEC", "lz4hc")
    assert run("convert", cohort_source, "a.zarr")[0] == 0
    assert codecs_of(here / "a.zarr") == {"lz4hc"}


def test_a_config_file_names_options_by_their_flags(run: Run, store: Path, here: Path) -> None:
    lines = [
        "[predict]",
        'model = "nets_of_cli:doubling"',
        'image = ["t1"]',
        "patch-size = 24",
        "overlap = 8",
        'reduce = "sigmoid"',
    ]
    (here / "zpatch.toml").write_text("\n".join(lines))
    assert run("--config", "zpatch.toml", "predict", store, "out.zarr", "-q") == (0, "out.zarr\n", "")


def test_the_environment_names_options_by_their_flags(
    run: Run, store: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"MODEL": "nets_of_cli:doubling", "IMAGE": "t1", "PATCH_SIZE": "24", "JSON": "1"}
    for name, value in options.items():
        monkeypatch.setenv(f"ZPATCH_PREDICT_{name}", value)
    code, out, _ = run("predict", store, "out.zarr")
    assert code == 0
    assert json.loads(out)["subjects"] == zp.Cohort(store).names


def test_unknown_commands_and_options_in_a_config_file_are_refused(
    run: Run, cohort_source: Path, here: Path
) -> None:
    (here / "zpatch.toml").write_text('[convert]\ncodek = "zstd"\n')
    code, _, err = run("--config", "zpatch.toml", "convert", cohort_source, "a.zarr")
    assert code == 2
    assert "codek" in err
    assert not (here / "a.zarr").exists()


# Bad input: one line each, and nothing half-written


def test_a_source_that_is_empty_or_missing_is_refused(refused: Callable[..., str], here: Path) -> None:
    (here / "empty").mkdir()
    assert "empty: no NIfTI, NRRD or MetaImage file in it; name" in refused("convert", "empty", "a.zarr")
    assert "nowhere: it does not exist; name the folder" in refused("convert", "nowhere", "a.zarr")
    assert "nets_of_cli.py: it is no folder" in refused("convert", "nets_of_cli.py", "a.zarr")
    assert not (here / "a.zarr").exists()


def test_an_existing_store_is_resumed_and_only_overwrite_starts_over(
    run: Run, cohort_source: Path, store: Path
) -> None:
    (store / LOCK).write_text("")
    before = everything_below(store)
    code, out, err = run("convert", cohort_source, store)
    assert (code, out) == (0, f"{store}\n")
    assert "4 subjects are already converted; 0 subjects, 0 images" in err
    assert re.search(r"^converted +0 +0 +0 B", err, re.MULTILINE)
    assert re.search(r"^already converted +4$", err, re.MULTILINE)
    assert {**everything_below(store), LOCK: b""} == before
    assert run("convert", cohort_source, store, "--overwrite", "--limit", "1")[0] == 0
    assert zp.Cohort(store).names == ["sub-01"]


def test_the_command_in_an_error_about_damage_repairs_it_and_changes_nothing_else(
    run: Run, cohort_source: Path, store: Path
) -> None:
    def others() -> dict[str, bytes]:
        kept = everything_below(store)
        return {name: content for name, content in kept.items() if name.startswith(("sub-01", "sub-03"))}

    whole, before = zp.Cohort(store)["sub-02"].t1.data, others()
    assert len(before) > 20
    shard = next(file for file in (store / "sub-02" / "t1" / "0" / "c").rglob("*") if file.is_file())
    shard.write_bytes(bytes(shard.stat().st_size))
    (store / "sub-02" / "zarr.json").write_text("{}")
    close_shards(store)
    code, _, err = run("export", store, store.parent / "out")
    found = re.search(r"'zpatch (convert) SOURCE (.*)' repairs it", err)
    assert code == 1
    assert found is not None
    assert run("verify", store)[0] == 4
    command = [found[1], cohort_source, *found[2].split()]
    assert run(*command)[0] == 0
    assert run("verify", store)[0] == 0
    assert zp.Cohort(store).names == ["sub-01", "sub-02", "sub-03", "sub-04"]
    np.testing.assert_array_equal(zp.Cohort(store)["sub-02"].t1.data, whole)
    assert others() == before


def test_a_subject_that_cannot_be_replaced_is_unchanged(
    run: Run, cohort_source: Path, store: Path, here: Path
) -> None:
    (here / "bad" / "sub-02").mkdir(parents=True)
    for name in ("t1", "seg"):
        (here / "bad" / "sub-02" / f"{name}.nii").write_text("a letter to my aunt")
    before = everything_below(store)
    code, _, err = run("convert", here / "bad", store, "--overwrite", "--include", "sub-02")
    assert code == 1
    assert "no case of" in err
    assert {**everything_below(store), LOCK: b""} == {**before, LOCK: b""}


def test_info_of_chosen_subjects_counts_only_them_and_refuses_patterns_without_a_match(
    run: Run, refused: Callable[..., str], store: Path
) -> None:
    assert " 4 subjects, 8 images, " in run("info", store)[1]
    assert " 1 subjects, 2 images, " in run("info", store, "--include", "sub-02")[1]
    assert "no subject 'sub-2' in store" in refused("info", store, "--include", "sub-2")


def test_a_prediction_of_no_subject_is_wrong_usage(run: Run, store: Path, here: Path) -> None:
    code, _, err = run(
        "predict", store, "o.zarr", "--model", "nets_of_cli:doubling", *PREDICT, "--exclude", "*"
    )
    assert code == 2
    assert "is left to predict" in err
    assert not (here / "o.zarr").exists()


def test_a_folder_that_is_not_a_store_is_never_overwritten(
    refused: Callable[..., str], cohort_source: Path, here: Path
) -> None:
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter-1").write_text("All of it")
    line = refused("convert", cohort_source, "thesis", "--overwrite")
    assert "thesis: it exists and is no zpatch store; choose another name" in line
    assert (here / "thesis" / "chapter-1").read_text() == "All of it"


def test_a_file_that_is_not_nifti_fails_alone_and_is_left_out_among_good_ones(
    refused: Callable[..., str], run: Run, cohort_source: Path, here: Path
) -> None:
    (here / "bad" / "sub-99").mkdir(parents=True)
    (here / "bad" / "sub-99" / "t1.nii").write_text("a letter to my aunt")
    line = refused("convert", "bad", "a.zarr")
    assert f"no case of bad can be converted: bad{os.sep}sub-99{os.sep}t1.nii: " in line
    assert not (here / "a.zarr").exists()
    only(cohort_source, here / "bad", "sub-01", "sub-02")
    code, out, err = run("convert", "bad", "a.zarr", "-q")
    assert (code, out) == (3, "a.zarr\n")
    assert len(err.splitlines()) == 1
    assert err.startswith("failed: sub-99: ")
    assert zp.Cohort("a.zarr").names == ["sub-01", "sub-02"]
    assert run("verify", "a.zarr")[0] == 0


def test_a_truncated_file_leaves_nothing_of_its_case(run: Run, cohort_source: Path, here: Path) -> None:
    source = only(cohort_source, here / "scans", "sub-01", "sub-02")
    file = source / "sub-02" / "t1.nii.gz"
    file.write_bytes(file.read_bytes()[:-5000])
    code, _, err = run("convert", source, "a.zarr", "-q")
    assert code == 3
    assert len(err.splitlines()) == 1
    assert str(file) in err
    assert zp.Cohort("a.zarr").names == ["sub-01"]
    assert not (here / "a.zarr" / "sub-02").exists()


def test_label_and_image_of_different_shape_are_refused(
    refused: Callable[..., str], cohort_source: Path, here: Path
) -> None:
    source = only(cohort_source, here / "scans", "sub-01")
    nib.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)).to_filename(source / "sub-01" / "seg.nii.gz")
    line = refused("convert", source, "a.zarr")
    assert "seg.nii.gz: its shape (9, 9, 9) is not that of " in line
    assert "resample one to the grid of the other" in line
    assert not (here / "a.zarr").exists()


def test_the_error_about_a_patch_larger_than_the_volume_has_axis_sizes_and_advice(cohort: zp.Cohort) -> None:
    n = cohort["sub-01"].spatial_shape[0]
    with pytest.raises(zp.ZpatchError) as error:
        next(zp.LabelSampler(n + 1)(cohort["sub-01"], 1))
    assert f"patch of {n + 1} voxels does not fit axis I of 'sub-01' ({n} voxels)" in str(error.value)
    assert "padding_mode" in str(error.value)


def test_unknown_names_are_refused_with_the_nearest(refused: Callable[..., str], store: Path) -> None:
    model = ("--model", "nets_of_cli:doubling", "--patch-size", "24")
    line = refused("predict", store, "out.zarr", *model, "--image", "t2")
    assert "no image 't2' in subject 'sub-01'; did you mean 't1'? (it has: " in line
    line = refused("predict", store, "out.zarr", *model, "--image", "t1", "--include", "sub-1")
    assert "no subject 'sub-1' in store" in line
    assert "did you mean 'sub-01'" in line
    assert "did you mean 'sub-01'" in refused("export", store, "nifti", "--include", "sub-1")
    assert "did you mean 't1'" in refused("export", store, "nifti", "--image", "t2")
    assert "did you mean 'sub-01'" in refused("bench", store, "--include", "sub-1")
    assert "did you mean 't1'" in refused("bench", store, "--image", "t2")
    assert not Path("out.zarr").exists()
    assert not Path("nifti").exists()


def test_a_benchmark_prints_speeds_packings_and_advice(run: Run, store: Path) -> None:
    code, out, err = run("bench", store, *BENCH, "--seconds", "0.05", "-j", "2")
    assert code == 0
    assert "4 subjects: patches of 24x24x24, 10 together, of seg (uint8; lz4hc; 16x16x16), t1 (" in err
    speeds, packings, lines = out.split("\n\n")
    assert [line.split()[0] for line in speeds.splitlines()] == ["processes", "1", "2"]
    assert [line.split()[0] for line in packings.splitlines()[2:]] == ["16", "32", "64"]
    assert "16 (stored)" in packings
    assert "lz4 (stored)" in packings
    assert re.search(r"^patches_per_volume: 10 read together decode \d", lines, re.MULTILINE)
    assert re.search(r"^workers: ", lines, re.MULTILINE)


def test_a_benchmark_in_json_has_figures_and_advice(run: Run, store: Path) -> None:
    report = json.loads(
        run("bench", store, *BENCH, "--image", "t1", "--patches-per-volume", "4", "--json")[1]
    )
    assert (report["patch_size"], report["patches_together"]) == ([24, 24, 24], 4)
    assert list(report["images"]) == ["t1"]
    assert [speed["processes"] for speed in report["speeds"]] == [1]
    assert report["packings"][0]["decoded_per_delivered"] == report["decoded_by_group"]["4"]
    assert report["advice"]


def test_a_benchmark_of_a_queue_prints_where_its_time_goes(run: Run, store: Path) -> None:
    code, out, err = run("bench", store, *QUEUE, "--patches-per-volume", "4")
    assert code == 0
    assert "a queue of patches of 16x16x16: --patches 8, --workers 0, --batch-size 3, --max-length 300" in err
    rows = out.splitlines()
    starts = [
        "epoch 1     8 patches in 3 batches",
        "training    waited",
        "no workers  fetching",
        "buffer",
        "chunks",
    ]
    assert all(row.startswith(start) for row, start in zip(rows[:-1], starts, strict=True))
    assert rows[-1].startswith("training waits ")
    assert rows[-1].endswith(": --workers above 0 will help")


def test_wrong_options_of_a_benchmark_of_a_queue_are_refused(
    refused: Callable[..., str], store: Path
) -> None:
    line = refused("bench", store, "--batch-size", "4", code=2)
    assert "--batch-size is for a queue; say --queue" in line
    line = refused("bench", store, *QUEUE, "--transform", "no_such_module:augmentation", code=2)
    assert "--transform 'no_such_module:augmentation' cannot be loaded: ModuleNotFoundError" in line


def test_a_benchmark_of_an_unreadable_store_is_refused(refused: Callable[..., str], store: Path) -> None:
    line = refused("bench", store, "--patch-size", "24,24,500", code=2)
    assert "patch of 500 voxels does not fit axis K of 'sub-0" in line
    for shard in store.glob("*/seg/0/c/0/0/0"):
        shard.unlink()
    line = refused("bench", store, *BENCH)
    assert "damaged: image 'seg' of subject 'sub-0" in line
    assert "it is missing; run 'zpatch verify" in line


@pytest.mark.parametrize(
    ("overlap", "text"),
    [
        ("7", "--overlap must be even and at least 0, not 7 on axis I"),
        ("24", "--overlap of 24 voxels on axis I is not smaller than the patch (24); use at most 22"),
        ("8,8,26", "--overlap of 26 voxels on axis K is not smaller than the patch (24)"),
    ],
)
def test_an_odd_or_too_large_overlap_is_refused(
    refused: Callable[..., str], store: Path, overlap: str, text: str
) -> None:
    model = ("--model", "nets_of_cli:doubling", "--image", "t1", "--patch-size", "24")
    assert text in refused("predict", store, "out.zarr", *model, "--overlap", overlap, code=2)
    assert not Path("out.zarr").exists()


def test_a_dry_run_says_which_axes_the_network_is_fed(run: Run, store: Path) -> None:
    command = ("predict", store, "out.zarr", "--model", "nets_of_cli:doubling", *PREDICT, "--dry-run")
    for axes, text in (
        ("xyz", "(x, y, z): batches (B, C, x, y, z)"),
        ("zyx", "(z, y, x): batches (B, C, z, y, x)"),
    ):
        _, out, _ = run(*command, *(() if axes == "xyz" else ("--model-axes", axes)))
        assert out.splitlines()[0] == f"the network is fed {text}; choose other axes by --model-axes"
        _, out, _ = run(*command, "--model-axes", axes, "--json")
        assert {plan["model_axes"] for plan in json.loads(out)} == {axes}


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ("ijk", "--model-axes must have x, y and z in the order of the network's batches"),
        (
            "yx",
            "--model-axes yx leaves out z, along which patches have 24 voxels; give a patch size of 1 there",
        ),
    ],
)
def test_axes_of_a_network_that_mean_nothing_are_refused(
    refused: Callable[..., str], store: Path, axes: str, text: str
) -> None:
    command = ("predict", store, "out.zarr", "--model", "nets_of_cli:doubling", *PREDICT)
    assert text in refused(*command, "--model-axes", axes, code=2)


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("shrinking", "is (12, 24, 24) where the output has room for (24, 24, 24)"),
        ("failing", "the model failed on subject 'sub-01', patches at (0, 0, 0)"),
    ],
)
def test_a_network_that_fails_leaves_an_output_that_verify_reports_as_incomplete(
    run: Run, store: Path, factory: str, text: str
) -> None:
    code, out, err = run("predict", store, "out.zarr", "--model", f"nets_of_cli:{factory}", *PREDICT, "-q")
    assert (code, out) == (1, "")
    *failed, last = err.splitlines()
    assert [line.split(":")[:2] for line in failed] == [["failed", f" sub-0{n}"] for n in (1, 2, 3, 4)]
    assert last.startswith("zpatch: error: 4 subjects failed: sub-01: ")
    assert text in failed[0]
    code, _, err = run("verify", "out.zarr", "-q")
    assert code == 4
    assert "incomplete: subject 'sub-01' was never committed" in err
    assert not list(Path("out.zarr").rglob("c"))


@pytest.mark.parametrize("model", ["nosuch.pt", "nosuch_module:net", "nets_of_cli:nosuch", "nets_of_cli.py"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_cannot_be_loaded_is_refused_before_anything_is_written(
    refused: Callable[..., str], store: Path, model: str
) -> None:
    assert f"model {model!r} " in refused("predict", store, "out.zarr", "--model", model, *PREDICT)
    assert not Path("out.zarr").exists()


@pytest.mark.parametrize("command", ["info", "verify", "export", "predict", "report", "bench"])
def test_a_folder_that_is_not_a_store_and_a_store_of_a_newer_format_are_refused(
    refused: Callable[..., str], store: Path, cohort_source: Path, command: str
) -> None:
    rest: tuple[str, ...] = ()
    if command == "export":
        rest = ("nifti",)
    elif command == "predict":
        rest = ("out.zarr", "--model", "nets_of_cli:doubling", *PREDICT)
    assert "nowhere: it does not exist; make one with 'zpatch convert" in refused(command, "nowhere", *rest)
    assert "it is no zpatch store (no zarr.json)" in refused(command, cohort_source, *rest)
    document = store / ROOT_DOCUMENT
    text = document.read_text()
    newer = text.replace(f'"format": {FORMAT}', '"format": 99')
    assert newer != text
    document.write_text(newer)
    seal = {"bytes": len(newer), "checksum": digest(newer.encode()), "document": ROOT_DOCUMENT}
    append_lines(store / MANIFEST, seal)  # without it, the document is damaged
    line = refused(command, store, *rest)
    assert f"it is a store of format 99, and this zpatch reads up to {FORMAT}; install a newer" in line
    assert not Path("nifti").exists()
    assert not Path("out.zarr").exists()


def test_damage_is_named_and_gives_exit_code_4(run: Run, store: Path) -> None:
    record = zp.Cohort(store).store.records["sub-02", "t1"]
    key = next(key for key in record.files if "/c/" in key and not key.startswith("zpatch"))
    shard = store / "sub-02" / "t1" / key
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    code, out, err = run("verify", store, "-q")
    assert (code, out) == (4, "")
    assert err.splitlines() == [f"damaged: {shard}: its contents have changed"]
    code, out, _ = run("verify", store, "--json")
    assert code == 4
    assert json.loads(out)["damages"][0]["file"] == str(shard.relative_to(store))
    shard.unlink()
    assert run("verify", store, "--quick", "-q")[0] == 4


def test_more_memory_than_is_allowed_is_refused(
    refused: Callable[..., str], cohort_source: Path, here: Path
) -> None:
    line = refused("convert", cohort_source, "a.zarr", "--max-memory", "1 MiB")
    assert "more than the limit of 1.0 MiB; choose a smaller --chunk, fewer --jobs, or allow more" in line
    assert not (here / "a.zarr").exists()


def test_existing_files_are_not_replaced_by_an_export(
    refused: Callable[..., str], run: Run, store: Path, here: Path
) -> None:
    assert run("export", store, "nifti", "--image", "seg")[0] == 0
    before = everything_below(here / "nifti")
    assert "nifti/sub-01/seg.nii.gz: it exists already; say --overwrite" in refused("export", store, "nifti")
    assert everything_below(here / "nifti") == before
    assert run("export", store, "nifti", "--overwrite")[0] == 0
    assert "but 8 images were chosen" in refused("export", store, "all.nii.gz", code=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["convert", "a"], "Missing argument 'STORE'"),
        (["convert", "a", "b", "--codec", "zip"], "'zip' is not one of"),
        (
            ["convert", "a", "b", "--max-memory", "lots"],
            "'lots' is not a number of bytes; write it like '2 GiB'",
        ),
        (["convert", "a", "b", "--chunks", "3"], "No such option"),
        (
            ["predict", "a", "b", "--patch-size", "1,2,3,4"],
            "is not one integer, or two or three with commas",
        ),
        (["transmogrify"], "No such command 'transmogrify'"),
        (["--config", "nowhere.toml", "info", "a"], "does not exist"),
    ],
)
def test_wrong_usage_gives_exit_code_2_and_a_reason(run: Run, arguments: list[str], text: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


@pytest.mark.parametrize("reduce", ["argmin", "threshold:high"])
def test_a_reduction_that_does_not_exist_is_refused(run: Run, store: Path, reduce: str) -> None:
    arguments = ("--model", "nets_of_cli:doubling", *PREDICT, "--reduce", reduce)
    code, out, err = run("predict", store, "out.zarr", *arguments, "-q")
    assert code == 2
    assert (out, "Traceback" in err) == ("", False)
    assert reduce.partition(":")[2] or reduce in err
    assert not Path("out.zarr").exists()


def test_a_config_file_that_is_not_toml_is_wrong_usage(run: Run, here: Path) -> None:
    (here / "zpatch.toml").write_text("codec: zstd")
    code, _, err = run("--config", "zpatch.toml", "info", "a")
    assert code == 2
    assert "zpatch.toml is not TOML" in err


# Help and start-up


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_names_its_arguments_and_has_an_example(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    arguments = {
        "convert": ["SOURCE", "STORE"],
        "predict": ["STORE", "OUTPUT"],
        "export": ["STORE", "DEST"],
    }.get(command, ["STORE"])
    usage, _, text = out.partition("\n")
    assert usage == f"Usage: zpatch {command} [OPTIONS] {' '.join(arguments)}"
    assert all(argument in text for argument in arguments)
    assert f"  zpatch {command} " in text.partition("Examples:")[2]


def test_the_help_names_every_command_and_the_exit_codes(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert "Exit codes: 0 success, 1 error, 2 wrong usage, 3 some cases failed" in out
    assert run("--version")[1] == f"zpatch, version {zp.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_nothing_heavy_is_imported_before_a_command_runs(arguments: list[str]) -> None:
    program = (
        f"import sys, zpatch.cli\nif {arguments}: zpatch.cli.run({arguments})\n"
        f"print('\\n' + ' '.join(name for name in {HEAVY} if name in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == ""


# Interruption


def test_ctrl_c_gives_130_and_leaves_a_store_that_opens(cohort_source: Path, here: Path) -> None:
    for number in range(200):
        shutil.copytree(cohort_source / "sub-01", here / "scans" / f"sub-{number:03}", copy_function=os.link)
    on_a_slow_disk = "import os, time, zpatch.cli; os.fsync = lambda _: time.sleep(0.02); zpatch.cli.main()"
    with forked.start(on_a_slow_disk, "convert", "scans", "a.zarr", "-q") as process:
        manifest = here / "a.zarr" / MANIFEST
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if manifest.exists() and b"sub-001" in manifest.read_bytes():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "zpatch: interrupted"
    cohort = zp.Cohort("a.zarr")
    assert 0 < len(cohort) < 200
    assert zp.verify("a.zarr").damages == ()
    assert not list((here / "a.zarr").glob(f"{STAGING}/*"))
    for subject in cohort:
        assert list(subject.images) == ["seg", "t1"]


def test_ctrl_c_ends_a_benchmark_and_its_processes(store: Path, here: Path) -> None:
    command = ["bench", "cohort.zarr", *BENCH, "--seconds", "1.5", "-j", "2"]
    (here / "tmp").mkdir()
    program = "import zpatch.cli; zpatch.cli.main()"
    with forked.start(program, *command, TMPDIR=str(here / "tmp")) as process:
        until = time.monotonic() + 60
        while not list((here / "tmp").glob("*/cold-1")) and time.monotonic() < until:
            time.sleep(0.01)
        readers = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "zpatch: interrupted"
    assert len(readers) >= 2
    assert not any(reader.is_running() for reader in readers)
    assert list((here / "tmp").iterdir()) == []


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_an_interruption_between_the_images_of_a_case_leaves_none_of_it(
    run: Run, cohort_source: Path, here: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    source = only(cohort_source, here / "scans", "sub-01", "sub-02")
    rename, moves = Path.rename, 0

    def rename_until(self: Path, target: Path) -> Path:
        nonlocal moves
        moves += STAGING in self.parts
        if moves == moment and STAGING in self.parts:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_until)
    assert run("convert", source, "a.zarr", "-q")[0] == 130
    cohort = zp.Cohort("a.zarr")
    assert cohort.names == ["sub-01"][: moment > 2]
    assert all(list(subject.images) == ["seg", "t1"] for subject in cohort)
    report = zp.verify("a.zarr")
    assert (report.damages, report.leftovers) == ((), ())


def test_a_second_writer_is_refused(refused: Callable[..., str], cohort_source: Path, store: Path) -> None:
    from zpatch.store.store_writer import StoreWriter

    with StoreWriter.create(store, {}, overwrite=True):
        line = refused("convert", cohort_source, store, "--overwrite")
    assert f"process {os.getpid()} on " in line
    assert "is writing to it; wait until it has ended" in line


def test_a_dry_run_says_how_long_the_network_takes_and_what_is_done_already(run: Run, store: Path) -> None:
    command = ("predict", store, "out.zarr", "--model", "nets_of_cli:doubling", *PREDICT)
    _, out, _ = run(*command, "--dry-run")
    line = r"the network takes [\d.e-]+ s for a batch of 1: about \d+:\d\d for (\d+) patches"
    [patches] = re.findall(line, out.splitlines()[-1])
    assert "done already" not in out
    run(*command)
    _, out, _ = run(*command, "--dry-run")
    assert re.search(line, out.splitlines()[-1]).group(1) == "0"
    assert len(re.findall(r"^sub-0\d: (\d+) of \1 patches are done already$", out, re.MULTILINE)) == 4
    shutil.rmtree("out.zarr/sub-02/prediction/0/c")
    _, out, _ = run(*command, "--dry-run", "--json")
    left = {plan["subject"]: plan["patches_left"] for plan in json.loads(out)}
    assert left["sub-02"] > 0
    assert not any(count for name, count in left.items() if name != "sub-02")
    assert sum(left.values()) < int(patches)
    assert run(*command, "--overlap", "10", "--dry-run")[0] == 1
