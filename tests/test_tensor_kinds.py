"""Whatever PyTorch calls a tensor: equal to the plain formula, or one sentence, never a signal.

A process for each backend runs every kind and prints a line before and after it. A process that
dies fails the kind it was at, and the next process goes on behind that kind. Row numbers (N22, A18,
...) are those of the reports that the kinds are taken from.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from functools import cache, partial
from unittest import mock

import interpreting
import pytest
import torch
import waiting
from torch import Tensor, nn

from directclr_fast import fast_directclr_loss
from directclr_fast.address import CPU, addresses, start
from directclr_fast.testing import backends, eager_loss

ROWS, WIDTH, T = 8, 16, 0.5
SENTENCES = (TypeError, ValueError, NotImplementedError)

# What each kind must come to: "equal", "of its kind" (a scalar), or words of the sentence; "any":
# an equal value, a scalar of the kind or somebody's error.
KINDS: dict[str, tuple] = {}


def kind(must: str, place: str = "views", dense=None):
    """Registers ``make(x)``: an object from fp32 values (or an index, or a temperature).

    ``dense``: the tensor with memory of its own that ``make`` equals, where that is not x itself.
    """

    def register(make):
        KINDS[make.__name__] = (make, must, place, dense)
        return make

    return register


def gloo() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


# ------------------------------------------------------------------------------ memory of its own


@kind("equal")
def a_plain(x):
    return x


@kind("equal")
def parameter(x):
    return x if x.requires_grad else nn.Parameter(x)


@kind("equal")
def buffer(x):
    return nn.Buffer(x) if not x.requires_grad else x


class Named(Tensor):
    """A subclass by ``__torch_function__`` alone."""


@kind("equal")
def subclass(x):
    return x.as_subclass(Named)


class Guarded(Tensor):
    """Lets nobody use it: what it holds is taken without a word of it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called on a {cls.__name__}")


@kind("equal")
def subclass_that_is_not_asked(x):
    return x.as_subclass(Guarded)


@kind("equal")
def negative_view(x):  # A18
    return torch._neg_view(-x)


@kind("equal")
def imaginary_part_of_a_conjugate(x):  # A18
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@kind("equal", dense=lambda x: x[:1].expand(ROWS, WIDTH).clone())
def expanded_rows(x):
    return x[:1].expand(ROWS, WIDTH)


@kind("equal", dense=lambda x: x[:, :1].expand(ROWS, WIDTH).clone())
def zero_stride_columns(x):
    return x[:, :1].expand(ROWS, WIDTH)


@kind("equal", dense=lambda x: x.flatten()[: ROWS + WIDTH - 1].unfold(0, WIDTH, 1).clone())
def overlapping(x):
    return x.flatten()[: ROWS + WIDTH - 1].unfold(0, WIDTH, 1)


@kind("equal")
def transposed(x):
    return x.T.contiguous().T


@kind("any")
def with_names(x):
    return x.refine_names("N", "D")


@kind("any")
def inference(x):  # A5
    with torch.inference_mode():
        return x.detach().clone()


# ------------------------------------------------------------------------------ none, or elsewhere


@kind("freed")
def freed(x):
    x = x.detach().clone()
    x.untyped_storage().resize_(0)
    return x


@kind("freed")
def freed_behind_an_offset(x):
    x = torch.cat([x.detach(), x.detach()])[ROWS:]
    x.untyped_storage().resize_(0)
    return x


@kind("cut")
def cut(x):
    x = x.detach().clone()
    x.untyped_storage().resize_(64)
    return x


@kind("any")
def meta(x):
    return x.detach().to("meta")


@kind("of its kind")
def fake(x):  # A20
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x.detach())


@kind("any")
def functional(x):
    return torch._to_functional_tensor(x.detach())


@kind("any")
def python_functional(x):
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        return FunctionalTensor.to_functional(x.detach())


@kind("any")
def efficient_zero(x):
    return torch._efficientzerotensor(x.shape)


class Wrapper(Tensor):
    """The simplest wrapper: unwraps, runs, wraps nothing."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return function(*args, **(kwargs or {}))


@kind("got a Wrapper")
def wrapper(x):  # A19
    return Wrapper(x.detach())


@kind("equal")
def deferred_collective(x):  # A19
    import torch.distributed._functional_collectives as collectives

    gloo()
    return collectives.all_gather_tensor(x.detach(), 0, torch.distributed.group.WORLD)


@kind("equal")
def deferred_collective_with_gradient(x):  # A19
    import torch.distributed._functional_collectives as collectives

    gloo()
    return collectives.all_gather_tensor_autograd(x, 0, torch.distributed.group.WORLD)


@kind("got a DTensor")
def dtensor(x):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    gloo()
    return distribute_tensor(x.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])


@kind("got a MaskedTensor")
def masked(x):
    return torch.masked.masked_tensor(x.detach(), x.detach() > 0)


@kind("got a nested")
def nested(x):
    return torch.nested.nested_tensor([x.detach()])


@kind("got a nested")
def jagged(x):
    return torch.nested.nested_tensor([x.detach()], layout=torch.jagged)


@kind("got an UninitializedParameter")
def uninitialised(x):
    return nn.UninitializedParameter()


@kind("got a torch.sparse_coo one")
def sparse(x):
    return x.detach().to_sparse()


@kind("got a torch.sparse_csr one")
def sparse_rows(x):
    return x.detach().to_sparse_csr()


@kind("got a torch.sparse_bsc one")
def sparse_blocks(x):
    return x.detach().to_sparse_bsc((4, 4))


@kind("got a torch._mkldnn one")
def mkldnn(x):
    return x.detach().to_mkldnn()


@kind("got quint8")
def quantised(x):
    return torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.quint8)


@kind("got complex64")
def lazily_conjugate(x):
    return torch.complex(x.detach(), x.detach()).conj()


@kind("got float8_e4m3fn")
def float8(x):
    return x.detach().to(torch.float8_e4m3fn)


# ------------------------------------------------------------------------------ other arguments

INDEX = (0, 3, 5, 9)


@kind("equal", "columns")
def negative_view_of_an_index(x):
    return torch._neg_view(-x)


@kind("equal", "columns")
def strided_index(x):
    return torch.stack([x, x], 1)[:, 0]


@kind("freed", "columns")
def freed_index(x):
    return freed(x)


@kind("equal", "columns")
def deferred_index(x):
    return deferred_collective(x)


@kind("got a Wrapper", "columns")
def wrapped_index(x):
    return wrapper(x)


@kind("any", "columns")
def meta_index(x):
    return x.to("meta")


@kind("of its kind", "columns")
def fake_index(x):
    return fake(x)


@kind("got 40", "columns")
def index_out_of_range(x):  # A21
    return torch.tensor([0, 3, 40])


@kind("got -1", "columns")
def negative_index(x):
    return torch.tensor([0, -1])


@kind("got int32", "columns")
def narrow_index(x):
    return x.int()


@kind("equal", "temperature")
def negative_view_of_a_temperature(x):
    return torch._neg_view(-x)


@kind("equal", "temperature")
def temperature_subclass(x):
    return x.as_subclass(Named)


@kind("freed", "temperature")
def freed_temperature(x):
    return freed(x)


@kind("equal", "temperature")
def deferred_temperature(x):
    return deferred_collective(x[None])[0]


@kind("got a Wrapper", "temperature")
def wrapped_temperature(x):
    return wrapper(x)


@kind("any", "temperature")
def meta_temperature(x):
    return x.detach().to("meta")


@kind("of its kind", "temperature")
def fake_temperature(x):
    return fake(x)


@kind("equal", "upstream")
def negative_view_upstream(x):
    return torch._neg_view(-x)


@kind("equal", "upstream", dense=lambda x: x[:1].expand(ROWS).clone())
def expanded_upstream(x):
    return x[:1].expand(ROWS)


@kind("freed", "upstream")
def freed_upstream(x):
    return freed(x)


@kind("got a Wrapper", "upstream")
def wrapped_upstream(x):
    return wrapper(x)


@kind("equal", "upstream")
def deferred_upstream(x):
    return deferred_collective(x)


# ------------------------------------------------------------------------------ the state of torch


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_type(name):
    torch.set_default_tensor_type(name)
    try:
        yield
    finally:
        torch.set_default_tensor_type(torch.FloatTensor)


def fake_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def counting_mode():
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


@contextlib.contextmanager
def unpacked_as(change):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
        yield


def unit_rows(saved: Tensor) -> bool:
    """Whether these are z (or the torch backend's tiles); statistics are (groups, rows)."""
    return saved.dim() > 1 and saved.shape[-2] == ROWS


STATES = {  # name: (context, what it must come to)
    "default_dtype_bf16": (lambda: default_dtype(torch.bfloat16), "equal"),  # N22
    "default_dtype_fp16": (lambda: default_dtype(torch.float16), "equal"),
    "default_dtype_fp64": (lambda: default_dtype(torch.float64), "equal"),
    "default_device_meta": (lambda: default_device("meta"), "equal"),  # N23
    "in_device_meta": (lambda: torch.device("meta"), "equal"),
    "default_tensor_type_fp64": (lambda: default_type(torch.DoubleTensor), "equal"),
    "default_tensor_type_fp16": (lambda: default_type(torch.HalfTensor), "equal"),
    "fake_mode": (fake_mode, "of its kind"),  # A20
    "counting_mode": (counting_mode, "equal"),
    "saved_halved": (
        lambda: unpacked_as(lambda t: t.half() if t.is_floating_point() else t),
        "saved tensors",
    ),
    "saved_cut": (lambda: unpacked_as(lambda t: t[..., :1] if t.dim() else t), "saved tensors"),
    # The unit rows alone: what else is saved says how many there are, not how long.
    "rows_halved": (
        lambda: unpacked_as(lambda t: t.half() if unit_rows(t) else t),
        "saved tensors",
    ),
    "rows_cut": (lambda: unpacked_as(lambda t: t[..., :1] if unit_rows(t) else t), "saved tensors"),
    "rows_doubled": (
        lambda: unpacked_as(lambda t: torch.cat([t, t], -1) if unit_rows(t) else t),
        "saved tensors",
    ),
    "saved_transposed": (
        lambda: unpacked_as(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t),
        "equal",
    ),
    "saved_freed": (lambda: unpacked_as(lambda t: freed(t)), "freed"),
    "saved_meta": (lambda: unpacked_as(lambda t: t.to("meta")), "saved tensors"),
    "saved_wrapped": (lambda: unpacked_as(lambda t: Wrapper(t)), "got a Wrapper"),
    "saved_negative": (lambda: unpacked_as(lambda t: torch._neg_view(t)), "lazily negated view"),
}


def in_grad(loss, a, b):  # A1
    return torch.func.grad_and_value(loss)(a, b)[::-1]


def in_vmap(loss, a, b):  # A2
    value = torch.func.vmap(loss)(a[None], b[None])[0]
    return value, torch.autograd.grad(value, a)[0]


def in_functionalize(loss, a, b):
    value = torch.func.functionalize(loss)(a, b)
    return value, torch.autograd.grad(value, a)[0]


def in_forward_mode(loss, a, b):
    direction = torch.ones_like(a)
    value, tangent = torch.func.jvp(lambda x: loss(x, b), (a,), (direction,))
    gradient = torch.autograd.grad(eager_loss(a, b, None, T), a)[0]
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    return value, gradient


def in_a_traced_graph(loss, a, b):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(loss)(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    value = graph(a, b)
    return value, torch.autograd.grad(value, a)[0]


TRANSFORMS = {
    in_grad: "equal", in_vmap: "equal", in_functionalize: "any", in_forward_mode: "equal",
    in_a_traced_graph: "equal",
}  # fmt: skip


# ------------------------------------------------------------------------------ one process


def views(dtype=torch.float32):
    generator, where = torch.Generator("cpu").manual_seed(3), {"device": "cpu"}
    both = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64, **where)
    both[1] += both[0]
    return [x.to(dtype).requires_grad_() for x in both]


def outcome(function, place: str, make, dtype=torch.float32) -> list:
    """The loss and the gradients of r1, r2 and the temperature (None where nothing reaches it)."""
    r1, r2 = views(dtype)
    leaves = [r1, r2, torch.tensor(T, dtype=dtype, device="cpu", requires_grad=True)]
    t, options, upstream = T, {}, None
    if place == "r1":
        r1 = make(r1)
    elif place == "r2":
        r2 = make(r2)
    elif place == "columns":
        options["columns"] = make(torch.tensor(INDEX, device="cpu"))
    elif place == "temperature":
        t = make(leaves[2])
    elif place == "upstream":
        options["reduction"] = "none"
        upstream = make(torch.linspace(0.1, 1, ROWS, dtype=dtype, device="cpu"))
    loss = function(r1, r2, None, t, **options)
    if loss.requires_grad:
        loss.backward(upstream)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def compare(ours: list, truth: list) -> str:
    if ours[0].device.type != "cpu" or type(ours[0]) is not Tensor:
        return "a scalar of the kind"
    for name, a, b in zip(("loss", "dr1", "dr2", "dtemperature"), ours, truth):
        if a is None or b is None:
            continue
        if a.shape != b.shape or not torch.allclose(a.double(), b, rtol=2e-5, atol=2e-6):
            return f"wrong {name}: {a.flatten()[:4].tolist()}, not {b.flatten()[:4].tolist()}"
    return "equal"


def tensor_classes(base=Tensor):
    for cls in base.__subclasses__():
        yield cls
        yield from tensor_classes(cls)


def generic(cls):
    """An object of any subclass: without memory where it handles operations itself."""
    if cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return lambda x: Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)
    return lambda x: Tensor._make_subclass(cls, x.detach())


def cases(backend: str):
    """(name, what it must come to, () -> what it came to)."""
    from directclr_fast import distributed

    group = {}

    def loss(r1, r2, dim=None, t=T, **options):
        return fast_directclr_loss(r1, r2, dim, t, backend=backend, **group, **options)

    @cache
    def truth(place, dense):
        return outcome(eager_loss, place, dense, torch.float64)

    def same(x):
        return x

    def run(place, make, dense, context=contextlib.nullcontext):
        wanted = truth(place, dense)
        with context():
            return compare(outcome(loss, place, make), wanted)

    for name, (make, must, place, dense) in KINDS.items():
        # Autograd's own business; torch 2.11's collective refuses the formula's strided gradient.
        if backend == "reference" and (place == "upstream" or name.endswith("with_gradient")):
            must = "any"
        for where in ("r1", "r2") if place == "views" else (place,):
            # The interpreter is slow. The other backends show what is refused before any of them.
            if backend != "triton" or (where != "r2" and must in ("equal", "freed", "cut")):
                yield f"{name}-{where}", must, partial(run, where, make, dense or same)
    if backend == "reference":  # the formula: torch's own operations, whatever state torch is in
        return

    for name, (context, must) in STATES.items():
        for where, make in (("r1", same), ("temperature", same), ("columns", Tensor.tolist)):
            if backend == "triton" and where != "r1":
                continue
            if name == "fake_mode" and where == "columns":
                must = "any"  # the list is asked for inside the mode
            yield f"{name}-{where}", must, partial(run, where, make, same, context)

    away = partial(unpacked_as, lambda t: t if t.is_floating_point() else t.to("meta"))
    yield "index_unpacked_on_meta", "saved tensors", partial(run, "columns", same, same, away)

    @contextlib.contextmanager
    def by_messages(context):
        """The route of several processes, in a group of one."""
        gloo()
        with mock.patch.object(distributed, "size", lambda group: 2):
            with mock.patch.dict(group, group="world"), context():
                yield

    for name, (context, must) in STATES.items():
        if name.startswith(("saved", "rows")):
            yield (
                f"{name}-world",
                must,
                partial(run, "r1", same, same, partial(by_messages, context)),
            )

    if backend == "triton":  # what is left never comes to a kernel
        return

    def transformed(transform):
        a, b = views()
        wanted = truth("r1", same)
        value, gradient = transform(lambda x, y: loss(x, y), a, b.detach())
        return compare([value.detach(), gradient.detach()], wanted)

    for transform, must in TRANSFORMS.items():
        yield transform.__name__, must, partial(transformed, transform)

    for module in ("masked", "sparse.semi_structured", "distributed.tensor", "nested",
                   "distributed._local_tensor", "distributed._shard.sharded_tensor",
                   "testing._internal.two_tensor", "testing._internal.logging_tensor",
                   "distributed._functional_collectives", "_subclasses.functional_tensor",
                   "nn.utils._expanded_weights", "nn.attention.bias",
                   "distributed._state_dict_utils"):  # fmt: skip
        with contextlib.suppress(ImportError):
            __import__(f"torch.{module}")
    for cls in tensor_classes():
        name = f"class_{cls.__module__}.{cls.__qualname__}"
        yield name, "any", partial(run, "r1", generic(cls), same)


def verdict(must: str, came) -> str:
    """ "" if ``came`` returns what it must, else what is wrong."""
    try:
        result = came()
    except Exception as error:
        text = str(error)
        if must == "any":
            return "" if text else f"an error without a word: {type(error).__name__}"
        clear = isinstance(error, SENTENCES) and "expected" in text and "\n" not in text
        if must != "equal" and must in text and clear:
            return ""
        return f"{type(error).__name__}: {text[:300]}"
    scalar = "a scalar of the kind"
    allowed = {"equal": ("equal",), "of its kind": (scalar,), "any": ("equal", scalar)}
    return "" if result in allowed.get(must, ()) else result


def main(backend: str, skip: list[str]) -> None:
    warnings.simplefilter("ignore")
    with interpreting.quicker() if backend == "triton" else contextlib.nullcontext():
        for name, must, came in cases(backend):
            if name not in skip:
                print(json.dumps(["at", name]), flush=True)
                print(json.dumps(["done", verdict(must, came)]), flush=True)


# ------------------------------------------------------------------------------ the tests


BACKENDS = [*backends(), "reference"]
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

    if not torch.cuda.is_available():
        BACKENDS.append("triton")


@cache
def verdicts(backend: str) -> dict[str, str]:
    """What every kind came to; a signal fails the kind that was at work and only it."""
    texts: dict[str, str] = {}
    while True:
        environment = dict(os.environ, OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
        done = subprocess.run(
            [sys.executable, __file__, backend, *texts],
            capture_output=True, text=True, env=environment, timeout=waiting.STILL,
        )  # fmt: skip
        name = None
        for line in done.stdout.splitlines():
            what, text = json.loads(line)
            if what == "at":
                name = text
                texts[name] = "the process ended here"
            else:
                texts[name] = text
                name = None
        if done.returncode == 0:
            return texts
        assert name is not None, done.stderr[-2000:]
        texts[name] = f"the process died ({done.returncode}): {done.stderr[-1500:]}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_is_equal_or_one_sentence(backend):
    """N22, N23, A18 to A21 and all of their kind."""
    texts = verdicts(backend)
    named = {name.rpartition("-")[0] for name in texts}
    assert named > {name for name, (_, must, *_) in KINDS.items() if must in ("equal", "freed")}
    wrong = {name: text for name, text in texts.items() if text}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


GPU = torch.device("cuda", 0)
UNFIT = {  # what is asked of float32 (4, 3), and on which device
    "dtype": (lambda x: x.double(), CPU),
    "size": (lambda x: x[:-1], CPU),
    "strides": (lambda x: x.T, CPU),
    "memory": (freed, CPU),
    "device": (lambda x: x, GPU),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_address_is_given_of_what_was_asked_for_only(name):
    x, f32 = torch.zeros(4, 3), torch.float32
    at = addresses(all=(x, f32, 12), none=(None, f32, 12), empty=(x[:0], f32, 0))
    assert at == {"all": x.data_ptr(), "none": 0, "empty": 0} and x.data_ptr()
    change, device = UNFIT[name]
    with pytest.raises(ValueError, match="x: expected 12 contiguous elements of float32 on c"):
        addresses(device, none=(None, f32, 12), x=(change(x), f32, 12))


@pytest.mark.parametrize("name", ["memory", "device"])
def test_a_start_is_given_of_memory_on_the_device_only(name):
    x = torch.zeros(4, 3)
    assert start("r", x.T) == x.data_ptr()
    change, device = UNFIT[name]
    with pytest.raises(ValueError, match="r: expected memory on c"):
        start("r", change(x), device)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])


@pytest.mark.parametrize("backend", backends())
def test_a_hook_on_single_saved_tensors_is_seen(backend):
    """As those of a whole block: the same memory, read with another sign, is no gradient."""
    r1, r2 = torch.randn(2, ROWS, 16, generator=torch.Generator().manual_seed(0))
    loss = fast_directclr_loss(r1.requires_grad_(), r2, 12, backend=backend)
    node = loss.grad_fn
    for raw, value in zip(node._raw_saved_tensors, node.saved_tensors):
        if value is not None and value.dim() == 2:
            raw.register_hooks(lambda t: t, torch._neg_view)
    with pytest.raises(TypeError, match="lazily negated view"):
        loss.backward()
