"""Networks as ``predict`` runs them: loaded by name, known by what they are, applied to batches."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CellType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from zpatch.errors import ModelError, OptionError, ZpatchError
from zpatch.geometry.boxes import PatchLocation
from zpatch.store.image_record import new_digest

DEFAULT_OUTPUT = "prediction"
DEEPEST = 200  # values within values that an identity looks at: two calls each, of the 1000 in one another
FLIPPED_AT_ONCE = 8  # the blocks that a flipped output is added in
BOOKKEEPING = {*vars(torch.nn.Module())} - {"_parameters", "_buffers"}  # no part of what a module does

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


class ExportedNetwork(torch.nn.Module):
    """A program of torch.export that can be called, and pickled: as what its file would be."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.program = program
        self.module = program.module()

    def forward(self, batch: torch.Tensor) -> Any:
        """What the program gives."""
        return self.module(batch)

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Nothing: a program was exported in one mode, and stays in it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _exported, (_stored(torch.export.save, self.program),)


def _exported(stored: str | bytes) -> ExportedNetwork:
    """The network in a file of torch.export, or in the bytes of one."""
    return ExportedNetwork(torch.export.load(io.BytesIO(stored) if isinstance(stored, bytes) else stored))


def _script(stored: str | bytes) -> Any:
    """The network in a file of TorchScript, or in the bytes of one."""
    file = io.BytesIO(stored) if isinstance(stored, bytes) else stored
    return torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]


def _stored(save: Callable[[Any, io.BytesIO], None], model: Any) -> bytes:
    file = io.BytesIO()
    save(model, file)
    return file.getvalue()


def torch_device(device: str | torch.device) -> torch.device:
    """A device by name, which must be there; ``auto`` takes a GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise OptionError(
            f"device must be auto, cpu, cuda, cuda:1 or another of torch's, not {device!r}"
        ) from None
    try:
        torch.empty(0, device=found)
    except Exception as error:  # each device has its own way to say that it is not there
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device {str(device)!r} cannot be used here ({reason}); choose another, or auto"
        ) from error
    return found


def identity(model: Any) -> str:
    """A digest of what a network or another function is: its structure, parameters, code and settings.

    Seen are a function's own code and the values bound in it, and what an object holds, as far as it can be
    pickled. What they reach beyond that, as by the names of global variables, is not; neither are devices,
    the state of random generators and iterators, training mode, and what is hooked to a module.
    """
    return _digest(model, {}, 0).hex()


def _digest(value: Any, known: dict[int, tuple[Any, bytes]], depth: int) -> bytes:
    """Of a value, by those of its members; ``known`` keeps the values met so far, with theirs."""
    if isinstance(value, torch.jit.ScriptFunction):
        value = _script(_stored(torch.jit.save, value))  # a module, as it is after it was pickled
    if id(value) not in known:
        known[id(value)] = value, b"within %d" % depth  # while it is not known: it may hold itself
        members = _members(value) if depth < DEEPEST else ()
        parts = [p if isinstance(p, memoryview) else _digest(p, known, depth + 1) for p in members]
        if isinstance(value, set | frozenset | Mapping):
            parts.sort()
        is_script = isinstance(value, torch.jit.ScriptModule)  # traced or not: its file says no more
        state = new_digest(_name(torch.jit.ScriptModule if is_script else type(value)).encode())
        for part in parts:
            state.update(b" %d " % len(part))  # so that it shows where a part ends
            state.update(part)
        known[id(value)] = value, state.digest()
    return known[id(value)][1]


def _members(value: Any) -> Iterable[Any]:
    """What to look at in a value, down to bytes, which stand in memoryviews."""
    match value:
        case None | bool() | int() | float() | complex() | str() | EllipsisType():
            return (memoryview(repr(value).encode()),)
        case bytes() | bytearray():
            return (memoryview(value),)
        case list() | tuple() | set() | frozenset():
            return value
        case Mapping():
            return value.items()
        case FunctionType():
            bound = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            return _name(value), value.__code__, bound, value.__defaults__, value.__kwdefaults__
        case CodeType():
            return value.co_code, value.co_names, value.co_consts
        case type() | ModuleType():
            return (_name(value),)
        case MethodType():
            return value.__func__, value.__self__
        case torch.Tensor():
            with contextlib.suppress(RuntimeError, ValueError):  # it is sparse, or has no values
                dense = value.dequantize() if value.is_quantized else value
                dense = dense.detach().cpu().resolve_conj().resolve_neg().contiguous()
                numbers: Any = dense.reshape(-1).view(torch.uint8).numpy()
                return str(value.dtype), *value.shape, memoryview(numbers)
        case np.ndarray() if not value.dtype.hasobject:
            return str(value.dtype), *value.shape, memoryview(value.tobytes())
        case ExportedNetwork():
            return (value.module,)
        case torch.jit.ScriptModule():
            return _of_script(value)
        case torch.nn.Module() if "_orig_mod" in value._modules:
            return (value._orig_mod,)  # what torch.compile adds has addresses
        case torch.nn.Module():
            settings = {name: held for name, held in _state(value).items() if name not in BOOKKEEPING}
            return type(value).forward, settings, list(value._modules.items())
        case torch.fx.Graph():
            return (value.python_code("self").src,)
        case torch.device() | random.Random() | np.random.RandomState() | np.random.Generator() | Iterator():
            return ()  # they say where, by what chance and how far, not what
    return _pickled(value)


def _state(module: torch.nn.Module) -> Mapping[str, Any]:
    """What a module holds; what it leaves out when it is pickled is no part of it."""
    with contextlib.suppress(Exception):  # it may refuse, in any way
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        if isinstance(state, Mapping):
            return state
    return vars(module)


def _of_script(module: Any) -> Iterator[Any]:
    """The members of a module of TorchScript: methods, settings and parameters, inner modules."""
    for name in sorted(module._c._method_names()):
        yield name, module._c._get_method(name).code_with_constants
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
    for name in sorted(kind.get_attributes().keys() - BOOKKEEPING):
        held = getattr(module, name)
        yield name, held.detach() if isinstance(held, torch.Tensor) else held
    yield list(module._modules.items())


def _pickled(value: Any) -> Iterator[Any]:
    """What pickle would keep of a value."""
    if isinstance(getattr(value, "__name__", None), str):
        yield _name(value)
    if isinstance(type(value).__call__, FunctionType):
        yield type(value).__call__
    try:
        kept = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception:  # it cannot be pickled, or refuses to be, each in its own way
        yield object.__getstate__(value)
    else:
        yield kept if isinstance(kept, str) else [list(p) if isinstance(p, Iterator) else p for p in kept]


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"


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
