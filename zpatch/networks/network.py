"""A network as ``predict`` runs it: on a device, in evaluation mode, fed batches in its own axes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from zpatch.digests import Json
from zpatch.errors import ModelError, OptionError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.networks.model_axes import DEFAULT_AXES, ModelAxes
from zpatch.networks.model_files import Model, ModelName, file_bytes, script_network
from zpatch.networks.model_identity import identity
from zpatch.runtime.process_memory import freed_at_once, kept_when_freed

DEFAULT_OUTPUT = "prediction"
FLIPPED_AT_ONCE = 8  # the blocks that a flipped output is added in
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # the types of input

Outputs = dict[str, torch.Tensor]


def torch_device(device: str | torch.device) -> torch.device:
    """The device of a name, which must be usable here; ``auto`` is a GPU if there is one."""
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
    except Exception as error:  # each device fails in its own way
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"device {str(device)!r} cannot be used here ({reason}); choose another, or auto",
            option="device",
        ) from error
    return found


class NetworkOptions(Protocol):
    """The options of a prediction that its network is made with; see ``PredictOptions``."""

    @property
    def device(self) -> str | torch.device:
        """A device of torch's, or ``auto``."""

    @property
    def amp(self) -> bool:
        """Whether the network runs in autocast."""

    @property
    def tta(self) -> bool:
        """Whether outputs are averaged over all flips."""

    @property
    def model_axes(self) -> str:
        """The axes of the network's batches."""

    @property
    def patch_size(self) -> Triple:
        """The extent of a patch along (I, J, K)."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network on a device.

    ``model`` is called with a batch; ``amp`` runs it in torch's autocast; ``tta`` averages it over all flips
    of a patch; ``axes`` are those of its batches. ``identity`` is that of the model when this was made: a
    model may change while it runs, for example if it counts its calls. It is kept on another device and in
    another process. ``name`` is for people: a prediction is also resumed by the same model in another file.
    """

    model: Model
    device: torch.device
    amp: bool = False
    tta: bool = False
    axes: ModelAxes = DEFAULT_AXES
    name: ModelName | None = None
    identity: str = dataclasses.field(init=False)

    @classmethod
    def of(cls, model: Model, options: NetworkOptions, name: ModelName | None = None) -> Self:
        """The network of a prediction with some options. Raises OptionError for its device and axes."""
        device, axes = torch_device(options.device), ModelAxes(options.model_axes)
        axes.check_patch_size(options.patch_size)
        return cls(model, device, amp=options.amp, tta=options.tta, axes=axes, name=name)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", identity(self.model))

    @contextlib.contextmanager
    def running(self, *, keeps_memory: bool = False) -> Iterator[None]:
        """Move the network to its device and into evaluation mode; restore its modes at the end.

        In between, memory that is freed is returned to the system at once; with ``keeps_memory`` it is kept
        for the next batch, which is faster and holds more than the network needs.
        """
        if isinstance(self.model, torch.nn.Module):
            self.model.to(self.device)  # not in inference mode: it could not be trained on afterwards
        memory = kept_when_freed() if keeps_memory else freed_at_once()
        with memory, torch.inference_mode(), torch.autocast(self.device.type, enabled=self.amp):
            if not isinstance(self.model, torch.nn.Module):
                yield
                return
            modules = [module for module in self.model.modules() if hasattr(module, "training")]
            modes = {module: module.training for module in modules}  # frozen TorchScript has none
            with contextlib.suppress(NotImplementedError):  # the mode of an exported program is fixed
                self.model.eval()
            try:
                yield
            finally:
                for module, training in modes.items():
                    module.training = training

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the network's input: that of its first parameter; None if it has none."""
        if not isinstance(self.model, torch.nn.Module):
            return None
        return next((p.dtype for p in self.model.parameters() if p.dtype in FLOATS), None)

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the model's parameters and buffers; None if it is no module and hides them."""
        if not isinstance(self.model, torch.nn.Module):
            return None
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def __call__(self, inputs: torch.Tensor, subject: str, locations: Sequence[PatchLocation]) -> Outputs:
        """The outputs (B, C, I, J, K) for a batch of that shape, by name; a single one is ``prediction``.

        The model is given a contiguous batch in its own axes and type. A network that fails is a ModelError,
        which names ``subject`` and ``locations``.
        """
        try:
            batch = inputs.to(self.device, self.dtype or inputs.dtype)
            return self._flipped(batch) if self.tta else self._run(batch)
        except ModelError as error:
            raise ModelError(f"subject {subject!r}: {error}") from error
        except Exception as error:  # a network may fail in any way
            raise ModelError(
                f"the model failed on subject {subject!r}, patches at "
                f"{', '.join(str(location.index) for location in locations)}, given "
                f"{self.axes.described(inputs)}: {type(error).__name__}: {error}{self.axes.advice(inputs)}"
            ) from error

    def _run(self, batch: torch.Tensor) -> Outputs:
        outputs = _named(self.model(self.axes.fed(batch)))
        return {key: self.axes.placed(output) for key, output in outputs.items()}

    def _flipped(self, batch: torch.Tensor) -> Outputs:
        """The mean over all flips, of each output in float32 or finer.

        Besides the output itself, at most 1.25 float32 buffers of its size are held: the sum, and the block
        that is being flipped. (More if no axis has 8 voxels; twice as much for float64.)
        """
        axes = [axis for axis in (2, 3, 4) if batch.shape[axis] > 1]
        flips = [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]
        sums: Outputs = {}
        for flip in flips:
            _add_flipped(sums, self._run(batch.flip(flip)), flip)
        return {key: total.div_(len(flips)) for key, total in sums.items()}

    def stored(self) -> Json:
        """All that voxels depend on of a network, as it is stored beside the voxels."""
        stored = {"model": self.identity, "device": self.device.type, "amp": self.amp, "tta": self.tta}
        return stored if self.axes.is_default else {**stored, "model_axes": self.axes.letters}

    def on(self, device: torch.device) -> Network:
        """The same network on another device."""
        model, _, *others = self._values()
        return _network(model, device, *others)

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def __reduce__(self) -> tuple[Any, ...]:
        model, *others = self._values()
        if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):  # pickle refuses them
            model = file_bytes(torch.jit.save, model)
        return _network, (model, *others)


def _network(model: Model | bytes, *others: Any) -> Network:
    """A network from the values of all its fields; a model of TorchScript may be the bytes of its file."""
    network = Network.__new__(Network)
    values = (script_network(model) if isinstance(model, bytes) else model, *others)
    for field, value in zip(dataclasses.fields(Network), values, strict=True):
        object.__setattr__(network, field.name, value)
    return network


def _add_flipped(sums: Outputs, outputs: Outputs, flip: tuple[int, ...]) -> None:
    """Add flipped outputs to sums, in blocks along their longest axis because a flip is a copy."""
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
        raise ModelError(f"two outputs have the same name, in {list(heads)}; give each a different name")
    return named
