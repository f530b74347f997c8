"""Run the given stages, or all: ``python -m benchmarks [stage ...]``; see README.md."""

from __future__ import annotations

import argparse
import importlib
import tempfile
from pathlib import Path
from types import ModuleType

import benchmarks
from benchmarks.report import RESULTS, write_results
from benchmarks.stage import Options


def main() -> None:
    stages = _stages()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"{', '.join(stages)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few small volumes; results are printed only")
    parser.add_argument("--full", action="store_true", help="the largest volumes too")
    default = Path(tempfile.gettempdir()) / "zpatch-benchmarks"
    parser.add_argument("--data", type=Path, default=default, help="folder for data and stores (%(default)s)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.stages if name not in stages]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(stages)}")
    options = Options(arguments.data.absolute(), quick=arguments.quick, full=arguments.full)
    for name in arguments.stages or stages:
        section = stages[name].run(options)
        print(f"## {name}\n\n{section}\n", flush=True)
        if not options.quick:
            write_results(name, section, {name: stage.NOT_SHOWN for name, stage in stages.items()})
            print(f"written to {RESULTS}")


def _stages() -> dict[str, ModuleType]:
    """The stages by name: every folder of this package that has a ``bench.py``."""
    folders = [Path(folder) for folder in benchmarks.__path__]
    names = sorted(file.parent.name for folder in folders for file in folder.glob("*/bench.py"))
    return {name: importlib.import_module(f"benchmarks.{name}.bench") for name in names}


if __name__ == "__main__":
    main()
