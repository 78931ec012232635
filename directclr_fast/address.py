"""The one way from a tensor to an address: what native code needs of it, or one clear sentence.

:func:`unwrapped` takes what has a plain tensor to give, :func:`memory` says where a tensor from
outside lies, :func:`addresses` where plain contiguous elements do (docs/design.md section 4).
Triton asks for addresses itself, of tensors that :func:`memory` has seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")


def unwrapped(name: str, value):
    """A tensor as one that kernels or the dispatcher can take; anything else as it is.

    Subclasses without operations of their own become plain tensors, deferred collectives are waited
    for, negative views resolved; what holds its values elsewhere is refused.
    """
    kind = type(value)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        if not isinstance(value, Tensor):
            return value
        value = _of_subclass(name, value, kind)
    # In a compiled call the op does it; asking there would break the graph.
    if not torch.compiler.is_compiling() and value.is_neg():
        return value.resolve_neg()
    return value


def _of_subclass(name: str, value: Tensor, kind: type) -> Tensor:
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"{name}: expected a tensor with a shape, got an {kind.__name__}")
    if kind.__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a local tensor, got a DTensor; pass its local rows "
            "(r.to_local() or r.full_tensor())"
        )
    if not wraps(kind):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if kind.__name__ == "AsyncCollectiveTensor":
        return value.clone() if value.requires_grad else value.wait()
    if kind.__name__ in ("FakeTensor", "FunctionalTensor") or value.is_nested:
        return value
    raise TypeError(
        f"{name}: expected a plain tensor, got a {kind.__name__}, which has no memory of its own; "
        "pass the tensor it wraps"
    )


def addresses(
    device: torch.device = CPU, /, **buffers: tuple[Tensor | None, torch.dtype, int]
) -> dict[str, int]:
    """Where each of ``buffers`` lies on ``device``, under its name: ``(tensor, dtype, size)`` asks
    for ``size`` contiguous elements of ``dtype``; 0 for None or no elements.

    For buffers this package made and tensors that :func:`memory` has seen. Raises ``ValueError``
    where a tensor is anything else. All of a launch in one call: a GPU waits for the host below
    some 5,000 rows.
    """
    places, on_cpu = {}, device is CPU
    for name, (tensor, dtype, size) in buffers.items():
        if tensor is None:
            places[name] = 0
        elif (
            tensor.dtype is dtype
            and tensor.numel() == size
            and tensor.is_contiguous()
            and (tensor.is_cpu if on_cpu else tensor.device == device)
            and ((at := tensor.data_ptr()) or not size)
        ):
            places[name] = at
        else:
            raise ValueError(
                f"kernel argument {name}: expected {size} contiguous elements of {_name(dtype)} on "
                f"{device}, got {_describe(tensor)} of shape {tuple(tensor.shape)}, "
                f"{_name(tensor.dtype)} on {tensor.device}"
            )
    return places


def memory(name: str, tensor: Tensor) -> int:
    """Where ``tensor`` lies, any strides: its memory holds all of its values, as they are.

    0 where it has no elements. Raises ``TypeError`` where there is no such memory, ``ValueError``
    where its storage was freed or cut.
    """
    try:
        if not tensor.is_neg() and _last(tensor) <= tensor.untyped_storage().nbytes():
            if (at := tensor.data_ptr()) or not tensor.numel():
                return at
    except RuntimeError:  # NotImplementedError is one: no storage at all
        pass
    kind = ValueError if _is_plain(tensor) and _is_short(tensor) else TypeError
    raise kind(f"{name}: expected a tensor with memory of its own, got {_describe(tensor)}")


def readable(names: str, *tensors: Tensor | None) -> None:
    """Raises as :func:`memory` does, and lets pass what no kernel reads and PyTorch looks after:
    meta tensors, and those inside torch.func transforms. ``names`` are the tensors' in order."""
    for position, tensor in enumerate(tensors):
        if tensor is None or _is_whole(tensor) or tensor.is_meta:
            continue
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            memory(names.split()[position], tensor)


def _is_whole(tensor: Tensor) -> bool:
    """What nearly every tensor is, in half a microsecond."""
    try:
        return (
            tensor.data_ptr() != 0
            and tensor.storage_offset() == 0
            and tensor.nbytes <= tensor.untyped_storage().nbytes()
            and tensor.is_contiguous()
            and not tensor.is_neg()
        )
    except RuntimeError:  # no storage at all
        return False


def start(name: str, tensor: Tensor, device: torch.device = CPU) -> int:
    """Where ``tensor``, which :func:`readable` let pass, begins on ``device``, any strides."""
    if tensor.device == device and (at := tensor.data_ptr()):
        return at
    raise ValueError(f"{name}: expected memory on {device}, got {_describe(tensor)}")


def dispatched(*tensors: Tensor | None) -> bool:
    """Whether the call must go through PyTorch's dispatcher as one op, as while it is compiled:
    where a dispatch mode listens (it would see a kernel's buffers and not what is written there),
    and for fake and functional tensors."""
    if torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:
        if type(tensor) is not Tensor and tensor is not None and wraps(type(tensor)):
            return True
    return False


def wraps(kind: type) -> bool:
    """Whether ``kind`` handles operations itself (``__torch_dispatch__``)."""
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _last(tensor: Tensor) -> int:
    """Bytes of storage that the elements reach to."""
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
    return (tensor.storage_offset() + steps + 1) * tensor.itemsize


def _is_plain(tensor: Tensor) -> bool:
    return not wraps(type(tensor)) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_short(tensor: Tensor) -> bool:
    try:
        return _last(tensor) > tensor.untyped_storage().nbytes()
    except RuntimeError:
        return False


def _describe(tensor: Tensor) -> str:
    if wraps(type(tensor)):
        return f"a {type(tensor).__name__}"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "one inside a torch.func transform"
    if tensor.layout != torch.strided:
        return f"a {tensor.layout} one"
    if tensor.device.type == "meta":
        return "a meta tensor"
    if tensor.is_neg():
        return "a lazily negated view (resolve_neg() makes it plain)"
    if _is_short(tensor):
        return "one whose storage was freed or cut"
    return "one without" if not tensor.data_ptr() else "one"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
