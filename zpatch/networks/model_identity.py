"""A digest of what a network is, so that a prediction is not resumed with another network.

The digest of a value covers the name of its type and the digests of its members, down to bytes. ``RULES``
says by type what the members are. Digests are stored with predictions: after a change of a rule, no
prediction by such a network can be resumed.
"""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, CodeType, EllipsisType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch

from zpatch.digests import new_digest
from zpatch.networks.model_files import ExportedNetwork, file_bytes, script_network

DEEPEST = 200  # levels of members that an identity looks at: two calls each, and Python allows 1000
BOOKKEEPING = {*vars(torch.nn.Module())} - {"_parameters", "_buffers"}  # does not alter a module's output
EXPORTED_NETWORK = "zpatch.network.ExportedNetwork"  # its name when predictions were first stored

Members = Iterable[Any]  # values, and memoryviews for bytes


def identity(model: Any) -> str:
    """A digest of a network or another function: its structure, parameters, code and settings.

    The digest covers a function's own code and the values bound in it, and the state of an object, as far as
    it can be pickled. It does not cover values that they find by global names, nor devices, the state of
    random generators and iterators, training mode, and hooks of a module.

    >>> identity(torch.nn.ReLU()) == identity(torch.nn.ReLU())
    True
    >>> identity(torch.nn.ReLU()) == identity(torch.nn.ReLU6())
    False
    """
    return _digest(model, {}, 0).hex()


def _digest(value: Any, known: dict[int, tuple[Any, bytes]], depth: int) -> bytes:
    """The digest of a value; ``known`` holds the values met so far, with their digests."""
    if isinstance(value, torch.jit.ScriptFunction):
        value = script_network(file_bytes(torch.jit.save, value))  # a module, as after it is pickled
    if id(value) not in known:
        known[id(value)] = value, b"within %d" % depth  # until its digest is known: it may contain itself
        members = _members(value) if depth < DEEPEST else ()
        parts = [p if isinstance(p, memoryview) else _digest(p, known, depth + 1) for p in members]
        if isinstance(value, set | frozenset | Mapping):
            parts.sort()
        state = new_digest(_type_name(value).encode())
        for part in parts:
            state.update(b" %d " % len(part))  # its length shows where a part ends
            state.update(part)
        known[id(value)] = value, state.digest()
    return known[id(value)][1]


def _type_name(value: Any) -> str:
    if isinstance(value, ExportedNetwork):
        return EXPORTED_NETWORK
    if isinstance(value, torch.jit.ScriptModule):  # traced or scripted: its file does not say
        return _name(torch.jit.ScriptModule)
    return _name(type(value))


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"


def _members(value: Any) -> Members:
    """The members of a value by the first rule for its type."""
    return next(members for types, members in RULES if isinstance(value, types))(value)


# Members by type


def _of_literal(value: Any) -> Members:
    return (memoryview(repr(value).encode()),)


def _of_function(function: FunctionType) -> Members:
    bound = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return _name(function), function.__code__, bound, function.__defaults__, function.__kwdefaults__


def _of_code(code: CodeType) -> Members:
    """No names of files, line numbers or local variables."""
    return code.co_code, code.co_names, code.co_consts


def _of_tensor(tensor: torch.Tensor) -> Members:
    """Its values, in C order, wherever it is; a sparse tensor or one without values is pickled."""
    with contextlib.suppress(RuntimeError, ValueError):
        dense = tensor.dequantize() if tensor.is_quantized else tensor
        dense = dense.detach().cpu().resolve_conj().resolve_neg().contiguous()
        numbers: Any = dense.reshape(-1).view(torch.uint8).numpy()
        return str(tensor.dtype), *tensor.shape, memoryview(numbers)
    return _of_object(tensor)


def _of_array(array: np.ndarray[Any, Any]) -> Members:
    if array.dtype.hasobject:
        return _of_object(array)
    return str(array.dtype), *array.shape, memoryview(array.tobytes())


def _of_script(module: Any) -> Members:
    """Methods, settings and parameters, inner modules of a module of TorchScript."""
    for name in sorted(module._c._method_names()):
        yield name, module._c._get_method(name).code_with_constants
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(module._c._type())
    for name in sorted(kind.get_attributes().keys() - BOOKKEEPING):
        held = getattr(module, name)
        yield name, held.detach() if isinstance(held, torch.Tensor) else held
    yield list(module._modules.items())


def _of_module(module: torch.nn.Module) -> Members:
    """The code of ``forward``, settings, parameters and buffers, inner modules."""
    if "_orig_mod" in module._modules:
        return (module._orig_mod,)  # a module of torch.compile adds state that contains addresses
    settings = {name: held for name, held in _state(module).items() if name not in BOOKKEEPING}
    return type(module).forward, settings, list(module._modules.items())


def _state(module: torch.nn.Module) -> Mapping[str, Any]:
    """The attributes of a module without those that it leaves out when it is pickled."""
    with contextlib.suppress(Exception):  # it may refuse, in any way
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        if isinstance(state, Mapping):
            return state
    return vars(module)


def _of_object(value: Any) -> Members:
    """The state of any other value, as pickle would keep it; and its code where it can be called."""
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


# The first rule for a type counts.
RULES: tuple[tuple[type | tuple[type, ...], Callable[[Any], Members]], ...] = (
    ((NoneType, bool, int, float, complex, str, EllipsisType), _of_literal),
    ((bytes, bytearray), lambda data: (memoryview(data),)),
    ((list, tuple, set, frozenset), lambda items: items),
    (Mapping, lambda mapping: mapping.items()),
    (FunctionType, _of_function),
    (CodeType, _of_code),
    ((type, ModuleType), lambda named: (_name(named),)),
    (MethodType, lambda method: (method.__func__, method.__self__)),
    (torch.Tensor, _of_tensor),
    (np.ndarray, _of_array),
    (ExportedNetwork, lambda network: (network.module,)),
    (torch.jit.ScriptModule, _of_script),
    (torch.nn.Module, _of_module),
    (torch.fx.Graph, lambda graph: (graph.python_code("self").src,)),
    # Where, by what chance and how far a network works is no part of what it is:
    ((torch.device, random.Random, np.random.RandomState, np.random.Generator, Iterator), lambda value: ()),
    (object, _of_object),
)
