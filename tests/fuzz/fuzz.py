"""Build and run the fuzzers, and record what they tried. Run by scripts/fuzz.

What is found grows in .fuzz/corpus, crashes are kept in .fuzz/crashes, and a line for each run is added to
.prove/fuzz.jsonl. A crash is tried again by giving its file to the program that the log names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / ".fuzz"
CORPUS = HERE / "corpus"
RECORD = ROOT / ".prove" / "fuzz.jsonl"
ATHERIS = ROOT / ".venv-fuzz"
INSTALL = "apt-get install clang llvm libclang-rt-14-dev libblosc-dev"
FIXED = "fixed-"  # begins the names of inputs that crashed once: they stay
MEMORY = "memory"  # MemorySanitizer needs all code to be instrumented
ADDRESS = "address,undefined"
C_FLAGS = ("-g", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-function")
LIMITS = ("-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1")
ENVIRONMENT = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1",
    "MSAN_OPTIONS": "allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "PYTHONPATH": os.pathsep.join(map(str, (ATHERIS, ROOT, HERE))),
}
TESTED = ("tests/chunks", "tests/resampling", "tests/blending", "tests/store", "tests/images", "tests/fuzz")


@dataclass(frozen=True)
class Target:
    """A fuzzer, under one set of sanitizers; none for a parser in Python."""

    name: str
    sanitizers: str = ""
    libraries: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What its log is called."""
        return "-".join([self.name, *self.sanitizers.split(",")]).strip("-")

    def command(self) -> list[str]:
        """Build the fuzzer; the command that runs it."""
        if not self.sanitizers:
            return [sys.executable, str(HERE / "with_atheris.py"), self.name]
        program = WORK / "bin" / self.label
        program.parent.mkdir(parents=True, exist_ok=True)
        how = (f"-fsanitize=fuzzer,{self.sanitizers}", "-fno-sanitize-recover=all", f"-I{HERE / 'c'}")
        source = HERE / "c" / f"{self.name}.c"
        subprocess.run(["clang", *C_FLAGS, *how, source, "-o", program, *self.libraries], check=True)
        return [str(program)]


C_TARGETS = (
    *(Target(name, how) for name in ("lz4", "gather", "blend", "count") for how in (ADDRESS, MEMORY)),
    Target("blosc", ADDRESS, ("-lblosc",)),  # Debian's c-blosc is not instrumented
)


def targets() -> tuple[Target, ...]:
    """All fuzzers."""
    from parsers import PARSERS

    return (*C_TARGETS, *map(Target, PARSERS))


@click.command()
@click.argument("names", nargs=-1, metavar="[TARGET]...")
@click.option("--seconds", default=60, show_default=True, help="Time for each target.")
@click.option("--list", "lists", is_flag=True, help="Name the targets and run nothing.")
@click.option("--suite", is_flag=True, help="Run tests with compiled loops under sanitizers instead.")
@click.option("--merge", is_flag=True, help="Make the committed corpora anew from what was found.")
def fuzz(names: Sequence[str], seconds: int, lists: bool, suite: bool, merge: bool) -> None:
    """Fuzz the compiled loops and the parsers; without TARGET all of them, one by one."""
    if suite:
        sys.exit(run_suite(names or TESTED))
    chosen = [target for target in targets() if target.name in names or not names]
    if unknown := set(names) - {target.name for target in chosen}:
        raise click.BadParameter(f"no target is named {', '.join(sorted(unknown))}; --list names them")
    if lists:
        for target in chosen:
            click.echo(f"{target.name:12}{target.sanitizers or 'atheris'}")
        return
    require_tools(chosen)
    if merge:
        for target in {target.name: target for target in chosen}.values():
            merge_corpus(target)
        return
    crashed = [target.label for target in chosen if run_target(target, seconds)]
    if crashed:
        click.echo(f"crashed: {', '.join(crashed)}; see {WORK.relative_to(ROOT)}/logs")
    sys.exit(bool(crashed))


def require_tools(chosen: Sequence[Target]) -> None:
    """Stop where clang is missing; install atheris where it is needed."""
    if any(target.sanitizers for target in chosen) and not shutil.which("clang"):
        raise click.ClickException(f"clang is missing: {INSTALL}")
    if not all(target.sanitizers for target in chosen) and not (ATHERIS / "atheris").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(ATHERIS)]
        if subprocess.run([*pip, "atheris"]).returncode:
            raise click.ClickException("atheris has no wheel for this Python; fuzz with Python 3.11 to 3.13")


def run_target(target: Target, seconds: int) -> int:
    """Run a fuzzer until its time is over or it crashes, and record it; the number of crashes."""
    command = target.command()
    found, crashes = WORK / "corpus" / target.name, WORK / "crashes" / target.name
    for folder in (found, crashes, WORK / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    before, log = set(crashes.iterdir()), WORK / "logs" / f"{target.label}.log"
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={crashes}{os.sep}", *LIMITS]
    start = time.monotonic()
    with log.open("wb") as stream:
        ran = subprocess.run(
            [*command, str(found), *corpora(target), *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            cwd=WORK,
        )
    text = log.read_text(errors="replace")
    executions = int((re.findall(r"number_of_executed_units: (\d+)", text) or ["0"])[-1])
    crashed = len(set(crashes.iterdir()) - before) or int(ran.returncode != 0)
    line = {
        "target": target.name,
        "sanitizers": target.sanitizers,
        "executions": executions,
        "seconds": round(time.monotonic() - start, 1),
        "crashes": crashed,
        "commit": the_commit(),
    }
    RECORD.parent.mkdir(exist_ok=True)
    with RECORD.open("a") as record:
        record.write(json.dumps(line) + "\n")
    speed = executions / max(line["seconds"], 1)
    click.echo(f"{target.label:24}{executions:>12,} runs {speed:>10,.0f}/s {crashed} crashes")
    return crashed


def corpora(target: Target) -> list[str]:
    """The committed corpus of a target, and its seeds, as far as they are there."""
    from seeds import SEEDS

    seeds = WORK / "seeds" / target.name
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir(parents=True)
    for number, data in enumerate(SEEDS[target.name]()):
        (seeds / f"{number:03}").write_bytes(data)
    committed = CORPUS / target.name
    return [str(seeds), *([str(committed)] if committed.is_dir() else [])]


def merge_corpus(target: Target) -> None:
    """Replace the committed corpus by the smallest files that reach all code that was reached."""
    merged = WORK / "merged" / target.name
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    sources = [*corpora(target), str(WORK / "corpus" / target.name)]
    Path(sources[-1]).mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*target.command(), "-merge=1", "-use_counters=0", "-max_len=2048", str(merged), *sources],
        env=os.environ | ENVIRONMENT,
        cwd=WORK,
        check=True,
        capture_output=True,
    )
    committed = CORPUS / target.name
    committed.mkdir(parents=True, exist_ok=True)
    for file in committed.iterdir():
        if not file.name.startswith(FIXED):
            file.unlink()
    for file in merged.iterdir():
        shutil.copyfile(file, committed / file.name[:12])
    sizes = [file.stat().st_size for file in committed.iterdir()]
    click.echo(f"{target.name:12}{len(sizes):>6} files {sum(sizes):>8,} bytes")


def run_suite(tests: Sequence[str]) -> int:
    """Run tests with the compiled loops under AddressSanitizer and UndefinedBehaviorSanitizer of gcc."""
    copy = WORK / "suite"
    for name in ("zpatch", "tests", "scripts"):
        shutil.rmtree(copy / name, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    flags = "-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    build = [
        sys.executable,
        "-c",
        "from setuptools import setup; setup()",
        "build_ext",
        "--inplace",
        "--force",
    ]
    built = os.environ | {"CC": "gcc", "CFLAGS": flags, "LDFLAGS": "-fsanitize=address,undefined"}
    subprocess.run(build, cwd=copy, env=built, check=True, stdout=subprocess.DEVNULL)
    if len(list(copy.glob("zpatch/**/*.so"))) != len(list(copy.glob("zpatch/**/_*.c"))):
        raise click.ClickException("not all extensions were built under sanitizers; is gcc there?")
    preloaded = [
        subprocess.check_output(["gcc", f"-print-file-name={n}"], text=True).strip() for n in PRELOADED
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python and torch there are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(copy),
    }
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=1200"]
    return subprocess.run([*run, "-m", "not alone", *tests], cwd=copy, env=environment).returncode


PRELOADED = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # the last one throws for torch


def the_commit() -> str:
    """The commit that is checked out, with + where files differ from it."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return ran.stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    fuzz()
