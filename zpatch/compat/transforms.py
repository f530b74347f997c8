"""Transforms of TorchIO and MONAI, and plain functions of tensors, as the ``transform`` of a queue.

Each adapter turns a transform into a function ``Patch -> Patch``::

    queue = zp.Queue(..., transform=from_torchio(tio.RandomAffine()))           # TorchIO 1 or 2
    queue = zp.Queue(..., transform=from_monai(RandFlipd(["t1", "seg"], 0.5)))  # a dictionary transform
    queue = zp.Queue(..., transform=on_tensors(torch.log1p, images=["t1"]))

The transform gets values (slope and intercept applied), the affine of the patch and, if its library has such
types, the kind of each image. The new patch has the affines and the images that the transform returns. Label
maps keep the type that they had; values that do not fit it are an error. ``location`` and ``subject`` stay:
they are where the patch was taken.

All random numbers follow from the global generators of torch, numpy and Python, which a queue seeds before
each call. Transforms of MONAI with generators of their own are seeded from numpy's before each call, so that
the stream is the same for any number of workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from zpatch.chunks.scaling import Scaling
from zpatch.errors import OptionError
from zpatch.geometry.affines import max_corner_distance
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.pipelines import torchio1_places, torchio2_places
from zpatch.pipelines.monai_pipeline import monai_pipeline
from zpatch.pipelines.torchio_pipeline import torchio_pipeline
from zpatch.records.image_record import Kind
from zpatch.sampling.patch import Patch, PatchImage

PatchTransform = Callable[[Patch], Patch]

SUBMODULES = ("datasets", "utils")  # of TorchIO, which scripts use around patches

SAME_VOXEL = 1e-2  # voxels that are closer are in the same place; convert accepts such affines


def from_torchio(transform: Callable[[Any], Any], *, on: str = "subject") -> Any:
    """A transform of TorchIO 1 or 2 (``Subject -> Subject``) as the ``transform`` of a queue.

    It does what it does to the volume, lazily, as a ``Pipeline``: deterministic transforms act on subjects
    before patches are taken, random ones on patches, with a margin where they move voxels. What needs the
    volume in memory is refused by name. With ``on="patch"`` it is applied to each patch by itself, whatever
    it is. Images are ScalarImage, LabelMap, or a plain Image for sampling maps, which TorchIO's transforms
    treat differently. An OptionError if TorchIO is not installed.
    """
    torchio = torchio_library()
    _check_on(on)
    if on == "patch":
        return torchio_on_patches(transform)
    places = (torchio2_places if is_torchio_2(torchio) else torchio1_places).PLACES
    return torchio_pipeline(transform, places, torchio_on_patches)


def _check_on(on: str) -> None:
    if on not in ("subject", "patch"):
        raise OptionError(f"on must be 'subject' or 'patch', not {on!r}")


def torchio_on_patches(transform: Callable[[Any], Any]) -> PatchTransform:
    """A function of patches that applies a transform of TorchIO to each by itself."""
    return partial(_through_torchio, transform, _with_own_generator(transform))


def from_monai(transform: Callable[[Any], Any], *, on: str = "subject") -> Any:
    """A dictionary transform of MONAI, or a Compose of such, as the ``transform`` of a queue.

    Its keys are the names of images. It does what it does to the volume, lazily, as a ``Pipeline``:
    deterministic transforms act on subjects before patches are taken, random ones on patches, with a margin
    where they move voxels. What needs the volume in memory is refused by name, and so are random crops, which
    are what a sampler does: ``from_monai(before).then(from_monai(after, on="patch"))`` is what surrounds one.

    With ``on="patch"`` the transform is applied to each patch by itself, whatever it is. Its values are
    MetaTensors (C, I, J, K); entries that it adds are kept if they are images too. Lazy transforms are
    carried out at the end. One that samples several patches must give one (``num_samples=1``). An
    OptionError if MONAI is not installed.
    """
    monai_library()
    _check_on(on)
    if on == "subject":
        lazy = getattr(transform, "lazy", False)
        return monai_pipeline(transform, partial(_monai_on_patches, lazy), monai_stand_in)
    return _monai_on_patches(False, [transform])


def _monai_on_patches(lazy: bool | None, transforms: Sequence[Any]) -> PatchTransform:
    composed = monai_library().transforms.Compose(list(transforms), lazy=lazy)
    return partial(_through_monai, composed, _with_own_generator(composed))


def monai_stand_in(image: Image) -> Any:
    """A MetaTensor of the shape and the affine of an image that takes no memory; its voxels are all 0."""
    meta = {"original_channel_dim": 0, "spatial_shape": np.array(image.spatial_shape)}
    voxels, affine = torch.zeros(()).expand(image.shape), torch.from_numpy(image.affine)
    return monai_library().data.MetaTensor(voxels, affine=affine, meta=meta)


def on_tensors(
    function: Callable[[torch.Tensor], torch.Tensor], images: Sequence[str] | None = None
) -> PatchTransform:
    """A function of patches that applies ``function`` to the data (C, I, J, K) of some images.

    ``images`` are their names; None is all but label maps. It is called for each image separately, and
    affines do not change: a transform that moves voxels, in all images alike, must be a function of patches.

    >>> patch = Patch({"t1": PatchImage(torch.ones(1, 2, 2, 2), np.eye(4))}, None, "sub-01")
    >>> on_tensors(torch.neg)(patch).t1.data.unique().tolist()
    [-1.0]
    """
    names = None if images is None else tuple(images)
    return partial(_through_function, function, names, _with_own_generator(function))


def as_function(transform: Any) -> Any:
    """A transform as a function of patches: ``from_torchio`` of it if its class is TorchIO's, or inherits.

    Any other transform is taken for a function of patches.
    """
    bases = {base.__module__.partition(".")[0] for base in type(transform).__mro__}
    return from_torchio(transform) if "torchio" in bases else transform


def transform_class(name: str, generation: int, act: Callable[[Any, Any], Any]) -> Any:
    """A transform or a submodule of the installed TorchIO, for a module that replaces TorchIO 1 or 2.

    ``act(transform, data)`` is what a transform does when it is called with a subject or an image of zpatch.
    An AttributeError if TorchIO has none, is of the other generation, or is not installed.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        torchio = torchio_library()
    except OptionError as error:
        raise AttributeError(f"no {name!r} here; {error}") from None
    if is_torchio_2(torchio) != (generation == 2):
        raise AttributeError(
            f"no {name!r} here; its transforms are those of TorchIO {generation}, and the installed one "
            f"is of another generation"
        )
    found = getattr(torchio if name in SUBMODULES else torchio.transforms, name)
    is_transform = isinstance(found, type) and issubclass(found, torchio.Transform)
    return _acting_on_own(found, generation, act) if is_transform else found


@functools.cache
def _acting_on_own(transform: Any, generation: int, act: Callable[[Any, Any], Any]) -> Any:
    """The class of a transform that also takes subjects and images of zpatch."""
    method = "forward" if hasattr(transform, "forward") else "__call__"

    def call(self: Any, data: Any) -> Any:
        return (
            act(self, data) if isinstance(data, Subject | Image) else getattr(transform, method)(self, data)
        )

    names = {
        "__module__": f"zpatch.compat.torchio{generation}",
        "__qualname__": transform.__qualname__,
        "__doc__": transform.__doc__,
    }
    return type(transform.__name__, (transform,), {method: call, **names})


def torchio_library() -> Any:
    """The installed TorchIO, of any generation."""
    try:
        import torchio
    except ImportError as error:
        raise OptionError(
            f"a TorchIO transform needs TorchIO ({error}); install it with 'pip install torchio'"
        ) from error
    return torchio


def is_torchio_2(torchio: Any) -> bool:
    """Whether a TorchIO is of generation 2."""
    return hasattr(torchio, "AffineMatrix")


def monai_library() -> Any:
    """The installed MONAI."""
    try:
        import monai.data
        import monai.transforms
    except ImportError as error:
        raise OptionError(f"this needs MONAI ({error}); install it with 'pip install monai'") from error
    return monai


def meta_tensor(image: PatchImage) -> Any:
    """An image of a patch as MONAI's MetaTensor (C, I, J, K), with its affine."""
    meta = {"original_channel_dim": 0, "spatial_shape": np.array(image.data.shape[1:])}
    affine = torch.from_numpy(image.affine.copy())
    return monai_library().data.MetaTensor(_with_values(image).data, affine=affine, meta=meta)


def _through_torchio(transform: Callable[[Any], Any], randomizables: Sequence[Any], patch: Patch) -> Patch:
    torchio = torchio_library()
    images = {name: _torchio_image(torchio, image) for name, image in _in_one_space(patch).items()}
    _seed(randomizables)
    changed = transform(torchio.Subject(**images))
    if not isinstance(changed, torchio.Subject):
        raise TypeError(f"a TorchIO transform gives a Subject, not {type(changed).__name__}")
    found = changed.images if is_torchio_2(torchio) else changed.get_images_dict(intensity_only=False)
    made = {}
    for name, image in found.items():
        kind: Kind = "label" if isinstance(image, torchio.LabelMap) else "scalar"
        if kind == "scalar" and type(image) is torchio.Image:
            kind = "sampling"
        made[name] = PatchImage(image.data, np.array(image.affine, dtype=np.float64), kind)
    return _with_images(patch, made)


def _in_one_space(patch: Patch) -> dict[str, PatchImage]:
    """The images of a patch as values; affines that differ by less than a hundredth voxel are the same."""
    images = {name: _with_values(image) for name, image in patch.images.items()}
    first = next(iter(images.values())).affine
    for name, image in images.items():
        shape = image.data.shape[1:]
        if max_corner_distance(first, image.affine, (shape[0], shape[1], shape[2])) < SAME_VOXEL:
            images[name] = replace(image, affine=first)
    return images


def _torchio_image(torchio: Any, image: PatchImage) -> Any:
    classes = {"scalar": torchio.ScalarImage, "label": torchio.LabelMap, "sampling": torchio.Image}
    make = classes[image.kind]
    if is_torchio_2(torchio):
        return make(image.data, affine=image.affine)
    kind = {"type": torchio.SAMPLING_MAP} if image.kind == "sampling" else {}
    return make(tensor=image.data, affine=image.affine, **kind)


def _through_monai(transform: Callable[[Any], Any], randomizables: Sequence[Any], patch: Patch) -> Patch:
    _seed(randomizables)
    changed = transform({name: meta_tensor(image) for name, image in patch.images.items()})
    if isinstance(changed, list) and len(changed) == 1:
        [changed] = changed
    if not isinstance(changed, Mapping):
        count = f"{len(changed)} patches" if isinstance(changed, list) else type(changed).__name__
        raise TypeError(
            f"a MONAI transform of a patch gives one dictionary, not {count}; "
            f"say num_samples=1 there, and patches_per_volume= to the queue"
        )
    made = {}
    for name, value in changed.items():
        if isinstance(value, torch.Tensor | np.ndarray) and (name in patch.images or value.ndim == 4):
            before = patch.images.get(name, next(iter(patch.images.values())))
            affine = torch.as_tensor(getattr(value, "affine", before.affine)).double().numpy().copy()
            made[name] = PatchImage(_plain(value), affine, before.kind if name in patch.images else "scalar")
    return _with_images(patch, made)


def _through_function(
    function: Callable[[torch.Tensor], torch.Tensor],
    names: Sequence[str] | None,
    randomizables: Sequence[Any],
    patch: Patch,
) -> Patch:
    if names is None:
        names = [name for name, image in patch.images.items() if image.kind != "label"]
    _seed(randomizables)
    made = dict(patch.images)
    for name in names:
        image = _with_values(patch[name])
        made[name] = replace(image, data=_plain(function(image.data)))
    return _with_images(patch, made)


def _with_values(image: PatchImage) -> PatchImage:
    """The image with its slope and intercept applied, which other libraries do not have."""
    if (image.slope, image.inter) == (1.0, 0.0):
        return image
    values = torch.empty_like(image.data, dtype=torch.float32)
    Scaling(image.slope, image.inter).write(image.data.detach().numpy(), values.numpy())
    return replace(image, data=values, slope=1.0, inter=0.0)


def _with_images(patch: Patch, made: Mapping[str, PatchImage]) -> Patch:
    """The patch with the images that were made, label maps in the type that they had."""
    images = {}
    for name, image in made.items():
        before = patch.images.get(name)
        if before is not None and before.kind == image.kind == "label":
            image = replace(image, data=_in_type_of(before.data, image.data, name))
        images[name] = image
    return replace(patch, images=images)


def _in_type_of(before: torch.Tensor, labels: torch.Tensor, name: str) -> torch.Tensor:
    """Labels in the type that they had before; an OptionError if that would change a label."""
    if labels.dtype == before.dtype or before.is_floating_point():
        return labels
    if labels.is_floating_point() and before.numel():
        largest = 2 / torch.finfo(labels.dtype).eps  # up to here each whole number is a different float
        if max(int(before.max()), -int(before.min())) > largest:
            raise OptionError(
                f"the transform makes {labels.dtype} of the label map {name!r}, which cannot represent all "
                f"labels above {largest:.0f}; renumber them"
            )
    cast = labels.to(before.dtype)
    if not torch.equal(cast.to(labels.dtype), labels):
        raise OptionError(
            f"the transform gives the label map {name!r} values that {before.dtype} cannot represent; use "
            f"nearest neighbours for label maps, or make it a ScalarImage if fractions are intended"
        )
    return cast


def _plain(value: Any) -> torch.Tensor:
    """A plain torch.Tensor in the same memory, of no subclass."""
    return torch.as_tensor(value).as_subclass(torch.Tensor)


def _seed(randomizables: Sequence[Any]) -> None:
    for one in randomizables:
        one.set_random_state(seed=int(np.random.randint(2**32, dtype=np.uint32)))  # noqa: NPY002 - on purpose


def _with_own_generator(transform: Any) -> list[Any]:
    """The parts of a pipeline that have a generator of their own, as MONAI's Randomizable does."""
    return [part for part in _parts_of(transform) if hasattr(part, "set_random_state")]


def _parts_of(transform: Any) -> list[Any]:
    """The objects that a pipeline is made of."""
    found, seen, waiting = [], set(), [transform]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, type | FunctionType | ModuleType | torch.Tensor):
            continue
        seen.add(id(part))
        found.append(part)
        if isinstance(part, list | tuple):
            waiting += part
        else:
            waiting += (part if isinstance(part, dict) else getattr(part, "__dict__", {})).values()
    return found
