"""Networks as ``predict`` runs them: loaded by name, known by what they are, applied to batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

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
    """A digest of what a network or another function is: its structure, parameters and code.

    What a function reaches beyond its own code and the values bound in it is not seen.
    """
    state = new_digest()
    for part in _parts(model):
        state.update(part)
    return state.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.nn.Module):
        yield f"{type(value).__qualname__} {value}".encode()
        for name, parameter in value.state_dict().items():
            yield name.encode()
            yield from _parts(parameter)
    elif isinstance(value, torch.Tensor):
        stored = value.detach().cpu().contiguous()
        yield f"{stored.dtype} {tuple(stored.shape)}".encode()
        yield stored.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, functools.partial):
        yield from itertools.chain(_parts(value.func), _parts(value.args), _parts(value.keywords))
    elif isinstance(value, FunctionType):
        bound = [cell.cell_contents for cell in value.__closure__ or ()]
        yield f"{value.__module__}.{value.__qualname__}".encode() + value.__code__.co_code
        yield from _parts([c for c in value.__code__.co_consts if isinstance(c, int | float | str)])
        yield from _parts([bound, value.__defaults__, value.__kwdefaults__])
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(_parts, value))
    elif isinstance(value, Mapping):
        yield from _parts(sorted(map(repr, value)))
        yield from _parts(list(value.values()))
    elif value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        yield repr(value).encode()
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()


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
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=self.amp):
            if not isinstance(self.model, torch.nn.Module):
                yield
                return
            self.model.to(self.device)
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
                back = output.flip(flip) if output.is_floating_point() else output.flip(flip).float()
                sums[key] = sums[key] + back if key in sums else back
        return {key: total / len(flips) for key, total in sums.items()}

    def on(self, device: torch.device) -> Network:
        """The same network on another device."""
        return dataclasses.replace(self, device=device)


def _named(outputs: Any) -> Outputs:
    heads = dict(outputs) if isinstance(outputs, Mapping) else {DEFAULT_OUTPUT: outputs}
    return {str(key): tensor for key, tensor in heads.items()}
