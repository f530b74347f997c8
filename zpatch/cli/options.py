"""Options that several commands share, and the translation of options' names in Python into flags."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from zpatch.runtime.byte_sizes import parse_bytes
from zpatch.runtime.task_contract import CLUSTER_TIMEOUT_S

F = TypeVar("F", bound=Callable[..., Any])

STORE = click.Path(path_type=Path)
QUOTES = "'\""


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A number of bytes, as ``2 GiB`` or ``500MB``."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a value."""
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Sizes(click.ParamType):  # type: ignore[type-arg]
    """A positive number, or ``count`` of them with x between."""

    count: int
    example: str

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse a value."""
        if isinstance(value, tuple):  # click may give a value that was parsed before
            return value
        try:
            numbers = tuple(float(part) for part in str(value).replace(",", "x").split("x"))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, self.count) or not all(0 < number < float("inf") for number in numbers):
            self.fail(f"{value!r} is not {self.example}", param, ctx)
        return numbers if len(numbers) == self.count else numbers * self.count


class Millimetres(_Sizes):
    """One voxel size in mm or three, as ``1.5`` or ``1x1x3``."""

    name, count, example = "mm", 3, "one voxel size in mm or three, as 1.5 or 1x1x3"


class Micrometres(_Sizes):
    """Micrometres per pixel: one number, or two along x and y, as ``0.5`` or ``0.5x0.25``."""

    name, count, example = "um", 2, "one pixel size in micrometres or two, as 0.5 or 0.5x0.25"


class Voxels(click.ParamType):  # type: ignore[type-arg]
    """One integer, or three with commas, as ``96`` or ``128,128,32``; two for a plane, as ``1024,512``."""

    name = "voxels"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, ...]:
        """Parse a value."""
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 2, 3):
            self.fail(f"{value!r} is not one integer, or two or three with commas (I,J or I,J,K)", param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers with commas, as ``0`` or ``0,2``."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse a value."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number, or several with commas", param, ctx)


def _remember_verbosity(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.ensure_object(dict)["verbose"] = value


def _remember_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.ensure_object(dict)["quiet"] = value


def talk_options(command: F) -> F:
    """Add ``-v`` and ``-q`` to a command."""
    verbose = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_remember_verbosity, is_eager=True,
        help="Show the traceback of an error.",
    )  # fmt: skip
    quiet = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_remember_quiet,
        help="Print errors and results only.",
    )  # fmt: skip
    return verbose(quiet(command))


json_option = click.option(
    "--json", is_flag=True, help="Print JSON to stdout, and everything else to stderr."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing output.")
cluster_timeout_option = click.option(
    "--cluster-timeout", type=click.FloatRange(0, min_open=True), default=CLUSTER_TIMEOUT_S,
    show_default=True, metavar="SECONDS", help="Wait so long for workers of a Dask cluster that has none.",
)  # fmt: skip
include_option = click.option(
    "--include", multiple=True, metavar="GLOB", help="Only subjects that match; may be repeated."
)
exclude_option = click.option(
    "--exclude", multiple=True, metavar="GLOB", help="No subjects that match; may be repeated."
)


def flag_of(option: click.Parameter) -> str:
    """The long name of an option."""
    return max(option.opts, key=len)


def in_flags(text: str) -> str:
    """A text, with the flags of the running command in place of the options' names in Python."""
    return with_flags(text, None, click.get_current_context().command)


def with_flags(text: str, option: str | None, command: click.Command) -> str:
    """The text of an error with the flags of a command in place of the options' names in Python.

    Names of several words are always replaced; a name of one word is replaced if it is written as an argument
    (``fill=0``), or starts the text of an error about this ``option``.

    >>> command = click.Command("predict", params=[click.Option(["--overlap", "patch_overlap"])])
    >>> with_flags("patch_overlap must be even; say patch_overlap=4", "patch_overlap", command)
    '--overlap must be even; say --overlap 4'
    """
    flags = {option.name: flag_of(option) for option in command.params if isinstance(option, click.Option)}

    def replaced(found: re.Match[str]) -> str:
        name, is_argument, value = found["name"], found["equals"], found["value"]
        if not (is_argument or "_" in name or (name == option and found.start() == 0)):
            return found[0]
        return flags[name] + (f" {value.strip(QUOTES)}" if value and value != "True" else "")

    names = "|".join(map(re.escape, flags))
    return re.sub(
        rf"(?<![\w./{QUOTES}-])(?P<name>{names})(?P<equals>=(?P<value>'[^']*'|-?\w[\w.]*\b)?|(?![\w/{QUOTES}-]))",
        replaced,
        text,
    )
