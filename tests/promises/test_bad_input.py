"""Bad input: a broken file fails its case alone, in one line with advice; an odd one gives a warning."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus
import forked
import nibabel as nib
import numpy as np
import pytest
import zarr
from corpus import BAD, BOMBS, COHORTS, FILES, GOOD, CohortKind, Fate, FileKind
from record import Some

import zpatch as zp
import zpatch.cli
from zpatch.chunks.layout import plan_layout
from zpatch.errors import NiftiError
from zpatch.records.names import MANIFEST, MANIFEST_TABLE
from zpatch.store.store import open_store
from zpatch.volume_files.nifti_header import read_header

pytestmark = pytest.mark.timeout(20)

ADDRESS_SPACE = 4 * 2**30
PEAK_BYTES = 400 * 2**20
UNDER_LIMITS = """
import re, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
import zpatch.cli
code = zpatch.cli.run(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
raise SystemExit(code)
"""

Run = Callable[..., tuple[int, str, str]]


def each(kinds: list[FileKind], *fates: Fate) -> pytest.MarkDecorator:
    chosen = [kind for kind in kinds if kind.fate in fates]
    return pytest.mark.parametrize("kind", chosen, ids=lambda kind: kind.name)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder in which a cohort is made."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def between_good_ones(kind: FileKind, source: Path) -> Path:
    """The folder of the bad case, between two good ones."""
    corpus.goods(source)
    (source / BAD).mkdir()
    kind.make(source / BAD)
    return source / BAD


def only_the_good_ones(store: Path) -> None:
    """The store holds the good cases whole, and nothing at all of the bad one."""
    assert zp.Cohort(store).names == list(GOOD)
    for subject in GOOD:
        np.testing.assert_array_equal(stored(store, subject, "t1"), corpus.VOXELS)
    own = {"zarr.json", MANIFEST, MANIFEST_TABLE, ".lock"}
    assert {entry.name for entry in store.iterdir()} <= {*own, *GOOD}
    assert BAD not in (store / MANIFEST).read_text()
    verified = zp.verify(store)
    assert verified.ok
    assert not verified.leftovers


def stored(store: Path, subject: str, image: str) -> Any:
    return zarr.open_array(store / subject / image / "0", mode="r")[:]


def the_failure(stderr: str) -> str:
    """The line that says which case failed and why."""
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("failed: ")]
    return line.removeprefix("failed: ")


def check_fails_alone(kind: FileKind, folder: Path, code: int, stderr: str) -> None:
    assert code == zpatch.cli.EXIT_SOME_FAILED
    reason = the_failure(stderr)
    assert reason.startswith(f"{BAD}: {folder}{os.sep}")
    assert re.search(kind.says, reason), reason
    assert re.search(r"; \w+", reason), f"it does not say what to do: {reason}"


@each(FILES, "fails")
def test_a_broken_file_fails_its_case_in_one_line_and_no_other(
    kind: FileKind, source: Path, store: Path, run: Run
) -> None:
    folder = between_good_ones(kind, source)
    if kind.name == "unreadable_file" and os.access(folder / "t1.nii.gz", os.R_OK):
        pytest.skip("root reads everything")
    code, _, stderr = run("convert", source, store)
    check_fails_alone(kind, folder, code, stderr)
    only_the_good_ones(store)


@each(FILES, "warns")
def test_an_odd_file_converts_with_a_warning_that_is_stored(
    kind: FileKind, source: Path, store: Path, run: Run
) -> None:
    folder = between_good_ones(kind, source)
    code, _, stderr = run("convert", source, store)
    assert code == 0, stderr
    image = check_converted(kind, folder, store)
    warnings = open_store(store).records[BAD, image].warnings
    assert any(re.search(kind.says, warning) for warning in warnings), warnings
    _, stdout, _ = run("info", store)
    for warning in warnings:
        assert "\n" not in warning
        assert f"warning: {BAD}/{image}: {warning}" in stderr.splitlines()
        assert f"warning: {BAD}/{image}: {warning}" in stdout.splitlines()


@each(FILES, "warns")
def test_strict_turns_a_warning_into_a_failure(kind: FileKind, source: Path, store: Path, run: Run) -> None:
    folder = between_good_ones(kind, source)
    code, _, stderr = run("convert", source, store, "--strict")
    assert code == zpatch.cli.EXIT_SOME_FAILED
    reason = the_failure(stderr)
    assert reason.startswith(f"{BAD}: {folder}{os.sep}")
    assert reason.endswith("(--strict)")
    only_the_good_ones(store)


@each(FILES, "converts")
def test_an_unusual_but_valid_file_converts_without_a_warning(
    kind: FileKind, source: Path, store: Path, run: Run
) -> None:
    folder = between_good_ones(kind, source)
    code, _, stderr = run("convert", source, store, "--strict")
    assert (code, "warning" in stderr) == (0, False), stderr
    image = check_converted(kind, folder, store)
    assert open_store(store).records[BAD, image].warnings == ()


def check_converted(kind: FileKind, folder: Path, store: Path) -> str:
    """The case is in the store with its voxels, and its export is its source; returns its image's name."""
    assert zp.Cohort(store).names == sorted([BAD, *GOOD])
    assert zp.verify(store).ok
    image = "seg" if list(folder.glob("seg.*")) else "t1"
    np.testing.assert_array_equal(stored(store, BAD, image), kind.voxels)
    with np.errstate(over="ignore"):
        voxels = zp.Cohort(store)[BAD][image].data
    assert voxels.shape == (1, *kind.voxels.shape[::-1])
    [original] = [path for path in folder.glob(f"{image}.*") if path.suffix != ".img"]
    if original.suffix != ".hdr":
        [exported] = zp.export(store, store.parent / "back", include=[BAD], images=[image], suffix=".nii")
        assert unzipped(original).startswith(exported.read_bytes())
    return image


def unzipped(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


@each(FILES, "is ignored")
def test_a_file_that_is_not_an_image_is_ignored(kind: FileKind, source: Path, store: Path, run: Run) -> None:
    between_good_ones(kind, source)
    code, _, stderr = run("convert", source, store)
    assert code == 0, stderr
    only_the_good_ones(store)


@pytest.mark.parametrize("kind", [kind for kind in COHORTS if kind.fails_alone], ids=lambda kind: kind.name)
def test_bad_names_fail_their_own_cases_with_path_and_remedy(
    kind: CohortKind, source: Path, store: Path, run: Run
) -> None:
    code, _, stderr = run("convert", kind.make(source), store)
    assert code == zpatch.cli.EXIT_SOME_FAILED
    failed = [line for line in stderr.splitlines() if re.search(kind.says, line)]
    assert failed, stderr
    for line in failed:
        assert line.isprintable()
        assert str(source) in line
        assert re.search("; rename .*, or give it another name in a table: a .csv with columns subject", line)
    assert "unexpected" not in stderr
    assert zp.Cohort(store).names
    assert zp.verify(store).ok


@pytest.mark.parametrize(
    "kind", [kind for kind in COHORTS if not kind.fails_alone], ids=lambda kind: kind.name
)
def test_a_bad_cohort_is_refused_before_anything_is_written(
    kind: CohortKind, source: Path, store: Path, run: Run
) -> None:
    code, stdout, stderr = run("convert", kind.make(source), store)
    assert (code, stdout) == (zpatch.cli.EXIT_ERROR, "")
    [line] = stderr.splitlines()
    assert line.startswith("zpatch: error: ")
    assert line.isprintable()
    assert re.search(kind.says, line), line
    assert "unexpected" not in line
    assert not store.exists()


def under_limits(*arguments: Any) -> tuple[int, str, int]:
    """Run a command with little memory: its exit code, stderr and peak memory in bytes."""
    done = forked.run(UNDER_LIMITS.format(limit=ADDRESS_SPACE), *arguments)
    return done.returncode, done.stderr, int(done.stdout.split()[-1]) * 1024


@each(BOMBS, "fails")
def test_a_bomb_fails_its_case_in_bounded_memory(kind: FileKind, source: Path, store: Path) -> None:
    folder = between_good_ones(kind, source)
    code, stderr, peak_bytes = under_limits("convert", source, store)
    check_fails_alone(kind, folder, code, stderr)
    assert peak_bytes < PEAK_BYTES
    only_the_good_ones(store)


def test_long_headers_are_not_held_in_memory_until_their_case_is_converted(source: Path, store: Path) -> None:
    start = 60 * 2**20
    raw_header = corpus.header(vox_offset=start) + bytes(4)
    data = corpus.of_zeros(start - len(raw_header), raw_header) + corpus.zipped(corpus.VOXELS.tobytes())
    for number in range(8):
        (source / f"{number}.nii.gz").write_bytes(data)
    code, stderr, peak_bytes = under_limits("convert", source, store, "--dry-run")
    assert code == 0, stderr
    assert peak_bytes < PEAK_BYTES


MENDED_AS_NIBABEL_DOES = (
    "voxel_size_of_zero",
    "voxel_size_below_zero",
    "voxel_size_of_zero_with_a_qform",
    "voxel_size_below_zero_with_a_qform",
    "qfac_of_zero",
    "sform_and_qform_that_differ",
    "no_sform_and_no_qform",
)


@pytest.mark.parametrize("name", MENDED_AS_NIBABEL_DOES)
def test_fields_that_a_header_leaves_open_are_read_as_by_nibabel(name: str, tmp_path: Path) -> None:
    [kind] = [kind for kind in FILES if kind.name == name]
    kind.make(tmp_path)
    expected = nib.load(tmp_path / "t1.nii").affine
    np.testing.assert_allclose(read_header(tmp_path / "t1.nii").affine, expected)


def test_among_files_of_all_kinds_the_good_cases_are_converted(source: Path, store: Path, run: Run) -> None:
    expected: dict[Fate, set[str]] = {"fails": set(), "warns": set(), "converts": set()}
    for kind in FILES:
        if kind.fate in expected and kind.name != "unreadable_file":
            folder = source / f"case-{kind.name}"
            folder.mkdir()
            kind.make(folder)
            expected[kind.fate].add(folder.name)
    code, stdout, stderr = run("convert", source, store, "--json", "--jobs", 2)
    assert "zpatch: error" not in stderr, stderr
    cases = json.loads(stdout)["cases"]
    assert code == zpatch.cli.EXIT_SOME_FAILED
    assert {case["subject"] for case in cases if case["status"] == "failed"} == expected["fails"]
    assert zp.Cohort(store).names == sorted(expected["warns"] | expected["converts"])
    assert zp.verify(store).ok


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", os.fsdecode(b"no\xff utf-8")])
def test_a_strange_folder_name_above_a_case_breaks_neither_the_line_nor_the_store(
    source: Path, store: Path, run: Run, name: str
) -> None:
    corpus.goods(source / name)
    (source / name / BAD).mkdir()
    (source / name / BAD / "t1.nii").write_bytes(b"no NIfTI")
    code, _, stderr = run("convert", source, store)
    assert code == zpatch.cli.EXIT_SOME_FAILED
    assert all(line.isprintable() for line in stderr.splitlines())
    assert "t1.nii" in the_failure(stderr)
    only_the_good_ones(store)


@pytest.mark.timeout(300)
def test_every_header_is_read_or_refused_by_an_error_of_zpatch(
    tmp_path: Path, rng: np.random.Generator, some: Some
) -> None:
    path = tmp_path / "t1.nii"
    good = corpus.nifti(codes=(1, 1)) + bytes(2**12)
    reasons: set[str] = set()
    numbers = np.array([np.nan, np.inf, -np.inf, 0, -1, 1e38, 1e-40, 3], "<f4").tobytes()
    for _ in some(range(20_000), 1_000):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(10, 87)) * 4
            start = int(rng.integers(8)) * 4
            data[at : at + 4] = numbers[start : start + 4] if rng.integers(2) else rng.bytes(4)
            data[int(rng.integers(40, 348))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            file = read_header(path)
        except NiftiError as error:
            reasons.add(str(error))
            continue
        assert np.isfinite(file.affine).all()
        assert min(file.shape) > 0
        assert plan_layout(file.shape, file.channel_dtype.itemsize, interleaved=file.interleaved).chunks
    assert reasons
    assert all(reason.startswith(f"{path}: ") and "\n" not in reason for reason in reasons)


def test_every_kind_has_a_different_name() -> None:
    names = [kind.name for kind in (*FILES, *BOMBS, *COHORTS)]
    assert len(names) == len(set(names))
    assert len(names) >= 45
