"""The report: one page that loads nothing, shows the images of a store, and lists its problems."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_pages import Page, change, page_of, save, store_of

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import OptionError, StoreExistsError, UnknownNameError
from zpatch.records.names import MANIFEST
from zpatch.report.report import write_report
from zpatch.store.store_writer import StoreWriter

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e"


@pytest.fixture
def copy(cohort_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))


# The page as a whole


def test_the_page_loads_nothing_and_its_policy_forbids_all_requests(
    cohort_store: Path, tmp_path: Path
) -> None:
    page = page_of(cohort_store, tmp_path)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {name for name, _ in page.elements}
    for name, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("src", "href", "srcset", "data", "action", "poster"):
                assert value.startswith("data:image/png;base64," if name == "img" else "#subject-")
            assert not key.startswith("on")
    [policy] = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r'"data:image[^"]*"', "", text))


def test_the_page_shows_what_the_manifest_records(cohort_store: Path, tmp_path: Path) -> None:
    page = page_of(cohort_store, tmp_path)
    for name, subject in zip(zp.Cohort(cohort_store).names, zp.Cohort(cohort_store), strict=True):
        assert name in page.text
        assert " \N{MULTIPLICATION SIGN} ".join(map(str, subject.spatial_shape)) in page.text
        assert f"{subject.t1.statistics['foreground']['percentile_50']:.4g}" in page.text
    assert "None found." in page.text
    assert all(word in page.text for word in ("lz4", "float32, int16", "seg1 in 4 of 4", "sub-02/t1.nii.gz"))


def test_each_image_has_three_planes_in_its_own_proportions(cohort_store: Path, tmp_path: Path) -> None:
    page = page_of(cohort_store, tmp_path)
    ratios = [float(div["style"].partition(":")[2]) for div in page.all("div") if div.get("class") == "view"]
    wanted = []
    for subject in zp.Cohort(cohort_store):
        i, j, k = np.multiply(subject.spatial_shape, subject.t1.spacing)
        wanted += [i / j, i / k, j / k]
    np.testing.assert_allclose(ratios, wanted, rtol=1e-3)
    assert len(page.all("figure")) == 3 * 4


def test_a_page_stays_small_however_many_images_a_subject_has(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for name in "abcdefgh":
        save(
            tmp_path / "source" / "s" / f"{name}.nii",
            rng.integers(0, 4000, (200, 200, 200), np.int16),
            np.eye(4),
        )
    report = write_report(store_of(tmp_path), tmp_path / "report.html")
    assert report.bytes < 500_000


# Problems


def test_damaged_files_are_listed_and_all_other_images_are_shown(copy: Path, tmp_path: Path) -> None:
    shard = copy / "sub-02" / "t1" / "0" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:1000])
    report = write_report(copy, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert report.damaged
    assert {(p.subject, p.image) for p in report.problems} == {("sub-02", "t1")}
    assert "damaged: sub-02/t1/0/c/0/0/0: it has 1000 bytes instead of" in page.text
    assert "cannot be read" not in page.text  # its outlines can
    assert len(page.pictures()) == 4 * 3 * 2 - 3


def test_damage_that_only_reading_finds_is_listed_at_the_top_too(copy: Path, tmp_path: Path) -> None:
    shard = copy / "sub-03" / "seg" / "0" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    shard.write_bytes(data)
    close_shards(copy)
    report = write_report(copy, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert [problem.is_damage for problem in report.problems] == [True]
    assert report.problems[0].text in text.partition("Images")[0]
    assert "does not match its checksum" in text


def test_missing_subjects_and_images_that_most_subjects_have_are_listed(copy: Path, tmp_path: Path) -> None:
    lines = (copy / MANIFEST).read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"image":"seg"' not in line or '"subject":"sub-04"' not in line]
    (copy / MANIFEST).write_text("".join(kept))
    page = page_of(copy, tmp_path)
    assert "sub-04: seg it is missing, and most subjects have it" in page.text
    model = lambda batch: batch  # noqa: E731
    zp.predict(model, zp.Cohort(copy)[:2], tmp_path / "out", image="t1", patch_size=32)
    lines = (tmp_path / "out" / MANIFEST).read_text().splitlines(keepends=True)
    (tmp_path / "out" / MANIFEST).write_text("".join(line for line in lines if "sub-02" not in line))
    report = write_report(tmp_path / "out", tmp_path / "report.html")
    assert [(problem.text, problem.is_damage) for problem in report.problems] == [
        ("subject 'sub-02' is missing: it was announced, but never committed", True)
    ]


def test_one_warning_of_many_subjects_is_one_line(copy: Path, tmp_path: Path) -> None:
    for name in zp.Cohort(copy).names:
        change(copy, name, "t1", warnings=["it is odd"])
    page = page_of(copy, tmp_path)
    assert page.text.count("sub-01, sub-02, sub-03, sub-04: t1 it is odd") == 1
    assert len([li for li in page.all("li") if "damage" in li.get("class", "")]) == 0


def test_images_of_different_shapes_are_listed(copy: Path, tmp_path: Path) -> None:
    record = zp.Cohort(copy).store.records["sub-01", "seg"]
    shape = [record.shape[0] - 1, *record.shape[1:]]
    change(copy, "sub-01", "t1", shape=shape)
    problems = write_report(copy, tmp_path / "report.html").problems
    assert any(
        "differs from that of seg" in p.text and (p.subject, p.image) == ("sub-01", "t1") for p in problems
    )


def test_predictions_show_their_options_and_their_skipped_voxels(cohort: zp.Cohort, tmp_path: Path) -> None:
    options: Any = {"image": "t1", "patch_size": 8, "mask": "seg", "reduce": "argmax"}
    zp.predict(lambda batch: batch.repeat(1, 2, 1, 1, 1), cohort[:1], tmp_path / "out", **options)
    skipped = zp.Cohort(tmp_path / "out")[0].prediction.statistics["skipped"]
    page = page_of(tmp_path / "out", tmp_path)
    assert "Prediction options" in page.text
    assert all(pair in page.text for pair in ("imaget1", "maskseg", "patch_size8, 8, 8"))
    said = f"{skipped:,}".replace(",", "\u202f")
    assert f"prediction: {said} voxels (" in page.text
    assert ") are outside the mask and were filled, not predicted." in page.text


def test_predictions_show_their_network_their_inputs_and_voxels_that_are_not_finite(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    def network(batch: torch.Tensor) -> torch.Tensor:
        return torch.where(batch > batch.mean(), torch.nan, batch)

    with pytest.warns(UserWarning, match="NaN"):
        zp.predict(network, cohort[:2], tmp_path / "out", image="t1", patch_size=8, overlap_mode="crop")
    records = [subject.prediction.record for subject in zp.Cohort(tmp_path / "out")]
    found = sum(record.stats["not_finite"] for record in records)
    page = page_of(tmp_path / "out", tmp_path)
    name = f"{__name__}.{network.__qualname__}"
    assert f"network{name}, in memory, by zpatch {zp.__version__}inputs{cohort.store.path}NaN" in page.text
    assert f"NaN or infinite{found:,} voxels".replace(",", "\u202f") in page.text
    for record in records:
        path = cohort.store.path / record.subject / "t1"
        assert f"prediction: by {name}, from t1 ({path})" in page.text
    assert "coarser" not in page.text


def test_the_radiological_convention_is_named_only_where_an_affine_is_a_patients(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    plain = zp.Subject(name="slide", image=zp.ScalarImage(np.ones((90, 70, 1), np.float32)))
    options: Any = {"patch_size": (8, 8, 1), "pyramid": True}
    zp.predict(torch.nn.Identity(), [plain], tmp_path / "plain", image="image", **options)
    zp.predict(torch.nn.Identity(), cohort[:1], tmp_path / "patient", image="t1", patch_size=8)
    assert cohort[0].t1.record.affine_source in ("sform", "qform")
    for name, said in (("plain", False), ("patient", True)):
        page = page_of(tmp_path / name, tmp_path)
        assert ("Radiological convention" in page.text, "patient's" in page.text) == (said, said)
        assert "Planes follow the voxel axes." in page.text
        assert ("1 coarser level" in page.text) == (name == "plain")


# Hostile stores


def test_no_text_of_a_store_becomes_markup(copy: Path, tmp_path: Path) -> None:
    for name in zp.Cohort(copy).names:
        stats = zp.Cohort(copy)[name].t1.statistics
        change(
            copy, name, "t1", warnings=[HOSTILE], meta={HOSTILE: HOSTILE, "n": [HOSTILE, {HOSTILE: 1}]},
            split=HOSTILE, spatial_unit=HOSTILE, affine_source=HOSTILE,
            source={"path": HOSTILE, "bytes": 1, "mtime_ns": 1, "checksum": HOSTILE},
            stats={**stats, HOSTILE: 1, "foreground_box": {HOSTILE: 1}},
        )  # fmt: skip
        change(copy, name, "seg", stats={"labels": {HOSTILE: 3}, "foreground": {HOSTILE: 1}})
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["zpatch"] |= {
        "tool": HOSTILE,
        "created": HOSTILE,
        "prediction": {HOSTILE: HOSTILE},
    }
    (copy / "zarr.json").write_text(json.dumps(document))
    shown = copy.rename(tmp_path / "<img src=x onerror=alert(3)>.zarr")
    page = page_of(shown, tmp_path)
    assert len(page.all("script")) == 1
    assert all(img["src"].startswith("data:image/png;base64,") for img in page.all("img"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert HOSTILE.replace("\u202e", "\\u202e") in page.text


@pytest.mark.parametrize(
    "stats",
    [
        {},
        {"foreground": None, "labels": None},
        {"foreground": {"percentile_0_5": float(2**1000), "percentile_99_5": 1}, "min": [], "max": {}},
        {"foreground_box": [[-5, 0, 0], [10**9, 10**9, 10**9]], "labels": {str(2**80): 3, "-7": 1}},
        {"foreground_box": [[1, 2], [3]], "labels": [1, 2], "skipped": -1},
    ],
)
def test_meaningless_statistics_stop_no_report(copy: Path, tmp_path: Path, stats: dict[str, Any]) -> None:
    for subject, image in itertools.product(zp.Cohort(copy).names, ("t1", "seg")):
        change(copy, subject, image, stats=stats)
    assert len(page_of(copy, tmp_path).all("figure")) == 12


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e200])
def test_meaningless_affines_stop_no_report(copy: Path, tmp_path: Path, scale: float) -> None:
    for name in zp.Cohort(copy).names:
        rows = [[scale, 0, 0, 1], [0, 1, 0, 1], [0, 0, scale, 1], [0, 0, 0, 1]]
        change(copy, name, "t1", affine=rows)
    page = page_of(copy, tmp_path)
    assert "IJ, K " in page.text


def test_a_store_without_subjects_has_a_page(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "empty.zarr", {}):
        pass
    assert "Subjects" in page_of(tmp_path / "empty.zarr", tmp_path).text


def test_a_shape_larger_than_memory_is_listed_and_stops_no_report(tmp_path: Path) -> None:
    save(tmp_path / "source" / "s" / "t1.nii", np.ones((5, 6, 7), np.int16), np.eye(4))
    store = store_of(tmp_path)
    change(store, "s", "t1", shape=[10**6] * 3)
    problems = write_report(store, tmp_path / "report.html").problems
    assert any("too large for a picture; convert it with --pyramid" in problem.text for problem in problems)
    change(store, "s", "t1", chunks=[4096] * 3, shards=[4096] * 3)
    assert write_report(store, tmp_path / "report.html").problems


# The command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``zpatch report`` in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_it(*arguments: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = zpatch.cli.run(["report", *map(str, arguments)])
        return code, *capfd.readouterr()

    return run_it


def test_the_command_writes_a_page_and_prints_its_path(run: Run, cohort_store: Path) -> None:
    code, out, err = run(cohort_store)
    assert (code, out) == (0, "report.html\n")
    assert re.search(r"4 subjects, 0 problems, [\d.]+ KiB", err)
    assert run(cohort_store, "--output", "there.html", "-q") == (0, "there.html\n", "")
    assert Path("there.html").read_text() == Path("report.html").read_text()


def test_json_holds_problems_and_counts(run: Run, cohort_store: Path) -> None:
    code, out, _ = run(cohort_store, "--json", "--limit", 1, "--exclude", "sub-04")
    said = json.loads(out)
    assert (code, said["output"], said["problems"]) == (0, "report.html", [])
    assert (said["subjects"], said["pictured"], said["bytes"]) == (3, 1, Path("report.html").stat().st_size)
    page = Page(Path("report.html").read_text())
    assert len(page.all("figure")) == 3
    assert "The first 1 of 3 subjects have pictures below; --limit shows more." in page.text
    assert [a["href"] for a in page.all("a")] == ["#subject-sub-01"]
    assert run(cohort_store, "--limit", 0, "-q")[0] == 0
    assert not Page(Path("report.html").read_text()).all("figure")


def test_damage_gives_exit_code_4_and_a_page(run: Run, copy: Path) -> None:
    (copy / "sub-02" / "t1" / "zarr.json").unlink()
    code, out, err = run(copy, "-q")
    assert (code, out) == (4, "report.html\n")
    assert err == "damaged: sub-02/t1/zarr.json: it is missing\n"
    assert json.loads(run(copy, "--json")[1])["problems"][0]["damage"] is True


def test_stores_and_outputs_that_do_not_exist_are_refused_in_one_line(run: Run, cohort_store: Path) -> None:
    for arguments, expected, text in [
        (["nowhere"], 1, "nowhere: it does not exist; make one with 'zpatch convert"),
        ([cohort_store, "--include", "sub-1"], 1, "did you mean 'sub-01'"),
        (
            [cohort_store, "--output", "no/such/it.html"],
            2,
            "no/such/it.html: there is no folder no/such",
        ),
    ]:
        code, out, err = run(*arguments, "-q")
        assert (code, out, len(err.splitlines())) == (expected, "", 1)
        assert err.startswith("zpatch: error: ")
        assert text in err
    assert run(cohort_store, "--limit", -1)[0] == 2
    assert not list(Path.cwd().iterdir())


def test_only_an_existing_report_is_replaced(cohort_store: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<html>All of it")
    with pytest.raises(StoreExistsError, match=r"thesis.html: it exists and is not a report; choose another"):
        write_report(cohort_store, thesis)
    with pytest.raises(StoreExistsError, match="it exists and is not a report"):
        write_report(cohort_store, tmp_path)
    assert thesis.read_text() == "<html>All of it"
    write_report(cohort_store, tmp_path / "report.html", limit=0)
    write_report(cohort_store, tmp_path / "report.html", limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "thesis.html"]
    with pytest.raises(OptionError, match="limit must be at least 0, not -1"):
        write_report(cohort_store, limit=-1)
    with pytest.raises(UnknownNameError, match="no subject 'x'"):
        write_report(cohort_store, include=["x"])


def test_an_interrupted_report_leaves_the_existing_one(
    cohort_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_report(cohort_store, path, limit=0)
    before = path.read_text()

    def interrupted(*arguments: Any) -> Iterator[str]:
        yield "<!doctype html>"
        raise KeyboardInterrupt

    monkeypatch.setattr("zpatch.report.report.page_html", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(cohort_store, path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


# In a browser


@pytest.fixture(scope="session")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")
    return found


def browse(browser: str, folder: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    switches = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage no-first-run disable-sync hide-scrollbars "
        "disable-background-networking disable-component-update enable-logging=stderr window-size=1200,1600"
    )
    files = f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"
    command = [browser, *(f"--{switch}" for switch in switches.split()), *files, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


def requests_of(log: Path) -> set[str]:
    """The URLs that a page requested, from the browser's log; the browser's own requests have no origin."""
    text = log.read_text()
    text = text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}"
    asked = [
        event["params"] for event in json.loads(text)["events"] if "initiator" in event.get("params", {})
    ]
    return {request["url"] for request in asked if request["initiator"] != "not an origin"}


def test_requests_and_console_messages_of_a_page_are_noticed(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "other.html"
    page.write_text('<script>console.log("a word")</script><img src="http://nowhere.invalid/a.png">')
    done = browse(browser, tmp_path, page, "--dump-dom")
    assert "CONSOLE" in done.stderr
    assert "http://nowhere.invalid/a.png" in requests_of(tmp_path / "net.json")


def test_a_browser_shows_the_page_without_messages_or_requests(
    browser: str, cohort_store: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    write_report(cohort_store, page)
    done = browse(browser, tmp_path, page, f"--screenshot={tmp_path / 'shot.png'}")
    assert "CONSOLE" not in done.stderr
    assert requests_of(tmp_path / "net.json") <= {page.as_uri()}
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert shot.shape == (1600, 1200, 3)
    background = (shot == shot[0, 0]).all(axis=-1)
    assert 0.3 < background.mean() < 0.95
    coloured = np.ptp(shot, axis=-1) > 100
    assert coloured.sum() > 500  # outlines of labels
    dark = (shot.max(axis=-1) < 16).reshape(1600, -1)
    assert dark.sum() > 20_000  # the air around a head


def test_the_filter_appears_only_where_scripts_run(browser: str, cohort_store: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(cohort_store, page)
    assert 'id="filter"' in page.read_text()
    [field] = [field for field in Page(page.read_text()).all("input") if field.get("id") == "filter"]
    assert "hidden" in field
    done = browse(browser, tmp_path, page, "--dump-dom")
    [field] = [field for field in Page(done.stdout).all("input") if field.get("id") == "filter"]
    assert "hidden" not in field
    assert "CONSOLE" not in done.stderr


def test_a_hostile_store_runs_nothing_in_a_browser(browser: str, copy: Path, tmp_path: Path) -> None:
    change(copy, "sub-01", "t1", warnings=[HOSTILE], meta={HOSTILE: HOSTILE}, split=HOSTILE)
    page = tmp_path / "report.html"
    write_report(copy, page)
    done = browse(browser, tmp_path, page, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert len(Page(done.stdout).all("script")) == 1
    assert requests_of(tmp_path / "net.json") <= {page.as_uri()}
