"""The public loss as a citizen of PyTorch: autograd, autocast, modes, what bad input is told."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import waiting

import directclr_fast
from directclr_fast import DirectCLRLoss, fast_directclr_loss, info_nce, last_backend
from directclr_fast.dispatch import PRIORITY
from directclr_fast.problem import Options
from directclr_fast.testing import backends, bound, eager_loss, evaluate, make_views, relative_error

BACKENDS = [*backends(), "reference"]
# Four units in the last place of a logit, 1 / temperature times a cosine, which libraries round as
# they like: what it moves a loss or a weight by, relatively.
OF_LOGITS = 4 * torch.finfo(torch.float32).eps / 0.1


@pytest.fixture
def views():
    return make_views(24, 32, dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tensor_twice(backend, views):
    r = views[0].clone().requires_grad_()
    (ours,) = torch.autograd.grad(fast_directclr_loss(r, r, 20, backend=backend), r)

    def eager(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(eager_loss(x, x, 20), x)[0]

    truth = eager(views[0].double())
    allowed = bound(relative_error(eager(views[0]), truth), torch.float32)
    assert relative_error(ours, truth) < max(allowed, OF_LOGITS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_one_side_without_gradient(backend, side, negatives, views):
    options = {"dim": 20, "negatives": negatives, "backend": backend}
    both = evaluate(fast_directclr_loss, *views, temperature=torch.tensor(0.1), **options)
    inputs = [r.clone() for r in views]
    inputs[side].requires_grad_()
    t = torch.tensor(0.1, requires_grad=True)
    loss = fast_directclr_loss(*inputs, temperature=t, **options)
    alone, dt = torch.autograd.grad(loss, [inputs[side], t], retain_graph=True)
    (again,) = torch.autograd.grad(loss, inputs[side])
    assert relative_error(alone, both[1 + side]) < 1e-6
    assert relative_error(dt, both.dtemperature) < 1e-5
    assert torch.equal(alone, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_temperature_wants_a_gradient(backend, views):
    for negatives in ("cross", "both"):
        t = torch.tensor(0.1, requires_grad=True)
        loss = fast_directclr_loss(*views, 20, t, negatives=negatives, backend=backend)
        (ours,) = torch.autograd.grad(loss, t)
        truth = evaluate(
            eager_loss,
            *(r.double() for r in views),
            20,
            temperature=torch.tensor(0.1).double(),
            negatives=negatives,
        )
        # a^2 sum G s over entries of either sign: their size is what rounding goes by.
        eager = evaluate(eager_loss, *views, 20, temperature=torch.tensor(0.1), negatives=negatives)
        error = relative_error(eager.dtemperature, truth.dtemperature)
        allowed = max(bound(error, torch.float32), OF_LOGITS)
        assert relative_error(ours, truth.dtemperature) < allowed


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_and_retain_graph(backend, views):
    r1, r2 = (r.clone().requires_grad_() for r in views)
    loss = fast_directclr_loss(r1, r2, 20, backend=backend)
    (first,) = torch.autograd.grad(loss, r1, retain_graph=True)
    (scaled,) = torch.autograd.grad(-3.5 * loss, r1, retain_graph=True)
    assert relative_error(scaled, -3.5 * first) < 1e-6
    loss.backward()
    torch.testing.assert_close(r1.grad, first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_double_backward(backend, negatives):
    r1, r2 = (r.requires_grad_() for r in make_views(5, 7, dtype=torch.float64))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def function(a, b, t):
        return fast_directclr_loss(a, b, 4, t, negatives=negatives, backend=backend)

    assert torch.autograd.gradcheck(function, (r1, r2, t))
    assert torch.autograd.gradgradcheck(function, (r1, r2, t))
    assert torch.autograd.gradgradcheck(lambda a, t: function(a, a, t), (r1, t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_nothing_is_recorded(backend, views):
    r1, r2 = (r.clone().requires_grad_() for r in views)
    want = fast_directclr_loss(r1, r2, 20, backend=backend).item()
    with torch.no_grad():
        loss = fast_directclr_loss(r1, r2, 20, backend=backend)
        assert not loss.requires_grad and float(loss) == pytest.approx(want, rel=1e-6)
    with torch.inference_mode():
        assert float(fast_directclr_loss(r1, r2, 20, backend=backend)) == pytest.approx(want)
    assert not fast_directclr_loss(*views, 20, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_inside(backend, views):
    outside = evaluate(fast_directclr_loss, *views, 20, backend=backend)
    r1, r2 = (r.clone().requires_grad_() for r in views)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fast_directclr_loss(r1, r2, 20, backend=backend)
        if backend != "reference":  # whose backward pass is autograd's own operations
            (inside,) = torch.autograd.grad(loss, r1, retain_graph=True)
            assert torch.equal(outside.dr1, inside)
    assert torch.equal(outside.loss, loss)
    assert torch.equal(outside.dr1, torch.autograd.grad(loss, r1)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_in_and_out(backend, dtype):
    r1, r2 = make_views(16, 32, dtype=dtype)
    result = evaluate(fast_directclr_loss, r1, r2, 20, backend=backend)
    assert result.loss.dtype == torch.float32 and result.dr1.dtype == dtype
    truth = evaluate(eager_loss, r1.double(), r2.double(), 20)
    assert relative_error(result.loss, truth.loss) < OF_LOGITS


def test_columns_of_the_same_values_are_copied_to_a_device_once():
    values = np.arange(6)
    index, device = torch.from_numpy(values).view(1, 6), torch.device("meta")
    placed = directclr_fast.problem._placed
    with torch.inference_mode():
        first = placed(index, device)
    assert placed(index.clone(), device) is first and not first.is_inference()
    values[0] = 7  # behind PyTorch's back
    other = placed(index, device)
    assert other is not first and other.shape == (1, 6)
    assert placed(index.view(2, 3), device).shape == (2, 3)


def test_columns_that_a_graph_has_captured_are_kept(monkeypatch):
    """Whatever else is asked for later: a replay reads the memory they had."""
    problem, device = directclr_fast.problem, torch.device("cuda", 0)
    indices = torch.arange(70 * 4).view(70, 1, 4)
    keys = [(index.numpy().tobytes(), index.shape, device) for index in indices]
    monkeypatch.setattr(problem, "_places", dict(zip(keys, indices)))
    monkeypatch.setattr(problem, "_captured", {})
    waited, captures = [], iter([False, True])
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(captures))
    assert problem._placed(indices[3], device) is not None and not problem._captured
    problem._placed(indices[5], device)
    assert list(problem._captured) == [keys[5]] and not waited
    with contextlib.suppress(RuntimeError, AssertionError):  # no such device here
        problem._placed(torch.arange(500, 504)[None], device)
    assert waited == [device] and keys[5] not in problem._places
    assert list(problem._captured) == [keys[5]]


def test_gradients_do_not_depend_on_how_columns_are_named(views):
    by_dim = evaluate(fast_directclr_loss, *views, 20)
    by_index = evaluate(fast_directclr_loss, *views, columns=list(range(20)))
    for a, b in zip(by_dim[:3], by_index):
        assert relative_error(a, b) < OF_LOGITS
    one_group = evaluate(fast_directclr_loss, *views, columns=torch.arange(20)[None])
    assert torch.equal(by_index.dr1, one_group.dr1)


def test_last_backend_tells_what_ran(views):
    fast_directclr_loss(*views, 20, backend="reference")
    assert last_backend() == "reference"
    fast_directclr_loss(*views, 20)
    assert last_backend() == PRIORITY[0]


def test_module_shows_its_settings():
    assert "dim=360, temperature=0.1" in repr(DirectCLRLoss())
    assert "learnable_temperature=True" in repr(DirectCLRLoss(learnable_temperature=True))


def call(**changes):
    """A correct call with some arguments replaced."""
    r = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    arguments = {"r1": r, "r2": r.clone(), "dim": 12} | changes
    return fast_directclr_loss(**arguments)


R = torch.ones(8, 16)
BAD = [
    ("r1-list", {"r1": [[1.0]]}, TypeError, "r1: expected a torch.Tensor, got list"),
    ("r1-rank", {"r1": R[0]}, ValueError, "r1: expected 2 dimensions .* got shape \\(16,\\)"),
    ("r2-rank", {"r2": R[None]}, ValueError, "r2: expected 2 dimensions"),
    ("r1-int", {"r1": R.int()}, TypeError, "r1: expected float16, .* got int32"),
    ("r2-dtype", {"r2": R.half()}, TypeError, "r2: expected float32 like r1, got float16"),
    ("r2-device", {"r2": R.to("meta")}, ValueError, "r2: expected device cpu like r1, got meta"),
    ("r2-width", {"r2": R[:, :9]}, ValueError, "r2: expected width 16 like r1, got .*\\(8, 9\\)"),
    ("r2-short", {"r2": R[:5]}, ValueError, "r2: expected at least 8 rows.*got 5"),
    ("empty", {"r1": R[:0], "r2": R[:0]}, ValueError, "r1: expected at least one row.*\\(0, 16\\)"),
    ("sparse", {"r1": R.to_sparse()}, TypeError, "r1: expected a dense strided tensor"),
    ("dim-large", {"dim": 17}, ValueError, "dim: expected 1 to 16 .*got 17"),
    ("dim-zero", {"dim": 0}, ValueError, "dim: expected 1 to 16 .*got 0"),
    ("dim-default", {"dim": 360}, ValueError, "dim: expected 1 to 16 .*got 360"),
    ("dim-float", {"dim": 3.0}, TypeError, "dim: expected an int or None, got float"),
    ("t-zero", {"temperature": 0.0}, ValueError, "temperature: expected a positive.*got 0.0"),
    ("t-negative", {"temperature": -1}, ValueError, "temperature: expected a positive.*got -1"),
    ("t-nan", {"temperature": float("nan")}, ValueError, "temperature: .*got nan"),
    ("t-inf", {"temperature": float("inf")}, ValueError, "temperature: .*got inf"),
    ("t-text", {"temperature": "0.1"}, TypeError, "temperature: expected .*got str"),
    ("t-vector", {"temperature": torch.ones(2)}, ValueError, "temperature: .* of one element"),
    ("t-int", {"temperature": torch.tensor(1)}, ValueError, "temperature: .* of one element"),
    ("t-tensor", {"temperature": torch.tensor(-0.1)}, ValueError, "temperature: .*got -0.1"),
    ("negatives", {"negatives": "all"}, ValueError, "negatives: expected one of.*got 'all'"),
    ("reduction", {"reduction": "avg"}, ValueError, "reduction: expected one of.*got 'avg'"),
    ("precision", {"precision": "fp32"}, ValueError, "precision: expected one of.*got 'fp32'"),
    ("backend", {"backend": "fpga"}, ValueError, "backend: expected one of.*got 'fpga'"),
    ("symmetric", {"symmetric": 1}, TypeError, "symmetric: expected True or False, got 1"),
    ("eps", {"eps": 0.0}, ValueError, "eps: expected a positive finite number, got 0.0"),
    ("workspace", {"workspace_bytes": -1}, ValueError, "workspace_bytes: expected .*got -1"),
    ("group", {"group": "all"}, ValueError, "group: expected None.*got 'all'"),
    ("group-type", {"group": 3}, TypeError, "group: expected None.*got int"),
    ("group-init", {"group": "world"}, ValueError, "group: .*initialised"),
    ("columns-range", {"columns": [0, 16]}, ValueError, "columns: .* 0 to 15, got 16"),
    ("columns-low", {"columns": [-1, 3]}, ValueError, "columns: .* 0 to 15, got -1"),
    ("columns-twice", {"columns": [3, 1, 3]}, ValueError, "columns: .*got 3 twice"),
    ("columns-float", {"columns": [0.5]}, TypeError, "columns: expected int64, got float32"),
    ("columns-empty", {"columns": []}, (TypeError, ValueError), "columns: expected"),
    ("columns-rank", {"columns": torch.zeros(1, 1, 1).long()}, ValueError, "columns: .*shape"),
    ("columns-text", {"columns": "abc"}, TypeError, "columns: expected"),
    (
        "both-uneven",
        {"negatives": "both", "r1": R[:5]},
        ValueError,
        "r2: expected 5 rows like r1 with negatives='both', got 8",
    ),
    (
        "same-temperature",
        {"negatives": "same", "temperature": torch.tensor(0.1)},
        ValueError,
        "temperature: expected a number with negatives='same'",
    ),
]


@pytest.mark.parametrize(
    "changes,error,message", [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input_gets_a_sentence(changes, error, message):
    with pytest.raises(error) as caught:
        call(**changes)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text and len(text) < 250


@pytest.mark.parametrize("name", ["temperature", "eps"])
def test_an_int_that_no_float_holds_is_not_finite(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a positive finite number, got 1000"):
        call(**{name: 10**309})


def test_dtensor_is_named():
    class DTensor(torch.Tensor):
        """Stands for torch.distributed.tensor.DTensor, which is slow to import."""

    with pytest.raises(TypeError, match="r1: expected a local tensor, got a DTensor"):
        call(r1=R.as_subclass(DTensor))


def test_a_backend_without_the_option_says_so(views):
    with pytest.raises(NotImplementedError, match="'torch' cannot run.*reference backend only"):
        fast_directclr_loss(*views, 20, negatives="same", backend="torch")
    with pytest.raises(NotImplementedError, match="no backend can run.*torch: precision 'fp8'"):
        fast_directclr_loss(*views, 20, precision="fp8")


def test_an_option_has_one_default():
    """The signature, which people read, and the record, which everything else is made from."""
    shown = inspect.signature(fast_directclr_loss).parameters
    shown = {name: p.default for name, p in shown.items() if p.default is not p.empty}
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    del fields["autocast"]  # found, not asked
    assert fields == {k: v for k, v in shown.items() if k not in ("columns", "labels", "group")}
    module = inspect.signature(DirectCLRLoss).parameters
    assert all(module[name].default == fields[name] for name in ("dim", "temperature"))


def test_module_rejects_what_the_function_rejects():
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        DirectCLRLoss(temperature=0.0)
    with pytest.raises(ValueError, match="columns: .*got 3 twice"):
        DirectCLRLoss(columns=[3, 3])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_temperature_of_one_element(shape, compiled, views):
    """N14: the gradient comes in the shape of the tensor."""
    function = torch.compile(fast_directclr_loss) if compiled else fast_directclr_loss
    truth = evaluate(fast_directclr_loss, *views, 20, temperature=torch.tensor(0.2))
    for ours in (
        evaluate(function, *views, 20, temperature=torch.full(shape, 0.2)),
        evaluate(info_nce, *views, temperature=torch.full(shape, 0.2)),
    ):
        assert ours.dtemperature.shape == shape
    ours = evaluate(function, *views, 20, temperature=torch.full(shape, 0.2))
    assert relative_error(ours.dtemperature.reshape(()), truth.dtemperature) < 1e-6


def test_temperature_can_be_set():
    """N13: a schedule."""
    r = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    fixed, learned = DirectCLRLoss(12), DirectCLRLoss(12, learnable_temperature=True)
    for criterion in (fixed, learned):
        criterion.temperature = 0.3
        torch.testing.assert_close(criterion(r, r), fast_directclr_loss(r, r, 12, 0.3))
        for bad in (0.0, -1, float("nan"), float("inf"), "0.1", None, torch.tensor(0.1)):
            with pytest.raises(ValueError, match="temperature: expected a positive finite number"):
                criterion.temperature = bad
    assert "0.3" in repr(fixed) and "0.3" in repr(learned)


def test_a_learned_temperature_keeps_within_its_bounds():
    """N11: rows that would drive the temperature to 0 drive it to the bound, and others back."""
    same = torch.eye(8)
    generator = torch.Generator().manual_seed(0)
    other = [torch.randn(8, 8, generator=generator) for _ in range(2)]
    criterion = DirectCLRLoss(
        None, 0.02, learnable_temperature=True, temperature_min=0.01, temperature_max=1.0
    )
    optimizer = torch.optim.SGD(criterion.parameters(), 1.0)

    def step(r1, r2):
        optimizer.zero_grad()
        criterion(r1, r2).backward()
        optimizer.step()

    criterion.temperature = 0.2
    for _ in range(30):
        step(same + 0.3, same + 0.3)  # the colder the better
    with torch.no_grad():
        criterion.log_temperature.fill_(math.log(0.001))
    step(same + 0.9, same + 0.9)
    assert float(criterion.log_temperature.grad) == 0.0  # it would lead on outside
    assert float(criterion.temperature.detach()) == pytest.approx(0.01)
    step(*other)
    assert float(criterion.log_temperature.grad) < 0.0  # this one leads back
    assert float(criterion.log_temperature.detach()) > math.log(0.001)
    with torch.no_grad():
        criterion.log_temperature.fill_(3.0)
    step(*other)
    assert float(criterion.log_temperature.grad) == 0.0
    compiled = torch.compile(criterion, fullgraph=True)
    torch.testing.assert_close(compiled(*other), criterion(*other))
    torch.testing.assert_close(criterion(*other), fast_directclr_loss(*other, None, 1.0))


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="temperature_min: expected a positive"):
        DirectCLRLoss(temperature_min=0.0)
    with pytest.raises(ValueError, match="temperature: expected 0.01 to inf as bounded, got 0.001"):
        DirectCLRLoss(temperature=0.001, temperature_min=0.01)
    criterion = DirectCLRLoss(temperature_max=0.5)
    with pytest.raises(ValueError, match="temperature: expected 0.0 to 0.5 as bounded, got 0.7"):
        criterion.temperature = 0.7


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_log_temperature_is_fp32_whatever_the_default(default):
    """A17, and moved with the module."""
    torch.set_default_dtype(default)
    try:
        criterion = DirectCLRLoss(learnable_temperature=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert criterion.log_temperature.dtype == torch.float32
    assert float(criterion.temperature.detach()) == pytest.approx(0.1)
    assert criterion.double().log_temperature.dtype == torch.float64


def test_a_scalar_of_an_older_checkpoint_loads():
    """A13's other side: the parameter was 0-dim once."""
    model = torch.nn.ModuleDict({"loss": DirectCLRLoss(learnable_temperature=True)})
    state = {"loss.log_temperature": torch.tensor(-1.5)}
    model.load_state_dict(state)
    assert model["loss"].log_temperature.shape == (1,) and state["loss.log_temperature"].dim() == 0
    assert float(model["loss"].log_temperature) == -1.5


def test_made_on_meta_and_given_memory():
    """A11, A12: what values meta and to_empty forget comes back."""
    with torch.device("meta"):
        criterion = DirectCLRLoss(columns=[3, 1, 0], temperature=0.07, learnable_temperature=True)
        with pytest.raises(ValueError, match="columns: expected values .* got a meta tensor"):
            DirectCLRLoss(columns=torch.tensor([3, 1]))
    assert "temperature=?" in repr(criterion)
    criterion.to_empty(device="cpu")
    criterion.columns.fill_(7)
    criterion.reset_parameters()
    assert criterion.columns.tolist() == [3, 1, 0]
    assert float(criterion.temperature.detach()) == pytest.approx(0.07) and "0.07" in repr(
        criterion
    )


@pytest.fixture
def gloo(tmp_path):
    """torch.distributed with this process alone, and a group of it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def test_copies_and_pickles_of_a_module_that_holds_a_group(gloo):
    """A10: a copy holds the same group, a pickle finds it again."""
    r = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for group in (gloo, dist.group.WORLD):
        criterion = DirectCLRLoss(12, group=group, learnable_temperature=True)
        twin = copy.deepcopy(criterion)
        assert twin.options["group"] is group and criterion.options["group"] is group
        assert twin.log_temperature is not criterion.log_temperature
        file = io.BytesIO()
        torch.save(criterion, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert loaded.options["group"] == (gloo if group is gloo else "world")
        torch.testing.assert_close(loaded(r, r), criterion(r, r))
    file = io.BytesIO()
    torch.save(DirectCLRLoss(12, group=gloo), file)
    dist.destroy_process_group(gloo)
    file.seek(0)
    orphan = torch.load(file, weights_only=False)
    with pytest.raises(ValueError, match=r"group: expected a ProcessGroup .* ranks \[0\] of the"):
        orphan(r, r)
    orphan.options["group"] = None
    assert orphan(r, r).isfinite()
    assert copy.deepcopy(DirectCLRLoss(group="world")).options["group"] == "world"


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from directclr_fast import DirectCLRLoss

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(16, 24, bias=False)
        self.loss = DirectCLRLoss(20, 0.2, learnable_temperature=True, temperature_min=0.01)

    def forward(self, a, b):
        return self.loss(self.encoder(a), self.encoder(b))

torch.manual_seed(0)
whole, sharded = Model(), Model()
sharded.load_state_dict(whole.state_dict())
fully_shard(sharded, mesh=mesh)
a, b = torch.randn(2, 12, 16)
want, loss = whole(a, b), sharded(a, b)
want.backward(), loss.backward()
torch.testing.assert_close(loss, want)
for ours, p in zip(sharded.parameters(), whole.parameters()):
    torch.testing.assert_close(ours.grad.full_tensor(), p.grad)
assert "temperature=?" in repr(sharded)
sharded.loss.temperature = 0.3
assert abs(float(sharded.loss.log_temperature.full_tensor()) - torch.tensor(0.3).log()) < 1e-6
dist.destroy_process_group()
os._exit(0)  # the mesh keeps Gloo's threads, which at times abort an interpreter that ends
"""


def test_fully_shard_takes_the_module(tmp_path):
    """A13: FSDP2 over two processes, the loss among what it shards."""
    commands = [[sys.executable, "-c", SHARDED, rank, tmp_path / "store"] for rank in range(2)]
    for done in waiting.together(commands, tmp_path / "printed"):
        assert done.returncode == 0, done.stderr[-2000:]


def test_info_nce_takes_no_slice():
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(z, z), fast_directclr_loss(z, z, None, symmetric=False))


def test_version_is_a_string():
    assert re.fullmatch(r"\d+\.\d+\.\d+", directclr_fast.__version__)
