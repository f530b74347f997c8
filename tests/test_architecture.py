"""The house: which room stands on which floor, and which third-party library comes in by which door."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import zpatch

ROOT = Path(zpatch.__file__).parent

# A module imports from lower floors, or from earlier lines of its own floor.
FLOORS = {
    "values": [
        "errors",
        "geometry/boxes",
        "geometry/orientation",
        "sampling/randomness",
        "chunks/_decode",
        "chunks/_voxels",
        "chunks/_gather",
        "store/_count",
        "blending/_blend",
        "chunks/scaling",
        "blending/windows",
    ],
    "plans and records": [
        "geometry/patch_grid",
        "blending/tiling",
        "prediction/peak_memory",
        "chunks/layout",
        "store/image_record",
        "runtime/byte_sizes",
        "geometry/padding",
        "runtime/buffer_pool",
        "store/voxel_statistics",
        "report/markup",
        "report/png",
    ],
    "doors": [
        "nifti/gzip_streams",
        "nifti/header_affine",
        "nifti/header",
        "nifti/writer",
        "chunks/codec",
        "chunks/mapped_shards",
        "chunks/shard_writer",
        "store/manifest",
        "store/store",
        "images/zarr_images",
        "store/lock",
        "store/store_writer",
        "runtime/tasks",
        "runtime/process_memory",
        "conversion/cases",
        "conversion/case_lists",
        "conversion/folder_conventions",
        "conversion/discovery",
    ],
    "subjects": [
        "store/voxel_index",
        "sampling/centre_draws",
        "conversion/pyramid",
        "store/image_writer",
        "prediction/shard_ledger",
        "chunks/gather",
        "report/planes",
        "images/group_read",
        "images/chunk_cache",
        "images/opened_image",
        "images/image",
        "images/normalization",
        "sampling/centre_maps",
        "images/cohort",
        "sampling/patch",
    ],
    "stages": [
        "conversion/conversion_plan",
        "conversion/conversion",
        "conversion/nifti_export",
        "store/verification",
        "report/problems",
        "report/pictures",
        "report/summary",
        "report/page_parts",
        "report/subject_section",
        "report/style",
        "report/page",
        "report/report",
        "bench/trial_stores",
        "bench/reading_speed",
        "bench/benchmark",
        "bench/advice",
        "sampling/samplers",
        "loading/epoch_plan",
        "loading/queue_state",
        "loading/shared_slots",
        "loading/worker",
        "loading/patch_feed",
        "loading/patch_buffer",
        "loading/patch_queue",
        "loading/subjects_loader",
        "blending/reduction",
        "blending/sinks",
        "blending/grid_blend",
        "blending/tile_spill",
        "blending/scattered_blend",
        "blending/aggregator",
        "prediction/network",
        "prediction/prediction_plan",
        "prediction/regions",
        "prediction/region_run",
        "prediction/prediction_run",
        "prediction/inference",
    ],
    "edge": [
        "__init__",
        "cli/options",
        "cli/progress",
        "cli/__init__",
        "cli/bench",
        "cli/convert",
        "cli/export",
        "cli/info",
        "cli/predict",
        "cli/report",
        "cli/verify",
        "compat/__init__",
        "compat/nifti_cache",
        "compat/transforms",
        "compat/monai",
        "compat/epoch_queues",
        "compat/torchio1_subjects",
        "compat/torchio1",
        "compat/torchio0",
        "compat/torchio2",
    ],
}
ROOMS = list(itertools.chain(*FLOORS.values()))
EDGE = FLOORS["edge"]
COMMAND_LINE = [room for room in EDGE if room.startswith("cli/")]

# Where each third-party library may be imported; whatever is not listed may be imported nowhere.
DOORS = {
    "numpy": ROOMS,
    "torch": [*FLOORS["subjects"], *FLOORS["stages"], *EDGE],
    "nibabel": ["nifti/header"],
    "isal": ["nifti/gzip_streams"],
    "zarr": ["store/store", "store/store_writer", "images/zarr_images"],
    "numcodecs": ["chunks/codec"],
    "google_crc32c": ["chunks/codec"],
    "dask": ["runtime/tasks", "images/group_read", "images/opened_image"],
    "distributed": ["runtime/tasks"],
    "cloudpickle": ["prediction/prediction_run"],
    "monai": ["compat/transforms"],
    "torchio": ["compat/transforms"],
    "click": COMMAND_LINE,
}
STANDARD_LIBRARY_DOORS = {
    "gzip": ["nifti/gzip_streams"],
    "mmap": ["runtime/buffer_pool", "chunks/mapped_shards", "loading/shared_slots"],
    "importlib": ["__init__", "prediction/network", *COMMAND_LINE],  # an import that no table can hold
}
HEAVY = [
    "zarr",
    "dask",
    "distributed",
    "torch",
    "nibabel",
    "isal",
    "numcodecs",
]  # may be imported inside functions
WORLD = (
    "os io shutil pathlib tempfile time datetime random secrets socket subprocess threading multiprocessing"
)
COMPILED = {
    "chunks/_gather": ".c",
    "chunks/_decode": ".h",
    "chunks/_voxels": ".h",
    "store/_count": ".c",
    "blending/_blend": ".c",
}
MAX_LINES = {".py": 400, ".c": 550, ".h": 400}


@dataclass(frozen=True)
class Import:
    """One name of an import statement: ``module`` is what is loaded, ``deferred`` whether in a function."""

    module: str
    line: int
    deferred: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


def path_of(room: str) -> Path:
    return ROOT / f"{room}{COMPILED.get(room, '.py')}"


def room_of(module: str) -> str:
    """The room of a module of zpatch: ``zpatch.cli.info`` -> ``cli/info``; a package -> its __init__."""
    room = "/".join(module.split(".")[1:])
    return room if path_of(room).is_file() else f"{room}/__init__".lstrip("/")


@cache
def imports_of(room: str) -> list[Import]:
    return [] if room in COMPILED else list(_imports(ast.parse(path_of(room).read_text()), deferred=False))


def _imports(node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        assert node.module is not None
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            is_module = inner.startswith("zpatch.") and path_of("/".join(inner.split(".")[1:])).is_file()
            yield Import(inner if is_module else node.module, node.lineno, deferred)
    else:
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, deferred=inside)


def own_imports_of(room: str) -> list[Import]:
    return [found for found in imports_of(room) if found.library == "zpatch"]


def told(room: str, found: list[Import]) -> list[str]:
    return [f"{room}.py:{at.line} imports {at.module}" for at in found]


def existing_rooms() -> list[str]:
    files = itertools.chain(*(ROOT.rglob(f"*{suffix}") for suffix in MAX_LINES))
    return sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in files)


def standing(rooms: list[str]) -> list[str]:
    """Those of the rooms that exist: one that does not is reported once, by the test of the table."""
    return [room for room in rooms if path_of(room).is_file()]


EXISTING = existing_rooms()


def test_the_table_lists_every_module_once_and_no_other() -> None:
    assert sorted(ROOMS) == EXISTING


@pytest.mark.parametrize("room", standing(ROOMS))
def test_a_module_imports_only_from_below(room: str) -> None:
    below = ROOMS[: ROOMS.index(room)]
    upward = [found for found in own_imports_of(room) if room_of(found.module) not in below]
    assert told(room, upward) == []


@pytest.mark.parametrize("room", EXISTING)
def test_a_third_party_library_comes_in_by_its_door_only(room: str) -> None:
    known = {*sys.stdlib_module_names, "zpatch"}
    astray = [
        found
        for found in imports_of(room)
        if found.library not in known and room not in DOORS.get(found.library, [])
    ]
    assert told(room, astray) == []


@pytest.mark.parametrize("room", EXISTING)
def test_a_few_modules_of_the_standard_library_have_their_door_too(room: str) -> None:
    astray = [
        found
        for found in imports_of(room)
        if found.module in STANDARD_LIBRARY_DOORS and room not in STANDARD_LIBRARY_DOORS[found.module]
    ]
    assert told(room, astray) == []


@pytest.mark.parametrize("room", standing([room for room in ROOMS if room not in EDGE]))
def test_only_heavy_libraries_are_imported_inside_functions(room: str) -> None:
    deferred = [found for found in imports_of(room) if found.deferred and found.library not in HEAVY]
    assert told(room, deferred) == []


@pytest.mark.parametrize("room", standing(FLOORS["values"] + FLOORS["plans and records"]))
def test_values_plans_and_records_know_no_files_no_clocks_and_no_processes(room: str) -> None:
    worldly = [found for found in imports_of(room) if found.library in WORLD.split()]
    assert told(room, worldly) == []


@pytest.mark.parametrize("room", EXISTING)
def test_no_module_is_too_long(room: str) -> None:
    assert len(path_of(room).read_text().splitlines()) <= MAX_LINES[path_of(room).suffix]


@pytest.mark.parametrize("room", EXISTING)
def test_a_module_is_named_by_a_noun_of_the_data_flow(room: str) -> None:
    name = Path(room).name
    assert not {"util", "utils", "common", "helper", "helpers", "misc"} & set(name.split("_"))
    assert name not in sys.stdlib_module_names


@pytest.mark.parametrize("module", ["zpatch", "zpatch.cli"])
def test_importing_the_package_or_its_command_line_loads_nothing_heavy(module: str) -> None:
    heavy = [*HEAVY, "numpy"]
    program = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", zpatch.__all__)
def test_every_public_name_is_there_and_comes_from_the_package(name: str) -> None:
    value = getattr(zpatch, name)
    assert value.__name__ == name
    assert value.__module__.startswith("zpatch.")
    assert value.__doc__


def test_public_names_are_listed_by_dir_and_unknown_ones_are_attribute_errors() -> None:
    assert set(zpatch.__all__) <= set(dir(zpatch))
    with pytest.raises(AttributeError, match="module 'zpatch' has no attribute 'Sampler'"):
        zpatch.Sampler  # noqa: B018 - the access is what is tested
