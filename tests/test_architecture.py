"""The house, where import-linter cannot look: doors, reading order, sizes, names, and what imports load.

Which folder may import which, and by which module each library comes in, is in ``.importlinter``.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import zpatch

ROOT = Path(zpatch.__file__).parent
TESTS = Path(__file__).parent

# The modules of each folder that other folders may import; all others are for the folder itself.
DOORS = {
    "geometry": "boxes affines orientation voxel_grid patch_grid padding",
    "runtime": "byte_sizes buffer_pool process_memory whole_file guarded_files recent dask_graphs failures "
    "tasks task_contract",
    "volume_files": "volume_file nifti_writer formats",
    "chunks": "layout mapped_memory file_mark sharded_array codec mapped_shards shard_writer gather "
    "gather_plan scaling levels",
    "slides": "slide_levels slide_file tiles tissue tiff_writer",
    "resampling": "interpolation resampler axis_taps loops",
    "records": "names image_record image_facts manifest_table manifest",
    "store": "store lock store_writer staged_image image_writer voxel_statistics "
    "voxel_index verification value_counts",
    "conversion": "conversion conversion_plan conversion_options store_export cases case_lists",
    "sources": "voxel_source lazy_array zarr_images input_files image_read group_read voxel_sources "
    "tiled_source resampled_source window_source voxelwise_source chunk_cache",
    "images": "image placed_image subject cohort open_subjects mixtures normalization opened_image "
    "slide_image tissue_map",
    "sampling": "centre_maps patch_sampler samplers grid_sampler patch patch_batch patch_views randomness",
    "epochs": "subject_weights class_balance epoch_plan stream_position",
    "loading": "patch_queue queue_options queue_stats queue_subjects subjects_loader",
    "pipelines": "pipeline torchio_pipeline torchio1_places torchio2_places monai_pipeline",
    "tiling": "windows output_cells axis_tiles volume_tiles",
    "blending": "aggregator blend grid_blend reduction sinks regridding",
    "networks": "model_files model_identity model_axes network",
    "planning": "planning prediction_options model_inputs prediction_plan probe",
    "prediction": "inference prediction_run damaged_tiles stage_times",
    "report": "report slide_report",
    "bench": "benchmark_plan benchmark benchmark_report slide_reading queue_trial advice",
    "compat": "",
    "cli": "",
}
FOLDERS = list(DOORS)
PUBLIC_PATHS = [
    "zpatch.compat.torchio0",
    "zpatch.compat.torchio1",
    "zpatch.compat.torchio2",
    "zpatch.compat.monai",
]
HEAVY = [
    "zarr",
    "dask",
    "distributed",
    "torch",
    "nibabel",
    "isal",
    "numcodecs",
    "rich",
    "jinja2",
    "PIL",
    "tifffile",
    "imagecodecs",
    "openslide",
]
PURE = [
    "digests",
    "geometry/*",
    "chunks/gather_plan",
    "chunks/layout",
    "chunks/scaling",
    "resampling/*",
    "tiling/*",
    "epochs/epoch_plan",
    "planning/peak_memory",
]
WORLD = (
    "os io shutil pathlib tempfile time datetime random secrets socket subprocess threading multiprocessing"
)
MMAP_DOORS = ["runtime/buffer_pool", "chunks/mapped_shards", "records/manifest_table", "loading/shared_slots"]
MAX_LINES = {".py": 350, ".c": 550, ".h": 400}
MAX_FUNCTION_LINES = 40


@dataclass(frozen=True)
class Import:
    """One name of an import statement: ``module`` is what is loaded, ``deferred`` whether in a function."""

    module: str
    line: int
    deferred: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


def module_name(path: Path) -> str:
    """``geometry/boxes`` for the file of ``zpatch.geometry.boxes``."""
    return path.relative_to(ROOT).with_suffix("").as_posix()


PATHS = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = [name for name in PATHS if not name.endswith("__init__")]
FILES = sorted(path for suffix in MAX_LINES for path in ROOT.rglob(f"*{suffix}"))


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


@cache
def imports_of(module: str) -> list[Import]:
    return list(_imports(tree_of(module), deferred=False))


def _imports(node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        assert node.module is not None
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield Import(inner if _own(inner) in MODULES else node.module, node.lineno, deferred)
    else:
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, deferred=inside)


def _own(dotted: str) -> str:
    """``geometry/boxes`` for ``zpatch.geometry.boxes``."""
    return "/".join(dotted.split(".")[1:]) if dotted.startswith("zpatch.") else ""


def described(module: str, found: list[Import]) -> list[str]:
    return [f"{module}.py:{at.line} imports {at.module}" for at in found]


def folder_of(module: str) -> str:
    return module.partition("/")[0] if "/" in module else ""


def modules_of(folder: str) -> set[str]:
    return {module.partition("/")[2] for module in MODULES if folder_of(module) == folder}


def reading_order(folder: str) -> list[str]:
    """The modules that the docstring of a folder lists, each at the start of an indented line."""
    text = ast.get_docstring(tree_of(f"{folder}/__init__"), clean=False) or ""
    return [line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4:5].strip()]


def functions_of(module: str) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef))


# Folders


def test_the_table_of_doors_lists_every_folder() -> None:
    assert sorted(FOLDERS) == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_two_to_twelve_modules(folder: str) -> None:
    assert 2 <= len(modules_of(folder)) <= 12


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder not in ("cli", "compat")])
def test_a_folder_is_described_by_its_modules_in_reading_order_and_holds_no_code(folder: str) -> None:
    assert len(tree_of(f"{folder}/__init__").body) == 1
    order = reading_order(folder)
    assert sorted(order) == sorted(modules_of(folder))
    for number, module in enumerate(order):
        later = {f"zpatch.{folder}.{name}" for name in order[number:]}
        upward = [found for found in imports_of(f"{folder}/{module}") if found.module in later]
        assert described(f"{folder}/{module}", upward) == []


@pytest.mark.parametrize("module", MODULES)
def test_other_folders_come_in_by_their_doors(module: str) -> None:
    inner = [
        found
        for found in imports_of(module)
        if (target := _own(found.module)) in MODULES
        and folder_of(target) not in ("", folder_of(module))
        and target.partition("/")[2] not in DOORS[folder_of(target)].split()
    ]
    assert described(module, inner) == []


def test_no_folder_is_called_as_a_public_name_or_as_a_module_of_the_standard_library() -> None:
    assert not set(FOLDERS) & set(zpatch.__all__)
    assert not set(FOLDERS) & sys.stdlib_module_names


# Modules


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_named_by_a_noun_of_the_data_flow(module: str) -> None:
    name = module.rpartition("/")[2]
    assert not {"util", "utils", "common", "core", "base", "helper", "helpers", "misc"} & set(name.split("_"))
    assert name not in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES[path.suffix]


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_too_long(module: str) -> None:
    """Without its signature and docstring; commands of click describe their options there."""
    for function in functions_of(module):
        if not (folder_of(module) == "cli" and function.name.endswith("_command")):
            body = function.body[1:] if ast.get_docstring(function) is not None else function.body
            lines = 1 + body[-1].end_lineno - body[0].lineno if body and body[-1].end_lineno else 0
            assert lines <= MAX_FUNCTION_LINES, f"{module}.{function.name}"


@pytest.mark.parametrize("module", [m for m in MODULES if folder_of(m) not in ("cli", "compat")])
def test_only_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    deferred = [found for found in imports_of(module) if found.deferred and found.library not in HEAVY]
    assert described(module, deferred) == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES for pure in PURE if Path(m).match(pure)))
def test_arithmetic_and_plans_know_no_files_no_clocks_and_no_processes(module: str) -> None:
    worldly = [found for found in imports_of(module) if found.library in WORLD.split()]
    assert described(module, worldly) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module not in MMAP_DOORS])
def test_files_are_mapped_in_four_places(module: str) -> None:
    assert described(module, [found for found in imports_of(module) if found.library == "mmap"]) == []


@pytest.mark.parametrize("module", MODULES)
def test_names_with_an_underscore_stay_in_their_module(module: str) -> None:
    borrowed = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zpatch.")
        for alias in node.names
        if alias.name.startswith("_")
        and not (node.module or "").rpartition(".")[2].startswith("_")
        and f"{_own(node.module or '')}/{alias.name}" not in COMPILED
    ]
    assert borrowed == []


COMPILED = {module_name(path) for path in ROOT.rglob("*.c")}


def test_tests_mirror_the_folders() -> None:
    for path in TESTS.glob("*/test_*.py"):
        if path.parent.name not in ("promises", "fuzz", "cli", "compat"):
            name = path.stem.removeprefix("test_")
            assert f"{path.parent.name}/{name}" in MODULES, f"{path.parent.name}/{path.name} tests no module"


# Public names


@pytest.mark.parametrize("name", zpatch.__all__)
def test_every_public_name_is_there_and_comes_from_the_package(name: str) -> None:
    value = getattr(zpatch, name)
    assert value.__name__ == name
    assert value.__module__.startswith("zpatch.")
    assert value.__doc__


def test_every_public_name_is_in_one_place() -> None:
    listed = [(name, module) for module, names in zpatch._MODULES.items() for name in names]
    assert sorted(name for name, _ in listed) == sorted(zpatch.__all__)
    for name, module in listed:
        assert getattr(zpatch, name).__module__ == f"zpatch.{module}"
    checked = {
        (alias.name, node.module)
        for block in tree_of("__init__").body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == {(name, f"zpatch.{module}") for name, module in listed}


def test_public_names_are_listed_by_dir_and_unknown_ones_are_attribute_errors() -> None:
    assert set(zpatch.__all__) <= set(dir(zpatch))
    with pytest.raises(AttributeError, match="module 'zpatch' has no attribute 'Sampler'"):
        zpatch.Sampler  # noqa: B018 - the access is what is tested


@pytest.mark.parametrize("path", PUBLIC_PATHS)
def test_public_import_paths_stay(path: str) -> None:
    assert importlib.import_module(path).__doc__


# What an import loads


def loaded_by(statement: str) -> set[str]:
    """The modules that a statement loads, beyond those of Python's own start."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["zpatch", "zpatch.cli"])
def test_importing_the_package_or_its_command_line_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(f"import {module}") & {*HEAVY, "numpy"}


def test_importing_the_package_loads_one_module_of_it_and_hardly_any_other() -> None:
    """So that it takes next to no time: ``python -c pass`` and a few modules of the standard library."""
    loaded = loaded_by("import zpatch")
    assert {name for name in loaded if name.startswith("zpatch")} == {"zpatch"}
    assert {name.partition(".")[0] for name in loaded} <= {*sys.stdlib_module_names, "zpatch"}
    assert len(loaded) < 30, sorted(loaded)
