"""Networks in files: loaded by name, and kept as the bytes of a file where pickle would refuse them."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from zpatch.errors import ModelError, ZpatchError

Model = Callable[[torch.Tensor], Any]
OPAQUE_OBJECT = "opaque_obj"


@dataclass(frozen=True, slots=True)
class ModelName:
    """What a network is called, and the ``path`` of its file; None for one that was made in memory.

    >>> ModelName.of(torch.nn.ReLU())
    ModelName(name='torch.nn.modules.activation.ReLU', path=None)
    """

    name: str
    path: str | None = None

    @classmethod
    def of(cls, model: Model) -> Self:
        """The name of the class or the function of a network in memory."""
        found: Any = model if hasattr(model, "__qualname__") else type(model)
        name = getattr(model, "original_name", None)  # of the class that TorchScript was made from
        return cls(str(name or f"{found.__module__}.{found.__qualname__}"))

    @classmethod
    def of_spec(cls, spec: str) -> Self:
        """The name and path of a network that ``load_model`` has loaded."""
        if Path(spec).is_file():
            return cls(Path(spec).name, os.path.abspath(spec))
        file = getattr(sys.modules.get(spec.partition(":")[0]), "__file__", None)
        return cls(spec, file and os.path.abspath(file))


def load_model(spec: str) -> Model:
    """Load a network by name, as ``zpatch predict --model`` takes it.

    ``package.module:factory`` is called without arguments and returns the network; a ``.pt2`` file was
    written by torch.export, any other file by TorchScript. Raises ModelError, also for a ``.pt2`` file with a
    pickle that could run any code. A network is a program all the same: load none that you do not trust.
    """
    try:
        if Path(spec).is_file():
            if _is_saved_by_torch(Path(spec)):
                raise ModelError(
                    f"model {spec!r} was written by torch.save and has no code; give a file of torch.export"
                    " (.pt2) or TorchScript, or package.module:factory that loads these weights"
                )
            if not spec.endswith(".pt2"):
                return script_network(spec)  # type: ignore[no-any-return]
            _refuse_programs(Path(spec))
            return exported_network(spec)
        if ":" not in spec:
            raise ModelError(f"model {spec!r} is no file; name one, or a factory as package.module:factory")
        model = made_by_factory(spec)
    except ZpatchError:
        raise
    except Exception as error:  # a user's module may fail in any way
        raise ModelError(f"model {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(model):
        raise ModelError(f"model {spec!r} gave {type(model).__name__}, which cannot be called")
    return model  # type: ignore[no-any-return]


def made_by_factory(spec: str) -> Any:
    """What the factory of ``package.module:factory`` returns; modules of the current folder are found too."""
    module_name, _, factory = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module_name), factory)()


def _is_saved_by_torch(path: Path) -> bool:
    """Whether torch.save wrote a file. A file of TorchScript differs only in that it has constants."""
    if not zipfile.is_zipfile(path):  # as before torch 1.6
        with path.open("rb") as file:
            magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
            return file.read(len(magic)) == magic
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name for name in archive.namelist()}
    return "data.pkl" in names and "constants.pkl" not in names


def _refuse_programs(path: Path) -> None:
    """Raise ModelError if a file of torch.export has parts that torch would unpickle without a check.

    Those are objects, inputs and weights that cannot be loaded with ``weights_only=True``.
    """
    if not zipfile.is_zipfile(path):
        return  # torch refuses it
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):  # zipfile and torch may take another one
            raise ModelError(f"model {str(path)!r} holds two parts of one name; export the network again")
        for part in _pickled_parts(archive):
            if not _holds_tensors_only(archive.read(part)):
                raise ModelError(
                    f"model {str(path)!r} holds a pickle ({part}) that could run any code when it is loaded; "
                    f"export the network without it, or load it in a factory: package.module:factory"
                )


def _pickled_parts(archive: zipfile.ZipFile) -> list[str]:
    names = archive.namelist()
    parts = [name for name in names if name.endswith(".pt")]
    for config in (name for name in names if name.endswith("_config.json")):
        folder = config.rpartition("/")[0]
        entries = json.loads(archive.read(config))["config"].values()
        parts += [
            f"{folder}/{entry['path_name']}"
            for entry in entries
            if entry["use_pickle"] or entry["path_name"].startswith(OPAQUE_OBJECT)
        ]
    return parts


def _holds_tensors_only(pickled: bytes) -> bool:
    try:
        return not pickled or torch.load(io.BytesIO(pickled), weights_only=True) is not None
    except Exception:  # torch raises errors of many classes for what it does not load
        return False


class ExportedNetwork(torch.nn.Module):
    """A program of torch.export that can be called, and pickled as the bytes of its file."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program
        self.module = program.module()

    def forward(self, batch: torch.Tensor) -> Any:
        """Run the program."""
        return self.module(batch)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Do nothing: a program keeps the mode it was exported in."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return exported_network, (file_bytes(torch.export.save, self.program),)


def exported_network(stored: str | bytes) -> ExportedNetwork:
    """The network in a file of torch.export, given by its path or its bytes."""
    return ExportedNetwork(torch.export.load(io.BytesIO(stored) if isinstance(stored, bytes) else stored))


def script_network(stored: str | bytes) -> Any:
    """The network in a file of TorchScript, given by its path or its bytes."""
    file = io.BytesIO(stored) if isinstance(stored, bytes) else stored
    return torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]


def file_bytes(save: Callable[[Any, io.BytesIO], None], model: Any) -> bytes:
    """The bytes of the file that ``save`` writes of a network."""
    file = io.BytesIO()
    save(model, file)
    return file.getvalue()
