"""The command line: one module for each command, imported when the command runs."""

from __future__ import annotations

import importlib
import tomllib
import traceback
from pathlib import Path
from typing import Any

import click

from zpatch import __version__
from zpatch.cli.options import flag_of, with_flags
from zpatch.errors import OptionError, ZpatchError, one_line

COMMANDS = ("convert", "info", "verify", "export", "predict", "report", "bench")

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_DAMAGED = 4
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """Imports the module of a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands, in the order of the data flow."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name. Variables of the environment are named by the flags of its options."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"zpatch.cli.{cmd_name}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        for option in command.params:
            if isinstance(option, click.Option):
                option.envvar = f"zpatch_{cmd_name}_{flag_of(option)[2:]}".replace("-", "_").upper()
                option.allow_from_autoenv = False
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Keep the command, for the texts of its errors."""
        name, command, rest = super().resolve_command(ctx, args)
        ctx.ensure_object(dict)["command"] = command
        return name, command, rest


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path} is not TOML: {error}") from None
    ctx.default_map = {name: _defaults(ctx, path, name, table) for name, table in tables.items()}


def _defaults(ctx: click.Context, path: Path, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """A table of the file, with the keys that click uses for the flags of the command."""
    command = zpatch.get_command(ctx, name)
    if command is None or not isinstance(table, dict):
        raise click.BadParameter(f"{path}: [{name}] is not a table for one of {', '.join(COMMANDS)}")
    options = {option.lstrip("-"): p for p in command.params for option in p.opts if p.name}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in options:
            raise click.BadParameter(f"{path}: {key!r} in [{name}] is not an option of 'zpatch {name}'")
        is_one = isinstance(value, str) and options[key].multiple
        found[str(options[key].name)] = [value] if is_one else value
    return found


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="zpatch")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=_read_config,
    expose_value=False,
    is_eager=True,
    help="A TOML file with defaults, in a table for each command: [convert] codec = 'zstd'.",
)
def zpatch() -> None:
    """Patch-based deep learning on volumes that do not fit in memory.

    \b
    NIfTI files -> convert -> store -> (training with zpatch.Queue) -> predict -> store -> export -> NIfTI

    \b
    First steps:
      zpatch convert scans/ cohort.zarr          NIfTI, NRRD or MetaImage -> a Zarr store
      zpatch info cohort.zarr                    its subjects and images
      zpatch predict cohort.zarr out.zarr --model mymodel.pt --image t1 --patch-size 96 --overlap 32
      zpatch export out.zarr results/            predictions as NIfTI

    Each option can also be set in the environment, as ZPATCH_<COMMAND>_<OPTION>.

    Exit codes: 0 success, 1 error, 2 wrong usage, 3 some cases failed and the others are converted,
    4 damage found, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    raise SystemExit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line each, with -v also a traceback."""
    state: dict[str, Any] = {}
    try:
        code = zpatch.main(
            arguments, prog_name="zpatch", standalone_mode=False, auto_envvar_prefix="ZPATCH", obj=state
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("zpatch: interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:  # the edge of the program: any error becomes one line
        if state.get("verbose"):
            traceback.print_exc()
        option = error.option if isinstance(error, ZpatchError) else None
        what = one_line(error)
        if isinstance(error, ZpatchError):
            what = with_flags(what, option, state["command"])
        elif not isinstance(error, OSError):
            what = f"unexpected {type(error).__name__}: {what} (-v shows the traceback)"
        click.echo(f"zpatch: error: {what}", err=True)
        return EXIT_USAGE if option or isinstance(error, OptionError) else EXIT_ERROR
    return code if isinstance(code, int) else 0
