"""Options of the command line: their names in errors, in the environment, and in Python."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import zpatch.cli
from zpatch.chunks.codec import CODECS
from zpatch.cli import COMMANDS
from zpatch.cli.options import flag_of, with_flags
from zpatch.conversion.conversion_options import AFFINES, FORMATS, INTERPOLATIONS, ConvertOptions
from zpatch.conversion.store_export import plan_export
from zpatch.errors import OptionError

MODEL = ("--model", "torch.nn:Identity", "--image", "t1")
PREDICT = (*MODEL, "--patch-size", "24")


def command_of(name: str) -> click.Command:
    command = zpatch.cli.zpatch.get_command(click.Context(zpatch.cli.zpatch), name)
    assert command is not None
    return command


@pytest.fixture
def wrong(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one line, which is returned."""

    def run_it(*arguments: Any) -> str:
        assert zpatch.cli.run([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    return run_it


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--antialias",), "--antialias is for resampling; say --spacing too"),
        (("--orient", "RAX"), "--orient must be three letters as RAS, LPS or PIR, not 'RAX'"),
    ],
)
def test_a_wrong_option_of_convert_is_named_by_its_flag(
    wrong: Callable[..., str], cohort_source: Path, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    assert wrong("convert", cohort_source, tmp_path / "a.zarr", *arguments) == f"zpatch: error: {line}"
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*MODEL, "--patch-size", "0"), "--patch-size must be at least 1 on every axis, not 0"),
        (
            (*PREDICT, "--overlap", "30"),
            "--overlap of 30 voxels on axis I is not smaller than the patch (24)",
        ),
        ((*PREDICT, "--reduce", "argmin"), "--reduce must be "),
        ((*PREDICT, "--device", "abacus"), "--device must be auto, cpu, cuda, "),
        ((*PREDICT, "--axes", "zyx"), "--axes can be given for a Zarr array only"),
    ],
)
def test_a_wrong_option_of_predict_is_named_by_its_flag(
    wrong: Callable[..., str], cohort_store: Path, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    assert line in wrong("predict", cohort_store, tmp_path / "out.zarr", *arguments)
    assert not (tmp_path / "out.zarr").exists()


def test_a_wrong_option_of_export_is_named_by_its_flag(
    wrong: Callable[..., str], cohort_store: Path, tmp_path: Path
) -> None:
    line = wrong("export", cohort_store, tmp_path / "all.nii")
    assert line.endswith("but 8 images were chosen; choose one with --include and --image, or name a folder")


def test_a_wrong_option_of_bench_is_named_by_its_flag(wrong: Callable[..., str], cohort_store: Path) -> None:
    assert "--patch-size must be at least 1 " in wrong("bench", cohort_store, "--patch-size", "0")
    line = wrong("bench", cohort_store, "--patch-size", "24,24,500")
    assert "patch of 500 voxels does not fit axis K of " in line
    assert "use a smaller --patch-size, or say padding_mode='constant' to the sampler" in line


def test_an_error_about_a_memory_limit_names_flags_and_is_not_wrong_usage(
    cohort_source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(cohort_source), str(tmp_path / "a.zarr"), "--max-memory", "1 MiB"]
    assert zpatch.cli.run(command) == 1
    assert "choose a smaller --chunk, fewer --jobs, or allow more" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "option", "shown"),
    [
        ("limit must be at least 1, not a limit", "limit", "--limit must be at least 1, not a limit"),
        ("no image in image 3", "image", "no image in image 3"),
        ("image= names no image", "image", "--image names no image"),
        ("leave padding_mode='edge' out", None, "leave --padding-mode edge out"),
        ("leave jobs=1, say resume=True.", None, "leave --jobs 1, say --resume."),
        ("fill=-1.5 does not fit", "fill", "--fill -1.5 does not fit"),
        ("use a smaller patch_size.", None, "use a smaller --patch-size."),
        ("no file /patch_size/x, patch_size/x, x.patch_size or 'patch_size'", None, None),
        ("no option --max-memory, max_memory_bytes or my_max_memory", None, None),
    ],
)
def test_names_of_options_become_flags_and_other_words_stay(
    text: str, option: str | None, shown: str | None
) -> None:
    flags = [
        "--limit",
        "--image",
        "--padding-mode",
        "--jobs",
        "--resume",
        "--fill",
        "--patch-size",
        "--max-memory",
    ]
    command = click.Command("predict", params=[click.Option([flag]) for flag in flags])
    assert with_flags(text, option, command) == (text if shown is None else shown)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_one_variable_of_the_environment_named_by_its_flag(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = command_of(name)
    ctx = click.Context(command, info_name=name, auto_envvar_prefix=f"ZPATCH_{name.upper()}")
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert len(options) > 3
    for option in options:
        flag = flag_of(option).removeprefix("--").replace("-", "_").upper()
        monkeypatch.setenv(f"ZPATCH_{name.upper()}_{flag}", flag)
    assert all(option.resolve_envvar_value(ctx) for option in options)
    monkeypatch.setenv("ZPATCH_PREDICT_PATCH_OVERLAP", "8")
    monkeypatch.delenv("ZPATCH_PREDICT_OVERLAP", raising=False)
    assert not any(o.resolve_envvar_value(ctx) for o in options if flag_of(o) == "--overlap")


def choices_and_defaults(name: str) -> dict[str, tuple[list[str] | None, Any]]:
    """The parameters of a command, by their names in Python: their choices and defaults."""
    command = command_of(name)
    defaults = command.make_context(name, ["one", "other"]).params
    return {
        str(param.name): (
            list(param.type.choices) if isinstance(param.type, click.Choice) else None,
            defaults[str(param.name)],
        )
        for param in command.params
        if param.expose_value
    }


def test_convert_has_the_options_choices_and_defaults_of_the_function() -> None:
    shown = choices_and_defaults("convert")
    allowed = {"format": list(FORMATS), "codec": list(CODECS), "affine": list(AFFINES)}
    allowed["interpolation"] = list(INTERPOLATIONS)
    for field in dataclasses.fields(ConvertOptions):
        choices, default = shown.pop(field.name)
        assert choices == allowed.get(field.name)
        assert default == field.default, field.name
    assert set(shown) == {"source", "store", "scheduler", "report", "dry_run", "overwrite", "json"}


def test_export_has_the_options_choices_and_defaults_of_the_function() -> None:
    shown = choices_and_defaults("export")
    options = dict(inspect.signature(plan_export).parameters)
    del options["store"], options["destination"]
    for name, parameter in options.items():
        choices, default = shown.pop(name)
        assert choices == ([".nii.gz", ".nii", ".ome.tif"] if name == "suffix" else None)
        assert default == parameter.default, name
    assert set(shown) == {"store", "dest", "overwrite", "json"}


def test_an_error_keeps_its_option_between_processes() -> None:
    assert pickle.loads(pickle.dumps(OptionError("jobs must be", option="jobs"))).option == "jobs"
