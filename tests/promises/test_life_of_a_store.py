"""A store and its predictions, through commands, kills, damage and repairs in any order, against a model.

The model says which version of each image must be there and which files are damaged; it reads the manifest
without zpatch. After each step both stores are opened, read and verified. A failure prints its steps as a
program, shrunk. With --full, ``ZPATCH_STATEFUL_MINUTES=30`` runs examples for that long, and
``ZPATCH_STATEFUL_SEED=7`` repeats those of a seed that a failure named.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import forked
import hypothesis
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from record import TRIES
from test_faults import harmed
from test_prediction_damage import Killed, killed_at

import zpatch as zp
import zpatch.cli
from zpatch.chunks.layout import plan_output_layout
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import DamageError, StoreError
from zpatch.planning import regions
from zpatch.records.names import LOCK, MANIFEST, MANIFEST_TABLE, ROOT_DOCUMENT, STAGING, UNFINISHED
from zpatch.store.lock import take_lock
from zpatch.store.store_writer import StoreWriter

Key = tuple[str, str]
Json = dict[str, Any]

SUBJECTS = ("ann", "bob", "cat")
IMAGES = ("t1", "seg")
SHAPE = (5, 6, 9)  # (I, J, K): in three shards
CHUNK = 4
LAYER_BYTES = CHUNK * 8 * 8 * 2  # of one layer of chunks
BASE_BYTES = 2**26
PATCHES = ("--patch-size", CHUNK, "--overlap", 2, "--blend", "crop", "--batch-size", 8, "--device", "cpu")
PREDICTION = "prediction"
VOXELS = "0/c/"  # of an image, the files of its shards


# Voxels


@dataclass(frozen=True)
class Scan:
    """A source file: ``seed`` is that of its voxels, ``mtime_ns`` no other file has.

    Its ``fault`` is "short" (found when headers are read) or "voxels" (the last ones are missing, which is
    found when they are read), if it has one.
    """

    seed: int
    mtime_ns: int
    fault: str = ""

    def has_bytes_of(self, other: Scan | None) -> bool:
        return other is not None and (self.seed, self.fault) == (other.seed, other.fault)


@functools.cache
def voxels_of(image: str, seed: int) -> Any:
    """The voxels (I, J, K) of an image; a prediction is of the image t1."""
    if image == PREDICTION:
        return voxels_of("t1", seed).astype(np.float32) * 2 + 1
    top, dtype = (3, np.uint8) if image == "seg" else (900, np.int16)
    return np.random.default_rng([seed, len(image)]).integers(0, top, SHAPE).astype(dtype)


@functools.cache
def file_of(image: str, seed: int, fault: str) -> bytes:
    voxels = voxels_of(image, seed)
    plain = nib.Nifti1Image(voxels, np.eye(4), dtype=voxels.dtype).to_bytes()
    packed = gzip.compress(plain[:-10] if fault == "voxels" else plain, mtime=0)
    return packed[:100] if fault == "short" else packed


class Twice(torch.nn.Module):
    """A network that looks at one voxel at a time, so that blending changes nothing."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * 2 + 1


def network() -> Twice:
    return Twice()


# The model of a store


class Harmed(NamedTuple):
    """A damaged file: what verify says of it, and the bytes that it had."""

    what: str
    before: bytes


@dataclass
class Model:
    """What must be in a store.

    Attributes:
        path: Its folder.
        images: The version of each image that was committed last.
        damaged: The damaged files, by path relative to the store.
        in_flight: Images that a killed writer was about to commit or to mend: until another writer opens the
            store, their files may be the old ones, the new ones, or missing.
        left: What killed writers may have left behind: no file anywhere else is unknown.
        expected: Of predictions: the subjects that are meant to be there.
        is_half: Whether a writer was killed before it had made the store, or had removed the one before.
        begun: Of predictions: the version of the input of each subject that was begun last.
        spoilt: Of predictions: shards that were changed after they were written and before they were
            committed, by subject and path relative to the image.
        history: The version of an image that each line of the manifest is about, by its digest.
    """

    path: Path
    images: dict[Key, Scan] = field(default_factory=dict)
    damaged: dict[str, Harmed] = field(default_factory=dict)
    in_flight: set[Key] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    expected: list[str] = field(default_factory=list)
    is_half: bool = False
    begun: dict[str, Scan] = field(default_factory=dict)
    spoilt: set[tuple[str, str]] = field(default_factory=set)
    history: dict[str, Scan] = field(default_factory=dict)

    def forget(self) -> None:
        """Of the store nothing is left, or nothing counts."""
        for found in (self.images, self.damaged, self.in_flight, self.left, self.begun, self.spoilt):
            found.clear()  # type: ignore[attr-defined]
        self.expected = []
        self.is_half = False

    @property
    def is_there(self) -> bool:
        """Whether there is a store: it may be damaged."""
        return self.path.exists() and not self.is_half

    @property
    def is_sound(self) -> bool:
        """Whether there is a store whose root document and manifest are not damaged."""
        return self.is_there and not {ROOT_DOCUMENT, MANIFEST} & self.damaged.keys()

    @property
    def is_vacant(self) -> bool:
        """Whether a new store is made at the path."""
        names = set(os.listdir(self.path)) if self.path.exists() else set()
        return names <= {LOCK, STAGING, ROOT_DOCUMENT, f"{ROOT_DOCUMENT}.partial"}

    @property
    def subjects(self) -> list[str]:
        return sorted({subject for subject, _ in self.images})

    def manifest(self) -> tuple[bytes, int] | None:
        """The bytes of the manifest, and when it was made or changed."""
        file = self.path / MANIFEST
        with contextlib.suppress(FileNotFoundError):
            return file.read_bytes(), file.stat().st_ctime_ns
        return None

    def lines(self) -> dict[Key, Json]:
        """The last line of each image."""
        found = parsed(read(self.path / MANIFEST) or b"")
        assert found is not None
        return found

    def harm_of(self, key: Key) -> list[str]:
        """The damaged files of an image."""
        start = "/".join(key) + "/"
        return [name for name in self.damaged if name.startswith(start)]

    def lost_voxels(self, key: Key) -> bool:
        """Whether a shard of an image is damaged."""
        return any(name.startswith("/".join((*key, VOXELS))) for name in self.damaged)

    def is_damaged_still(self, name: str) -> bool:
        """Whether a damaged file is not as its line of the manifest says; or a document not as before."""
        subject, _, rest = name.partition("/")
        image, _, file = rest.partition("/")
        if line := self.lines().get((subject, image)):
            return bool(fault(self.path / name, *line["files"][file]))
        return read(self.path / name) != self.damaged[name].before

    def replace(self, key: Key, scan: Scan) -> None:
        """A new version of an image was committed, with the document of its subject."""
        self.images[key] = scan
        self.forget_damage_of(key)
        seals = self.lines()[key]["files"]
        for name in {name for subject, name in self.spoilt if subject == key[0]}:
            self.spoilt.discard((key[0], name))
            if what := fault(self.path / "/".join((*key, name)), *seals[name]):
                self.damaged["/".join((*key, name))] = Harmed(what, b"")

    def forget_damage_of(self, key: Key) -> None:
        for name in (*self.harm_of(key), f"{key[0]}/{ROOT_DOCUMENT}"):
            self.damaged.pop(name, None)

    def note_lines(self) -> None:
        """Remember which version each line is about."""
        for key, line in self.lines().items():
            self.history.setdefault(line["check"], self.images[key])

    def opened_by_writer(self) -> None:
        """What was in flight is as before or as after, and so is damage that was to be mended."""
        flying = {subject for subject, _ in self.in_flight}
        for name in [name for name in self.damaged if name.partition("/")[0] in flying]:
            if not self.is_damaged_still(name):
                del self.damaged[name]
        self.in_flight.clear()
        self.left.discard(STAGING)

    def lose_lines(self) -> None:
        """The manifest was changed: either it cannot be read, or it says what is committed now.

        A line that was cut off in its middle does not exist. If it replaced an older one, that one counts,
        whose files are gone. A document that still has a line is sealed, also of a subject without images;
        one that has none is not, also of a subject with images.
        """
        found = parsed(read(self.path / MANIFEST) or b"")
        assert found is not None
        sealed = self.sealed_documents()
        kept = {name: harm for name, harm in self.damaged.items() if name in sealed}
        for key, line in found.items():
            self.images[key] = self.history[line["check"]]
            for name, seal in line["files"].items():
                what = fault(self.path / "/".join(key) / name, *seal)
                self.damaged.pop(file := "/".join((*key, name)), None)
                if what:
                    self.damaged[file] = Harmed(what, b"")
        for key in self.images.keys() - found.keys():
            del self.images[key]
            self.forget_damage_of(key)
            self.left |= {key[0], "/".join(key)}
        self.damaged |= kept
        for name in set(self.damaged) - sealed:
            if name.partition("/")[2] == ROOT_DOCUMENT:  # of a subject
                del self.damaged[name]

    def sealed_documents(self) -> set[str]:
        """The documents outside the images that the manifest has a line of."""
        lines = map(unsealed, (read(self.path / MANIFEST) or b"").split(b"\n")[:-1])
        return {line["document"] for line in lines if line and "document" in line}

    def expect_after_kill(self, planned: dict[Key, Scan], before: dict[Key, Json]) -> None:
        """A writer was killed that was about to commit some images: each subject as before, or as planned."""
        after = self.lines()
        assert after.keys() <= self.images.keys() | planned.keys()
        changed = {key for key in after if after[key] != before.get(key)}
        assert changed <= planned.keys()
        for subject in {subject for subject, _ in changed}:
            same = {key for key in planned if key[0] == subject} - changed
            assert all(self.images.get(key) == planned[key] for key in same), "half a subject is committed"
        for key in changed:
            self.replace(key, planned[key])
        self.note_lines()
        self.in_flight |= planned.keys() - changed
        self.left |= {STAGING, UNFINISHED, *(s for s, _ in planned), *map("/".join, planned)}

    def expect_after_killed_start(self, planned: dict[Key, Scan], manifest: tuple[bytes, int] | None) -> None:
        """The same of a writer that was to remove the store, and to make a new one."""
        now = self.manifest()
        if now == manifest and now is not None and parsed_root(self.path):  # nothing was removed
            return
        self.forget()
        self.is_half = now is None or not parsed_root(self.path)
        if not self.is_half:
            self.expect_after_kill(planned, {})
        self.left |= {STAGING, UNFINISHED}


def unsealed(line: bytes) -> Json | None:
    """The value of a line, with its digest; None if it has not the digest that it names."""
    try:
        value = json.loads(line)
        rest = {key: value[key] for key in value if key != "check"}
        compact = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        is_whole = value["check"] == hashlib.blake2b(compact, digest_size=16).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return value if is_whole else None


def parsed(manifest: bytes) -> dict[Key, Json] | None:
    """The last whole line of each image; None if a line is damaged."""
    lines = [unsealed(line) for line in manifest.split(b"\n")[:-1]]
    if None in lines:
        return None
    return {(line["subject"], line["image"]): line for line in lines if line and "image" in line}


def parsed_root(store: Path) -> Json:
    """The attributes of the root document; none where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return dict(json.loads((store / ROOT_DOCUMENT).read_bytes())["attributes"]["zpatch"])
    return {}


def fault(file: Path, length: int, checksum: str) -> str:
    """What is wrong with a file, in the words of verify; nothing if it is as it was written."""
    data = read(file)
    if data is None:
        return "it is missing"
    if len(data) != length:
        return f"it has {len(data)} bytes instead of {length}"
    is_same = hashlib.blake2b(data, digest_size=16).hexdigest() == checksum
    return "" if is_same else "its contents have changed"


def read(file: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return file.read_bytes()
    return None


# Commands


class Ran(NamedTuple):
    """How a command ended: its exit code, or that it was killed, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def refusal(self) -> str:
        """The one line of an error."""
        assert self.code == 1, self
        *said, line = self.err.splitlines()
        assert all(each.startswith("failed: ") for each in said), self.err
        assert line.startswith("zpatch: error: "), self.err
        assert "unexpected" not in line
        assert "Traceback" not in self.err
        return line


class Kill(NamedTuple):
    """When a command is killed: at a step of its work on files, counted from its beginning or from its first
    commit, or, in a process, after a time."""

    at: int = 0
    in_commit: bool = False
    after_s: float = 0
    in_process: bool = False


@contextlib.contextmanager
def killed(kill: Kill | None) -> Iterator[None]:
    """From some step on nothing more is done to any file."""
    if kill is None or not kill.in_commit:
        with killed_at(kill.at if kill else 10**9):
            yield
        return
    with contextlib.ExitStack() as until_end:
        patch = until_end.enter_context(pytest.MonkeyPatch.context())
        rename = Path.rename

        def first(self: Path, target: Path) -> Path:
            patch.setattr(Path, "rename", rename)
            until_end.enter_context(killed_at(kill.at))
            return self.rename(target)

        patch.setattr(Path, "rename", first)
        yield


def converting(source: Path, store: Path, jobs: int = 1) -> tuple[Any, ...]:
    """A conversion in which a shard has one layer of chunks."""
    memory = jobs * (BASE_BYTES + 2 * LAYER_BYTES)
    return "convert", source, store, "--chunk", CHUNK, "--max-memory", memory, "--jobs", jobs


def predicting(cohort: Path, store: Path, jobs: int = 1) -> tuple[Any, ...]:
    """A prediction with a network that looks at one voxel at a time."""
    model = "--model", "test_life_of_a_store:network", "--image", "t1", "--jobs", jobs
    return "predict", cohort, store, *model, *PATCHES


def small_shards() -> Any:
    """As predictions of large volumes have several shards, those of tiny ones have them."""
    return functools.partial(plan_output_layout, chunk=CHUNK)


def run_in_child(arguments: list[str], kill_at: int) -> None:
    torch.set_num_threads(1)
    regions.plan_output_layout = small_shards()  # type: ignore[attr-defined]
    if kill_at:
        harmed(Path(arguments[2]), kill_at=kill_at)
    sys.exit(zpatch.cli.run(arguments))


def run(arguments: Sequence[Any], kill: Kill | None, folder: Path) -> Ran:
    """Run a command as in a new process."""
    close_shards(folder)
    texts = [*map(str, arguments), "-q"]
    if kill is not None and kill.in_process:
        with forked.start(run_in_child, texts, kill.at, folder=folder) as process:
            if kill.after_s:
                time.sleep(kill.after_s)
                process.kill()
            out, err = process.communicate()
            return Ran(process.wait(), out, err)
    with (
        killed(kill),
        contextlib.redirect_stdout(io.StringIO()) as out_,
        contextlib.redirect_stderr(io.StringIO()) as err_,
    ):
        try:
            code = zpatch.cli.run(texts)
        except Killed:
            code = -signal.SIGKILL
    if code < 0:
        gc.collect()  # what it held open is closed, as at the end of a process
    return Ran(code, out_.getvalue(), err_.getvalue())


def changed(data: bytes, how: str, place: int) -> bytes | None:
    """The bytes of a file with one bit flipped or only its first ones; None if it is deleted."""
    flipped = bytearray(data)
    flipped[place % len(data)] ^= 1 << place % 8
    return {"flip": bytes(flipped), "truncate": data[: place % len(data)], "delete": None}[how]


# Strategies

subjects = st.sampled_from(SUBJECTS)
images = st.sampled_from(IMAGES)
seeds = st.integers(0, 3)
steps = st.integers(1, 120)
kills_here = steps.map(Kill) | st.integers(1, 12).map(lambda at: Kill(at, in_commit=True))
kills_in_process = steps.map(lambda at: Kill(at, in_process=True)) | st.integers(1, 600).map(
    lambda ms: Kill(after_s=ms / 1000, in_process=True)
)


# The machine


class Life(RuleBasedStateMachine):
    """Commands and mishaps in any order."""

    really = False  # whether commands are also killed by a signal, in processes

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="life-"))
        self.source = self.folder / "source"
        self.source.mkdir()
        self.clock = itertools.count(10**18, 10**9)
        self.exports = itertools.count()
        self.sources: dict[str, dict[str, Scan]] = {subject: {} for subject in SUBJECTS}
        self.cohort = Model(self.folder / "cohort.zarr")
        self.predictions = Model(self.folder / "predictions.zarr")
        self.killed: tuple[str, dict[str, Any]] | None = None  # the command that was killed last

    def teardown(self) -> None:
        close_shards(self.folder)
        shutil.rmtree(self.folder)

    def run(self, *arguments: Any, kill: Kill | None = None) -> Ran:
        ran = run(arguments, kill, self.folder)
        hypothesis.event(f"{arguments[0]} ended with {ran.code}")
        return ran

    def circumstances(self, data: st.DataObject, is_killed: bool) -> Json:
        """When a command is killed, if it is, and how many processes it has."""
        kills = kills_here | kills_in_process if self.really else kills_here
        kill = data.draw(kills, "kill") if is_killed else None
        jobs = 1 + (self.really and data.draw(st.booleans(), "two jobs"))
        return {"kill": kill, "jobs": 1 if kill and kill.at else jobs}

    # Sources

    @initialize(is_converted=st.booleans(), is_predicted=st.booleans())
    def begin(self, is_converted: bool, is_predicted: bool) -> None:
        self.save("ann", "t1", Scan(0, next(self.clock)))
        self.save("ann", "seg", Scan(0, next(self.clock)))
        self.save("bob", "t1", Scan(1, next(self.clock)))
        if is_converted or is_predicted:
            self.convert_some(only=None)
        if is_predicted:
            self.predict_all()

    def save(self, subject: str, image: str, scan: Scan) -> None:
        self.sources[subject][image] = scan
        file = self.source / subject / f"{image}.nii.gz"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(file_of(image, scan.seed, scan.fault))
        os.utime(file, ns=(scan.mtime_ns, scan.mtime_ns))

    @rule(
        subject=subjects,
        image=images,
        seed=seeds,
        how=st.sampled_from(["", "", "short", "voxels", "removed"]),
    )
    def change_source(self, subject: str, image: str, seed: int, how: str) -> None:
        """Add, change, touch, spoil or remove a file."""
        if how != "removed":
            self.save(subject, image, Scan(seed, next(self.clock), how))
        elif self.sources[subject].pop(image, None):
            (self.source / subject / f"{image}.nii.gz").unlink()

    # Conversion

    @rule(
        only=st.sampled_from([None, *SUBJECTS]),
        left_out=st.booleans(),
        overwrite=st.booleans(),
        is_killed=st.booleans(),
        data=st.data(),
    )
    def convert(
        self, only: str | None, left_out: bool, overwrite: bool, is_killed: bool, data: st.DataObject
    ) -> None:
        """Convert all, or only a subject, or all but that one."""
        self.convert_some(only, left_out, overwrite, **self.circumstances(data, is_killed))

    def convert_some(
        self,
        only: str | None,
        left_out: bool = False,
        overwrite: bool = False,
        kill: Kill | None = None,
        jobs: int = 1,
    ) -> None:
        model = self.cohort
        known = {} if overwrite else model.images
        options = () if only is None else ("--exclude" if left_out else "--include", only)
        cases = {
            name: files
            for name, files in self.sources.items()
            if files and (only is None or (name == only) != left_out)
        }
        unchanged = {
            name
            for name, files in cases.items()
            if all(scan.has_bytes_of(known.get((name, image))) for image, scan in files.items())
        }
        faults = {
            name: {scan.fault for scan in cases[name].values()} - {""} for name in cases.keys() - unchanged
        }
        good = [name for name, found in faults.items() if not found]
        planned = {(name, image): scan for name in good for image, scan in cases[name].items()}
        starts_over = overwrite and not options
        was_vacant, was_sound, is_empty = model.is_vacant, model.is_sound, not model.images
        manifest, before = model.manifest(), model.lines() if model.is_sound else {}
        arguments = converting(self.source, model.path, jobs)
        ran = self.run(*arguments, *options, *["--overwrite"] * overwrite, kill=kill)
        self.killed = None
        if ran.was_killed:
            self.killed = "convert", {"only": only, "left_out": left_out, "overwrite": overwrite}
            is_removed = is_empty and not planned and not (model.manifest() and parsed_root(model.path))
            if starts_over or was_vacant or (was_sound and is_removed):
                model.expect_after_killed_start(planned, manifest)
            elif was_sound:
                model.expect_after_kill(planned, before)
            return
        if not cases or (
            faults and not good and not unchanged and all("short" in f for f in faults.values())
        ):
            assert ran.refusal()  # nothing is touched
            return
        if not (was_vacant or was_sound) and ran.code == 1 and "can be converted" not in ran.refusal():
            assert str(model.path) in ran.refusal()
            return
        if not good and not unchanged:
            assert "can be converted" in ran.refusal()
            model.opened_by_writer()
            if starts_over or is_empty:
                assert not model.path.exists()
                model.forget()
            return
        assert ran.code == (3 if len(good) < len(faults) else 0), ran
        assert ran.out == f"{model.path}\n"
        assert len(ran.err.splitlines()) == len(faults) - len(good), ran.err
        if starts_over or was_vacant:
            model.forget()
        model.opened_by_writer()
        for key, scan in planned.items():
            model.replace(key, scan)
        model.note_lines()

    # Prediction

    @rule(overwrite=st.booleans(), verify=st.booleans(), is_killed=st.booleans(), data=st.data())
    def predict(self, overwrite: bool, verify: bool, is_killed: bool, data: st.DataObject) -> None:
        self.predict_all(overwrite, verify, **self.circumstances(data, is_killed))

    def predict_all(
        self, overwrite: bool = False, verify: bool = False, kill: Kill | None = None, jobs: int = 1
    ) -> None:
        cohort, model = self.cohort, self.predictions
        if cohort.in_flight:
            return  # a reader may see either version until a writer has opened the store
        flags = [*["--overwrite"] * overwrite, *["--verify"] * verify]
        was_vacant, was_sound = model.is_vacant, model.is_sound
        manifest, before = model.manifest(), model.lines() if model.is_sound else {}
        names = cohort.subjects
        inputs = {name: cohort.images[name, "t1"] for name in names if (name, "t1") in cohort.images}
        planned = {(name, PREDICTION): scan for name, scan in inputs.items()}
        is_new = overwrite or was_vacant
        begun = {} if is_new else self.begun()
        is_other = not is_new and (
            names != model.expected
            or any(model.images.get((name, PREDICTION), scan) != scan for name, scan in inputs.items())
            or any(begun.get(name, scan) != scan for name, scan in inputs.items())
        )
        ran = self.run(*predicting(cohort.path, model.path, jobs), *flags, kill=kill)
        self.killed = None
        if ran.was_killed:
            self.killed = "predict", {"overwrite": overwrite, "verify": verify}
            self.predict_killed(is_new, is_other, planned, manifest, before)
            return
        if ran.code == 1 and not cohort.is_sound:
            assert str(cohort.path) in ran.refusal()
            return
        if not names:
            assert ran.code == 2, ran
            return
        if ran.code == 1 and not (was_vacant or was_sound) and str(model.path) in ran.refusal():
            return
        if is_other:
            assert re.search(r"differs in|made from other inputs", ran.refusal())
            model.opened_by_writer()
            assert model.lines() == before
            return
        self.expect_predictions(ran, names, inputs, verify, is_new and model.manifest() != manifest)

    def predict_killed(
        self,
        is_new: bool,
        is_other: bool,
        planned: dict[Key, Scan],
        manifest: tuple[bytes, int] | None,
        before: dict[Key, Json],
    ) -> None:
        model = self.predictions
        if is_new:
            model.expect_after_killed_start(planned, manifest)
            model.expected = list(parsed_root(model.path).get("expected_subjects", []))
        elif model.is_sound:
            model.expect_after_kill({} if is_other else planned, before)
        if not is_other:
            model.begun |= {name: scan for (name, _), scan in planned.items()}

    def begun(self) -> dict[str, Scan]:
        """The subjects that a run has begun and not committed, with the inputs that it had."""
        unfinished = self.predictions.path / UNFINISHED
        found = self.predictions.begun.items()
        return {
            name: scan for name, scan in found if unsealed(read(unfinished / name / ".ledger.json") or b"")
        }

    def expect_predictions(
        self, ran: Ran, names: list[str], inputs: dict[str, Scan], verify: bool, is_made: bool
    ) -> None:
        """A run that was not refused: which subjects it must have predicted or mended, and which not."""
        cohort, model = self.cohort, self.predictions
        hurt = {name for name in inputs if cohort.harm_of((name, "t1"))}
        lost = {name for name in inputs if cohort.lost_voxels((name, "t1"))}
        if is_made:
            model.forget()
            model.expected = names
        elif not inputs or (inputs.keys() <= lost and ran.code == 1):  # nothing could be planned
            assert ran.refusal()
            return
        model.opened_by_writer()
        after, done = model.lines(), set()
        for name, scan in inputs.items():
            key = (name, PREDICTION)
            is_damaged = key in model.images and self.is_noticed(key, verify)
            if key in model.images and not is_damaged:
                done.add(name)
            elif key in after and not (key in model.images and self.still_damaged(key)):
                assert key in model.images or name not in lost
                model.replace(key, scan)
                model.begun.pop(name, None)
                done.add(name)
            else:
                assert name in hurt, (name, ran)
                model.begun[name] = scan
        assert after.keys() == model.images.keys()
        model.note_lines()
        if not done:
            assert ran.refusal()
        else:
            assert ran.code == (0 if len(done) == len(names) else 3), ran
            assert ran.out == f"{model.path}\n"
        if ran.code:
            model.left.add(UNFINISHED)
        else:
            assert ran.err == ""
            model.left.discard(UNFINISHED)

    def harm_to(self, subject: str) -> list[str]:
        """The damaged files of a prediction, and of the document of its subject."""
        return [name for name in self.predictions.damaged if name.startswith(f"{subject}/")]

    def is_noticed(self, key: Key, verify: bool) -> bool:
        """Whether a run notices damage of an image: by length and documents, or by every byte."""
        harm = {name: self.predictions.damaged[name].what for name in self.harm_to(key[0])}
        quick = [name for name in harm if name.endswith(ROOT_DOCUMENT) or "contents" not in harm[name]]
        return bool(harm if verify else quick)

    def still_damaged(self, key: Key) -> bool:
        return any(map(self.predictions.is_damaged_still, self.harm_to(key[0])))

    def predict_otherwise(self) -> None:
        """Another batch size: nothing is changed."""
        if not self.predictions.is_sound or self.predictions.is_vacant:
            return
        if self.cohort.in_flight or not self.cohort.is_sound or not self.cohort.images:
            return
        before = self.predictions.lines()
        command = predicting(self.cohort.path, self.predictions.path)
        ran = self.run(*command, "--batch-size", 4)
        if any((name, "t1") in self.cohort.images for name in self.cohort.subjects):
            self.predictions.opened_by_writer() if "differs in" in ran.refusal() else None
        assert self.predictions.lines() == before

    # Kills

    # Rules have no preconditions: whether a kill comes before the end of a command may differ between runs.

    @rule(recovers=st.booleans())
    def after_a_kill(self, recovers: bool) -> None:
        """Run the same command again, or only open the stores for writing."""
        if not recovers:
            self.run_the_same_command_again()
            return
        close_shards(self.folder)
        for model, attributes in ((self.cohort, {}), (self.predictions, {"prediction": {}})):
            if model.is_sound and not model.is_vacant:
                with StoreWriter.resume(model.path, attributes):
                    model.opened_by_writer()

    def run_the_same_command_again(self) -> None:
        if self.killed is None:
            return
        name, arguments = self.killed
        if name == "convert":
            self.convert_some(**arguments)
        else:
            self.predict_all(**arguments)

    @rule(way=st.sampled_from(["another writes", "other options"]))
    def be_refused(self, way: str) -> None:
        self.convert_while_another_writes() if way == "another writes" else self.predict_otherwise()

    def convert_while_another_writes(self) -> None:
        if not self.cohort.is_sound or not any(self.sources.values()):
            return
        before = self.cohort.manifest()
        with take_lock(self.cohort.path):
            assert self.run(*converting(self.source, self.cohort.path)).refusal()
        assert self.cohort.manifest() == before

    # Damage

    @rule(
        of=st.sampled_from(["cohort", "predictions", "unfinished work"]),
        number=st.integers(0, 200),
        how=st.sampled_from(["flip", "delete", "truncate"]),
        place=st.integers(0, 10**4),
    )
    def damage(self, of: str, number: int, how: str, place: int) -> None:
        if of == "unfinished work":
            self.damage_unfinished_work(number, how, place)
            return
        model = self.predictions if of == "predictions" else self.cohort
        if not model.is_sound or model.in_flight:
            return
        files = [f"{s}/{i}/{name}" for (s, i), line in model.lines().items() for name in line["files"]]
        sealed = model.sealed_documents()
        files += [name for subject in model.subjects if (name := f"{subject}/{ROOT_DOCUMENT}") in sealed]
        files += [ROOT_DOCUMENT, MANIFEST]
        name = sorted(files)[number % len(files)]
        data = read(model.path / name)
        if name in model.damaged or not data:
            return
        new = changed(data, how, place)
        close_shards(self.folder)
        (model.path / name).unlink()
        if new is not None:
            (model.path / name).write_bytes(new)
        if name == MANIFEST and new is not None and parsed(new) is not None:
            model.lose_lines()
            return
        what = {"flip": "its contents have changed", "delete": "it is missing"}
        cut = f"it has {place % len(data)} bytes instead of {len(data)}"
        model.damaged[name] = Harmed(what.get(how, cut), data)

    def damage_unfinished_work(self, number: int, how: str, place: int) -> None:
        """What is lost is made again; other bytes of a shard are noticed after they are committed only."""
        unfinished = self.predictions.path / UNFINISHED
        files = sorted(file for file in unfinished.rglob("*") if file.is_file())
        if not files:
            return
        file = files[number % len(files)]
        if data := file.read_bytes():
            file.unlink()
            new = changed(data, how, place)
            if new is not None:
                file.write_bytes(new)
        subject, _, *image = file.relative_to(unfinished).parts
        if how == "flip" and image[:1] == [PREDICTION]:
            self.predictions.spoilt.add((subject, "/".join(image[1:])))

    @rule(of_predictions=st.booleans(), by_copy=st.booleans())
    def mend(self, of_predictions: bool, by_copy: bool) -> None:
        self.restore(of_predictions) if by_copy else self.repair(of_predictions)

    def repair(self, of_predictions: bool) -> None:
        """By the command that verify names."""
        model = self.predictions if of_predictions else self.cohort
        if not (model.is_there and model.damaged) or model.in_flight:
            return
        ran = self.verify(model)
        assert ran.code == 4, ran
        names = [MANIFEST] if MANIFEST in model.damaged else model.damaged
        lines = [line for line in ran.err.splitlines() if line.startswith("damaged: ")]
        assert len(lines) == len(names)
        assert all(
            any(line.startswith(f"damaged: {model.path / name}: ") for line in lines) for name in names
        )
        if not model.is_sound:
            assert "restore " in zp.verify(model.path).remedy
            self.restore(of_predictions)
        elif of_predictions:
            assert "'zpatch predict' command with --verify again" in zp.verify(model.path).remedy
            self.predict_all(verify=True)
        else:
            command = f"'zpatch convert SOURCE {model.path} --overwrite --include SUBJECT'"
            assert command in zp.verify(model.path).remedy
            for subject in sorted({name.partition("/")[0] for name in model.damaged}):
                if self.sources[subject]:
                    self.convert_some(only=subject, overwrite=True)

    def verify(self, model: Model) -> Ran:
        close_shards(self.folder)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            return Ran(zpatch.cli.run(["verify", str(model.path)]), "", err.getvalue())

    def restore(self, of_predictions: bool) -> None:
        """From a copy."""
        model = self.predictions if of_predictions else self.cohort
        close_shards(self.folder)
        for name, harm in list(model.damaged.items()):
            if harm.before and not model.in_flight:
                (model.path / name).write_bytes(harm.before)
                del model.damaged[name]

    # Export

    @rule(
        of_predictions=st.booleans(),
        only=st.sampled_from([None, *SUBJECTS]),
        is_killed=st.booleans(),
        step=steps,
    )
    def export(self, of_predictions: bool, only: str | None, is_killed: bool, step: int) -> None:
        model = self.predictions if of_predictions else self.cohort
        if not model.is_sound or model.in_flight:
            return
        keys = {key for key in model.images if only in (None, key[0])}
        target = self.folder / f"exported-{next(self.exports)}"
        kill = Kill(step) if is_killed else None
        ran = self.run("export", model.path, target, *(("--include", only) if only else ()), kill=kill)
        found = {
            (file.parent.name, file.name.partition(".")[0]): file for file in target.rglob("[!.]*.nii.gz")
        }
        assert found.keys() <= keys
        for (subject, image), file in found.items():
            scan = model.images[subject, image]
            assert np.array_equal(np.asanyarray(nib.load(file).dataobj), voxels_of(image, scan.seed))
        if ran.was_killed:
            return
        lost = any(model.lost_voxels(key) or self.lost_header(model, key) for key in keys)
        if not keys or lost:
            assert ran.refusal()
        else:
            assert (ran.code, ran.err) == (0, "")
            assert found.keys() == keys

    def lost_header(self, model: Model, key: Key) -> bool:
        return any(name.startswith("/".join((*key, "nifti/"))) for name in model.damaged)

    # What must be so after each step

    @invariant()
    def both_stores_are_as_they_must_be(self) -> None:
        close_shards(self.folder)
        for model in (self.cohort, self.predictions):
            if model.is_half or not model.path.exists():
                assert not model.images
                with contextlib.suppress(StoreError):
                    assert zp.Cohort(model.path).names == []
                continue
            self.check_verification(model)
            if model.is_sound:
                self.check_voxels(model)
                self.check_files(model)
            elif MANIFEST in model.damaged:
                with pytest.raises(StoreError):
                    zp.Cohort(model.path)

    def check_verification(self, model: Model) -> None:
        report = zp.verify(model.path)
        found = {damage.file: damage.what for damage in report.damages}
        if MANIFEST in model.damaged:
            assert list(found) == [MANIFEST]
            return
        flying = {subject for subject, _ in model.in_flight}
        kept = {name: what for name, what in found.items() if name.partition("/")[0] not in flying}
        expected = {name: harm.what for name, harm in model.damaged.items()}
        assert kept == {name: what for name, what in expected.items() if name.partition("/")[0] not in flying}
        assert set(report.leftovers) <= model.left, report.leftovers
        if ROOT_DOCUMENT not in model.damaged:
            missing = [name for name in model.expected if name not in model.subjects]
            assert list(report.missing_subjects) == missing

    def check_voxels(self, model: Model) -> None:
        cohort = zp.Cohort(model.path)
        assert cohort.names == model.subjects
        for subject in cohort:
            assert {(subject.name, image) for image in subject.images} <= model.images.keys()
        for (subject, image), scan in model.images.items():
            opened = cohort[subject][image]
            try:
                found = opened.data
            except DamageError:
                assert model.lost_voxels((subject, image)) or (subject, image) in model.in_flight
                continue
            if (subject, image) not in model.in_flight:
                assert not model.lost_voxels((subject, image))
                assert found.shape == (1, *SHAPE)
                assert np.array_equal(found[0], voxels_of(image, scan.seed)), (subject, image)

    def check_files(self, model: Model) -> None:
        """No file is anywhere that no line of the manifest names, except where a kill may have left some."""
        known = {LOCK, MANIFEST, MANIFEST_TABLE, ROOT_DOCUMENT}
        known |= {f"{name}/{ROOT_DOCUMENT}" for name in model.subjects}
        known |= {f"{s}/{i}/{name}" for (s, i), line in model.lines().items() for name in line["files"]}
        for file in model.path.rglob("*"):
            name = file.relative_to(model.path).as_posix()
            may_be_left = any(name == left or name.startswith(f"{left}/") for left in model.left)
            may_be_left |= name.endswith(".partial")  # of the root document, and of the table
            assert file.is_dir() or name in known or may_be_left, name


@pytest.fixture
def tiny_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(regions, "plan_output_layout", small_shards())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no kill that is tried here needs it
    monkeypatch.setattr(sys, "unraisablehook", lambda error: None)  # generators are killed too


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("one_thread", "tiny_shards")
def test_a_store_is_what_its_model_says_after_any_commands_kills_damage_and_repairs(
    full: bool, request: pytest.FixtureRequest
) -> None:
    settings = hypothesis.settings(
        max_examples=20 if full else 3,
        stateful_step_count=30 if full else 8,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    until = time.monotonic() + 60 * float(os.environ.get("ZPATCH_STATEFUL_MINUTES", 0))
    first = int(os.environ.get("ZPATCH_STATEFUL_SEED", 0))
    for seed in itertools.count(first):
        try:
            run_state_machine_as_test(hypothesis.seed(seed)(machine(really=full)), settings=settings)
        except BaseException as error:
            error.add_note(f"ZPATCH_STATEFUL_SEED={seed}")
            raise
        if not full or (seed >= first + 4 and time.monotonic() > until):
            break
    request.node.user_properties.append((TRIES, settings.max_examples * (seed - first + 1)))


def machine(*, really: bool) -> type[Life]:
    """A new class, as a seed is set on it."""
    return type("Life", (Life,), {"really": really})
