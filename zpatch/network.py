"""Networks as ``predict`` runs them: loaded by name, known by what they are, applied to batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CellType, CodeType, EllipsisType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from zpatch.errors import ModelError, OptionError, ZpatchError
from zpatch.geometry import PatchLocation
from zpatch.schema import new_digest

DEFAULT_OUTPUT = "prediction"

Model = Callable[[torch.Tensor], Any]
Outputs = dict[str, torch.Tensor]


def load_model(spec: str) -> Model:
    """A network by name, as ``zpatch predict --model`` takes it.

    ``package.module:factory`` is called without arguments and gives the network; a ``.pt2`` file is one of
    torch.export, any other file TorchScript.
    """
    module_name, colon, factory = spec.partition(":")
    try:
        if Path(spec).is_file():
            if spec.endswith(".pt2"):
                return torch.export.load(spec).module()
            return torch.jit.load(spec, map_location="cpu")  # type: ignore[no-untyped-call, no-any-return]
        if not colon:
            raise ModelError(f"model {spec!r} is no file; name one, or a factory as package.module:factory")
        sys.path.insert(0, os.getcwd())
        model = getattr(importlib.import_module(module_name), factory)()
    except ZpatchError:
        raise
    except Exception as error:  # a user's module may fail in any way
        raise ModelError(f"model {spec!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(model):
        raise ModelError(f"model {spec!r} gave {type(model).__name__}, which cannot be called")
    return model  # type: ignore[no-any-return]


def torch_device(device: str | torch.device) -> torch.device:
    """A device by name; ``auto`` takes a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise OptionError(
            f"device must be auto, cpu, cuda, cuda:1 or another of torch's, not {device!r}"
        ) from None


def identity(model: Any) -> str:
    """A digest of what a network or another function is: its structure, parameters, code and settings.

    Seen are a function's own code and the values bound in it, and what an object that is called holds; what
    they reach beyond that, as by the names of global variables, is not.
    """
    state = new_digest()
    for part in _parts(model, ()):
        state.update(f"{len(part)} ".encode())  # so that it shows where a part ends
        state.update(part)
    return state.hexdigest()


def _parts(value: Any, within: tuple[Any, ...]) -> Iterator[bytes]:
    """What makes up a value; ``within`` holds it: one that holds itself would go on forever."""
    if isinstance(value, bytes):
        yield value
    elif any(value is outer for outer in within):
        yield b"itself"
    else:
        yield type(value).__qualname__.encode()
        for member in _members(value):
            yield from _parts(member, (*within, value))


def _members(value: Any) -> Iterable[Any]:
    """What to look at in a value, down to bytes."""
    match value:
        case torch.nn.Module():
            return str(value), value.state_dict(), *map(_own, value.modules())
        case torch.Tensor():
            stored = value.detach().cpu().contiguous()
            return str(stored.dtype), *stored.shape, stored.reshape(-1).view(torch.uint8).numpy().tobytes()
        case np.ndarray():
            return str(value.dtype), *value.shape, value.tobytes()
        case FunctionType():
            bound = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            return _name(value), value.__code__, bound, value.__defaults__, value.__kwdefaults__
        case CodeType():
            return value.co_code, value.co_names, value.co_consts
        case MethodType():
            return value.__func__, object.__getstate__(value.__self__)
        case functools.partial():
            return value.func, value.args, value.keywords
        case list() | tuple():
            return len(value), *value
        case set() | frozenset():
            return sorted(map(repr, value))
        case Mapping():
            return [part for key in sorted(value, key=repr) for part in (repr(key), value[key])]
        case None | bool() | int() | float() | complex() | str() | torch.dtype() | EllipsisType():
            return (repr(value).encode(),)
        case torch.jit.ScriptFunction():
            return (value.code,)
    if callable(value) and isinstance(type(value).__call__, FunctionType):
        return _name(type(value)), type(value).__call__, object.__getstate__(value)
    return (_name(value if hasattr(value, "__name__") else type(value)),)


def _own(module: torch.nn.Module) -> tuple[Any, ...]:
    """What a module is beside its parameters: code, settings, and buffers that are not stored."""
    if isinstance(module, torch.jit.ScriptModule):
        if not hasattr(module, "forward"):
            return ()
        code, constants = module.code_with_constants
        return code, constants.const_mapping
    settings = {
        name: value
        for name, value in vars(module).items()
        if name != "training"
        and not name.startswith("_")
        and isinstance(value, bool | int | float | str | tuple | list | torch.Tensor | np.ndarray)
    }
    return type(module).forward, settings, dict(module.named_buffers(recurse=False))


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"


@dataclass(frozen=True, slots=True)
class Network:
    """A network on a device. ``amp`` runs it in autocast; ``tta`` averages it over all flips of a patch."""

    model: Model
    device: torch.device
    amp: bool = False
    tta: bool = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Put the network on its device and into evaluation mode, and back into its mode at the end."""
        if isinstance(self.model, torch.nn.Module):
            self.model.to(self.device)  # not in inference mode: it could not be trained on afterwards
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=self.amp):
            if not isinstance(self.model, torch.nn.Module):
                yield
                return
            modes = {module: module.training for module in self.model.modules()}
            with contextlib.suppress(NotImplementedError):  # an exported program has its mode fixed
                self.model.eval()
            try:
                yield
            finally:
                for module, training in modes.items():
                    module.training = training

    def __call__(self, inputs: torch.Tensor, subject: str, locations: Sequence[PatchLocation]) -> Outputs:
        """The outputs for a batch (B, C, I, J, K), by name; of a network that gives one it is ``prediction``.

        Subject and locations are told where the network fails.
        """
        try:
            batch = inputs.to(self.device)
            outputs = self._flipped(batch) if self.tta else _named(self.model(batch))
        except Exception as error:  # a network may fail in any way; say where it did
            raise ModelError(
                f"the model failed on subject {subject!r}, patches at "
                f"{', '.join(str(location.index) for location in locations)}, given {tuple(inputs.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return outputs

    def _flipped(self, batch: torch.Tensor) -> Outputs:
        axes = [axis for axis in (2, 3, 4) if batch.shape[axis] > 1]
        flips = [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]
        sums: Outputs = {}
        for flip in flips:
            for key, output in _named(self.model(batch.flip(flip))).items():
                back = output.flip(flip).to(torch.promote_types(output.dtype, torch.float32))
                sums[key] = sums[key] + back if key in sums else back
        return {key: total / len(flips) for key, total in sums.items()}

    def on(self, device: torch.device) -> Network:
        """The same network on another device."""
        return dataclasses.replace(self, device=device)


def _named(outputs: Any) -> Outputs:
    heads = dict(outputs) if isinstance(outputs, Mapping) else {DEFAULT_OUTPUT: outputs}
    return {str(key): tensor for key, tensor in heads.items()}
