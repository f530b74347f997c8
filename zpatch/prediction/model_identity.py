"""A digest of what a network is, so that resuming with another one is refused."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from zpatch.digests import new_digest

EXPORTED_NETWORK = (
    "zpatch.network.ExportedNetwork"  # its name in the digests of predictions begun before it moved
)
DEEPEST = 200  # values within values that an identity looks at: two calls each, of the 1000 in one another
BOOKKEEPING = {*vars(torch.nn.Module())} - {"_parameters", "_buffers"}  # no part of what a module does


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
        kind = _name(torch.jit.ScriptModule if is_script else type(value))
        if isinstance(value, ExportedNetwork):
            kind = EXPORTED_NETWORK
        state = new_digest(kind.encode())
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
