"""Networks as ``predict`` runs them: loaded by name, known by what they are, applied to batches."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zpatch.errors import ModelError, OptionError, ZpatchError
from zpatch.geometry.boxes import PatchLocation
from zpatch.prediction.model_identity import _exported, _script, _stored, identity

DEFAULT_OUTPUT = "prediction"
FLIPPED_AT_ONCE = 8  # the blocks that a flipped output is added in

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
            if _is_saved_by_torch(Path(spec)):
                raise ModelError(
                    f"model {spec!r} is what torch.save wrote, which has no code; give a file of torch.export"
                    " (.pt2) or TorchScript, or package.module:factory that loads these weights"
                )
            return _exported(spec) if spec.endswith(".pt2") else _script(spec)
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


def _is_saved_by_torch(path: Path) -> bool:
    """Whether torch.save wrote a file. One of TorchScript is much the same, but has constants."""
    if not zipfile.is_zipfile(path):  # as before torch 1.6
        with path.open("rb") as file:
            magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
            return file.read(len(magic)) == magic
    with zipfile.ZipFile(path) as archive:
        names = {Path(name).name for name in archive.namelist()}
    return "data.pkl" in names and "constants.pkl" not in names


def torch_device(device: str | torch.device) -> torch.device:
    """A device by name, which must be there; ``auto`` takes a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise OptionError(
            f"device must be auto, cpu, cuda, cuda:1 or another of torch's, not {device!r}",
            option="device",
        ) from None
    try:
        torch.empty(0, device=found)
    except Exception as error:  # each device has its own way to say that it is not there
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device {str(device)!r} cannot be used here ({reason}); choose another, or auto",
            option="device",
        ) from error
    return found


@dataclass(frozen=True, slots=True)
class Network:
    """A network on a device. ``amp`` runs it in autocast; ``tta`` averages it over all flips of a patch.

    ``identity`` is that of the model when this was made: a model may change while it runs, as one does that
    counts its calls. It is kept on another device, and in another process.
    """

    model: Model
    device: torch.device
    amp: bool = False
    tta: bool = False
    identity: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", identity(self.model))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Put the network on its device and into evaluation mode, and back into its mode at the end."""
        if isinstance(self.model, torch.nn.Module):
            self.model.to(self.device)  # not in inference mode: it could not be trained on afterwards
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=self.amp):
            if not isinstance(self.model, torch.nn.Module):
                yield
                return
            modules = [module for module in self.model.modules() if hasattr(module, "training")]
            modes = {module: module.training for module in modules}  # frozen TorchScript has none
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
        """The mean over all flips, of each output in float32 or finer.

        Beside what the network gives, at most 1.25 buffers of its size in float32 are held: the sum, and the
        block that is being flipped. (It is more where no axis has 8 voxels; twice that for float64.)
        """
        axes = [axis for axis in (2, 3, 4) if batch.shape[axis] > 1]
        flips = [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]
        sums: Outputs = {}
        for flip in flips:
            _add_flipped(sums, _named(self.model(batch.flip(flip))), flip)
        return {key: total.div_(len(flips)) for key, total in sums.items()}

    def on(self, device: torch.device) -> Network:
        """The same network on another device."""
        return _network(self.model, device, self.amp, self.tta, self.identity)

    def __reduce__(self) -> tuple[Any, ...]:
        model, *others = (getattr(self, field.name) for field in dataclasses.fields(self))
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):  # they cannot be pickled
            model = _stored(torch.jit.save, model)
        return _network, (model, *others)


def _network(model: Model | bytes, *others: Any) -> Network:
    """A network of which all is known, its identity too; of TorchScript it may be the bytes of its file."""
    network = Network.__new__(Network)
    values = (_script(model) if isinstance(model, bytes) else model, *others)
    for field, value in zip(dataclasses.fields(Network), values, strict=True):
        object.__setattr__(network, field.name, value)
    return network


def _add_flipped(sums: Outputs, outputs: Outputs, flip: tuple[int, ...]) -> None:
    """Add outputs to sums, flipped, in blocks along their longest axis: a flip is a copy."""
    for key, output in outputs.items():
        if key not in sums:
            dtype = torch.promote_types(output.dtype, torch.float32)
            sums[key] = torch.zeros_like(output, dtype=dtype)
        axis = max((2, 3, 4), key=lambda axis: output.shape[axis])
        size = output.shape[axis]
        step = -(-size // FLIPPED_AT_ONCE)
        for start in range(0, size, step):
            stop = min(start + step, size)
            block = output.narrow(axis, size - stop if axis in flip else start, stop - start)
            sums[key].narrow(axis, start, stop - start).add_(block.flip(flip))


def _named(outputs: Any) -> Outputs:
    heads = dict(outputs) if isinstance(outputs, Mapping) else {DEFAULT_OUTPUT: outputs}
    named = {str(key): tensor for key, tensor in heads.items()}
    if len(named) < len(heads):
        raise ModelError(f"two outputs have the same name, in {list(heads)}; name each by a text of its own")
    return named
