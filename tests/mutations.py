"""Breaks lines of the product one at a time and shows that the suite notices each.

    python tests/mutations.py                # all of them, a line each
    python tests/mutations.py cpu address    # those whose name contains a word
    python tests/mutations.py --untouched    # the same tests with nothing broken: all must pass

Not part of the suite (docs/testing.md). Every mutation is made in a copy of the checkout, where
only the tests that should notice it run; it is noticed when one of them fails or its process dies.
The exit status is 1 if one survives.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


class Mutation(NamedTuple):
    """``old`` stands once in ``file``; with ``new`` in its place, one of ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest, which runs in tests/


MUTATIONS = [
    # -------------------------------------------------------------------------- csrc/cpu
    Mutation(
        "cpu: the diagonal stays in the sums", "csrc/cpu/similarity.h",
        "j == positive || ", "",
        "test_native_kernels.py -k 'test_square and portable'",
    ),
    Mutation(
        "cpu: columns beyond the edge", "csrc/cpu/similarity.h",
        "j >= cols || ", "",
        "test_native_kernels.py -k 'test_square and portable'",
    ),
    Mutation(
        "cpu: the other half of a view with itself", "csrc/cpu/similarity.h",
        "(pair.upper && j < positive)", "false",
        "test_native_kernels.py -k 'test_self_pair and portable'",
    ),
    Mutation(
        "cpu: the offset of a block of rows", "csrc/cpu/similarity.h",
        "i0 + pair.row_offset - j0", "i0 - j0",
        "test_native_kernels.py -k 'test_block_row and portable'",
    ),
    Mutation(
        "cpu: a product is one chain of additions", "csrc/cpu/similarity.h",
        "T::PACK == 1 ? 192 : KC", "KC",
        "test_native_kernels.py -k 'added_up_in_chains and portable'",
    ),
    Mutation(
        "cpu: old weights below the diagonal of a view with itself", "csrc/cpu/weights.h",
        "__builtin_memset(s.g, 0,", "(void)(",
        "test_native_kernels.py -k 'test_self_pair and portable'",
    ),
    Mutation(
        "cpu: tiles kept of other products are read", "csrc/cpu/stages.cpp",
        "args.pair.keep_panels = 0;", "(void)mark;",
        "test_native_kernels.py -k kept_from_other",
    ),
    Mutation(
        "cpu: rows that parts share are not packed", "csrc/cpu/stages.cpp",
        "kTileUnit, t + 1, team), to);", "kTileUnit, t, team), to);",
        "test_native_kernels.py -k 'repeats and tiles'",
    ),
    Mutation(
        "cpu: a NaN is rounded to bf16 like a number", "csrc/cpu/tile_products.h",
        'return x == x ? (vf)rounded : splat(__builtin_nanf(""));', "return (vf)rounded;",
        "test_native_kernels.py -k nan_reaches",
    ),
    Mutation(
        "cpu: fp16 inputs are multiplied in bf16", "directclr_fast/backends/cpu.py",
        'return "tf32" if problem.dtype', 'return "bf16" if problem.dtype',
        "test_cpu_backend.py -k auto_rounds",
    ),
    Mutation(
        "cpu: the other half of a bf16 word's last pair of rows", "csrc/cpu/gemm.h",
        "rows > 1 ? load(z + pitch) : vf{}", "load(z + pitch)",
        "test_native_kernels.py -k rounded_operands",
    ),
    Mutation(
        "cpu: a running sum keeps its old reference", "csrc/cpu/sums.h",
        "rsum = ldexp(rsum, rref - r)", "rsum = rsum",
        "test_native_kernels.py -k 'test_temperatures and portable'",
    ),
    Mutation(
        "cpu: partial sums join without their references", "csrc/cpu/stages.cpp",
        "sum = sum * std::exp2(ref - top)", "sum = sum",
        "test_native_kernels.py -k 'test_self_pair and portable'",
    ),
    Mutation(
        "cpu: both directions of a step's upstream", "csrc/cpu/step.cpp",
        "s.symmetric ? 0.5 * s.scale : s.scale", "s.scale",
        "test_cpu_backend.py -k 'generated and portable'",
    ),
    Mutation(
        "cpu: the temperature of a step with both kinds of negatives", "csrc/cpu/step.cpp",
        "s.both ? 0.5 * (dots[0] + dots[1])", "s.both ? dots[0] + dots[1]",
        "test_cpu_backend.py -k 'generated and portable'",
    ),
    Mutation(
        "cpu: a norm below eps", "csrc/cpu/normalize.h",
        "norm < args.eps ? args.eps : norm", "norm",
        "test_loss_exact.py -k 'shorter_than_eps and cpu'",
    ),
    Mutation(
        "cpu: the projection of a row shorter than eps", "csrc/cpu/finish.h",
        "r >= args.rnorm_clamped ? 0.0f : float(along)", "float(along)",
        "test_loss_exact.py -k 'shorter_than_eps and cpu'",
    ),
    Mutation(
        "cpu: the columns that were not taken", "csrc/cpu/finish.h",
        "__builtin_memset(row + args.d, 0,", "__builtin_memset(row + args.d, 1,",
        "test_native_kernels.py -k 'full_width and portable'",
    ),
    Mutation(
        "cpu: the forced body of the kernels", "csrc/cpu/isa.cpp",
        "forced.store(k,", "forced.store(available_kernels().front(),",
        "test_cpu_backend.py -k doctor_names",
    ),
    Mutation(
        "cpu: the body that the environment names", "csrc/cpu/isa.cpp",
        "std::string(name) == k->name", "name == nullptr",
        "test_dispatch.py -k environment_names",
    ),
    # -------------------------------------------------------------------------- backends
    Mutation(
        "cpu: an unknown name in the environment", "directclr_fast/backends/cpu.py",
        "_asked not in _cpu.available_isas()", "not _asked",
        "test_dispatch.py -k environment_names",
    ),
    Mutation(
        "cpu: the positive is exact where its neighbours are rounded",
        "csrc/cpu/stages.cpp",
        "exact = rounded(args.pair) && logits;", "exact = logits;",
        "test_cpu_backend.py -k 'equal_rows and portable'",
    ),
    Mutation(
        "cpu: an index that changed since it was checked", "directclr_fast/backends/cpu.py",
        "not _cpu.within(columns, dim, width)", "not columns",
        "test_ops.py -k 'write_nothing_outside and cpu'",
    ),
    Mutation(
        "torch: the diagonal stays in the sums", "directclr_fast/backends/torch_blocked.py",
        'diagonal.fill_(float("-inf"))', "pass",
        "test_loss_formula.py -k 'released_formula and torch'",
    ),
    Mutation(
        "torch: both halves of a view with itself", "directclr_fast/backends/torch_blocked.py",
        "if triangle and columns.start < rows.start:", "if False:",
        "'test_loss_exact.py::test_generated_cases_match_the_formula_in_fp64[torch-1]'",
    ),
    Mutation(
        "torch: a norm below eps", "directclr_fast/backends/torch_blocked.py",
        "norm.clamp_min_(problem.eps)", "norm",
        "test_loss_exact.py -k 'shorter_than_eps and torch'",
    ),
    Mutation(
        "torch: 1/temperature joins before the product", "directclr_fast/backends/torch_blocked.py",
        "torch.mm(z1[rows], z2[columns].T, out=s).mul_(scale)",
        "torch.mm(z1[rows] * scale, z2[columns].T, out=s)",
        "test_loss_exact.py -k equal_rows",
    ),
    Mutation(
        "torch: fp64 logits off by 2^-44", "directclr_fast/backends/torch_blocked.py",
        "out=s).mul_(scale)", "out=s).mul_(scale * (1 + 2**-44))",
        "'test_loss_exact.py::test_generated_cases_match_the_formula_in_fp64[torch-0]'",
    ),
    Mutation(
        "driver: p - 1 by a difference", "directclr_fast/driver.py",
        "diagonal = w * torch.expm1(-state.nll_row)",
        "diagonal = w * (torch.exp(-state.nll_row) - 1)",
        "test_loss_exact.py -k 'converged_pair and torch'",
    ),
    Mutation(
        "driver: the sign of the temperature's gradient", "directclr_fast/driver.py",
        "-total * scale if need[2]", "total * scale if need[2]",
        "test_loss_api.py -k 'only_the_temperature and torch'",
    ),
    # -------------------------------------------------------------------------- kernels, csrc/cuda
    Mutation(
        "triton: the diagonal stays in the sums", "kernels/sums.py",
        "return inside & (offs_t[:, None] != offs_f[None, :] + offset)", "return inside",
        "test_triton.py -k shorter_than_eps",
    ),
    Mutation(
        "triton: the offset of a block of rows", "kernels/sums.py",
        "!= offs_f[None, :] + offset)", "!= offs_f[None, :])",
        "test_distributed.py -k 'without_positives and triton'",
    ),
    Mutation(
        "triton: the diagonal of a view with itself", "kernels/sums.py",
        "offs_t[:, None] > offs_f[None, :]", "offs_t[:, None] >= offs_f[None, :]",
        "test_triton.py -k shorter_than_eps",
    ),
    Mutation(
        "triton: candidates beyond the edge", "kernels/sums.py",
        "(offs_t < n_moving)[:, None] & ", "(offs_t >= 0)[:, None] & ",
        "test_triton.py -k shorter_than_eps",
    ),
    Mutation(
        "triton: the diagonal of the weights", "kernels/weights.py",
        " & (offs_n[None, :] != positive)", "",
        "test_triton.py -k shorter_than_eps",
    ),
    Mutation(
        "triton: tiles after a program's first", "kernels/weights.py",
        "tl.program_id(0), tiles, programs,", "tl.program_id(0), programs, tiles,",
        "test_triton.py -k change_no_bit",
    ),
    Mutation(
        "triton: the columns of a tile's second half", "kernels/weights.py",
        "from_n = start_n + half * WIDTH", "from_n = start_n",
        "test_triton.py -k change_no_bit",
    ),
    Mutation(
        "triton: candidates that are added first", "kernels/sums.py",
        "tl.sum(e.reshape(T // FOLD", "tl.max(e.reshape(T // FOLD",
        "test_triton.py -k candidates_first",
    ),
    Mutation(
        "triton: the low part of a row", "kernels/common.py",
        "where + PITCH, mask=mask, other=0.0)", "where + PITCH, mask=mask & False, other=0.0)",
        "'test_triton.py::test_each_precision_keeps_its_error[fp16-converged]'",
    ),
    Mutation(
        "triton: the small products of highest", "kernels/common.py",
        "if PRECISION == \"highest\" and not TMA:", "if False:",
        "'test_triton.py::test_each_precision_keeps_its_error[highest-views]'",
    ),
    Mutation(
        "triton: what stored weights of highest lack", "kernels/weights.py",
        "(g - hi.to(tl.float32)) * REST", "(g - hi.to(tl.float32)) * 0.0",
        "'test_triton.py::test_each_precision_keeps_its_error[highest-views]'",
    ),
    Mutation(
        "triton: lo(P) lo(z)", "kernels/products.py",
        "tl.static_range(1, -1, -1)", "tl.static_range(0, -1, -1)",
        "test_triton.py -k 'equal_rows and one-tensor and 65'",
    ),
    Mutation(
        "highest: weights relative to the largest mass", "directclr_fast/backends/packed.py",
        ".clamp_(min=1e-19)", ".clamp_(min=1.0)",
        "test_triton.py -k converged_pairs",
    ),
    Mutation(
        "triton: the columns that were not taken", "kernels/finish.py",
        "for c in range(d, width, COLUMNS):", "for c in range(width, width, COLUMNS):",
        "test_triton.py -k same_tensor_twice",
    ),
    Mutation(
        "triton: the reciprocal of another eps", "kernels/finish.py",
        "1.0 / shortest(eps), layout.dim", "1.0 / eps, layout.dim",
        "test_triton.py -k shorter_than_eps",
    ),
    Mutation(
        "triton: a gradient's column outside the row", "kernels/finish.py",
        "mask_c &= (column >= 0) & (column < width)", "mask_c &= column == column",
        "test_triton.py -k column_outside",
    ),
    Mutation(
        "cuda: the diagonal stays in the sums", "csrc/cuda/tile.h",
        "(ahead > beyond(i)) & both", "(ahead > beyond(i) - 1) & both",
        "test_cuda_host.py -k 'every_option and plain'",
    ),
    Mutation(
        "cuda: the diagonal of a view with itself", "csrc/cuda/tile.h",
        "((ahead < beyond(i))", "((ahead < beyond(i) + 1)",
        "test_cuda_host.py -k 'every_option and both'",
    ),
    Mutation(
        "cuda: rows beyond the last count", "csrc/cuda/tile.h",
        "W::select(own.rows(h) < p.rows, columns, none)", "columns",
        "test_cuda_host.py -k 'every_option and ragged'",
    ),
    Mutation(
        "cuda: what stored weights of highest lack", "csrc/cuda/tile.h",
        "part ? rest : words[four]", "part ? words[four] : words[four]",
        "test_cuda_host.py -k 'highest_errs and views'",
    ),
    Mutation(
        "cuda: one barrier for all tiles", "csrc/cuda/turns.h",
        "(leads ? kReady : kRead) + buffer()", "(leads ? kReady : kRead)",
        "test_cuda_host.py -k 'wait_for_ever'",
    ),
    Mutation(
        "columns of other values", "directclr_fast/problem.py",
        "key = index.numpy().tobytes(), index.shape, device", "key = index.shape, device",
        "test_loss_api.py -k copied_to_a_device",
    ),
    Mutation(
        "cuda: a column's sum is another's", "csrc/cuda/tile.h",
        "const Int at = place_of_column<Int>(", "const Int at = Int(",
        "test_cuda_host.py -k 'every_option and wide'",
    ),
    Mutation(
        "cuda: the capability of another device", "directclr_fast/backends/packed.py",
        "index = problem.device_index", "index = None",
        "test_dispatch.py -k capability",
    ),
    Mutation(
        "cuda: tiles below the diagonal are run", "csrc/cuda/order.h",
        "return per_column ? row / per_column : 0;", "return 0;",
        "test_cuda_host.py -k 'order or wasted'",
    ),
    Mutation(
        "cuda: a tile on the diagonal is left out", "csrc/cuda/order.h",
        "(column + 1) * per_column - row)", "(column + 1) * per_column - row - (column == 0))",
        "test_cuda_host.py -k 'order'",
    ),
    Mutation(
        "cuda: a tile's mirror image is not stored", "csrc/cuda/tile.h",
        "p.col / kSquare > p.row / kSquare", "p.col / kSquare > p.row / kSquare + 1",
        "test_cuda_host.py -k 'mirrored'",
    ),
    Mutation(
        "cuda: blocks of a mirror image are not turned", "csrc/cuda/tile.h",
        "x[b] = W::transpose8(of[h][b])", "x[b] = of[h][b]",
        "test_cuda_host.py -k 'mirrored'",
    ),
    Mutation(
        "cuda: sums of tiles that are left out", "directclr_fast/backends/hopper.py",
        'buffer.fill_(-torch.inf if name.endswith("peak") else 0.0)', "pass",
        "test_cuda_host.py -k 'every_option and both-tiles'",
    ),
    Mutation(
        "cuda: strips of odd tile rows", "directclr_fast/backends/cuda.py",
        "return 2 * tile.rows", "return 3 * tile.rows",
        "test_cuda_host.py -k 'wasted'",
    ),
    Mutation(
        "cuda: a share of the lines is lost", "csrc/cuda/statistics.h",
        "l = share; l < p.lines; l += shares) {", "l = share + 8; l < p.lines; l += shares) {",
        "test_cuda_host.py -k 'every_option and plain'",
    ),
    Mutation(
        "cuda: the factors of a pair of columns change places", "csrc/cuda/warp.h",
        "x[0][i] = p[at[i]], x[1][i] = p[at[i] + 1]", "x[1][i] = p[at[i]], x[0][i] = p[at[i] + 1]",
        "test_cuda_host.py -k 'every_option and ragged'",
    ),
    Mutation(
        "cuda: a column outside the row", "csrc/cuda/rows.h",
        "if (column < 0 || column >= width) return NAN;", "",
        "test_cuda_host.py -k column_outside",
    ),
    Mutation(
        "cuda: a field too many", "csrc/cuda/bindings.cpp",
        "given.size() == sizeof...(fields)", "given.size() >= sizeof...(fields)",
        "test_cuda_host.py -k struct_of_arguments",
    ),
    Mutation(
        "cuda: a field too few", "csrc/cuda/bindings.cpp",
        "throw py::type_error(std::string(name) + \": the field \" + field + \" is missing\");",
        "return py::int_(0);",
        "test_cuda_host.py -k struct_of_arguments",
    ),
    # -------------------------------------------------------------------------- address.py
    Mutation(
        "address: a subclass is asked", "directclr_fast/address.py",
        "return value.as_subclass(Tensor)", "return value",
        "test_tensor_kinds.py -k reference",
    ),
    Mutation(
        "address: a wrapper is taken for memory", "directclr_fast/address.py",
        'or value.is_nested:', 'or value.is_nested or kind.__name__ == "Wrapper":',
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: a deferred collective is not waited for", "directclr_fast/address.py",
        'kind.__name__ == "AsyncCollectiveTensor"', 'kind.__name__ == ""',
        "test_tensor_kinds.py -k reference",
    ),
    Mutation(
        "address: a negated view is not resolved", "directclr_fast/address.py",
        "return value.resolve_neg()", "return value",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: a negated view is memory", "directclr_fast/address.py",
        "if not tensor.is_neg() and _last(tensor)", "if _last(tensor)",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: storage that was cut is memory", "directclr_fast/address.py",
        "_last(tensor) <= tensor.untyped_storage().nbytes()", "_last(tensor) >= 0",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: storage that was cut is whole", "directclr_fast/address.py",
        "and tensor.nbytes <= tensor.untyped_storage().nbytes()", "",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: a mode sees a kernel's buffers", "directclr_fast/address.py",
        "if torch._C._len_torch_dispatch_stack():", "if False:",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: a fake tensor comes to a kernel", "directclr_fast/address.py",
        "and tensor is not None and wraps(type(tensor))", "and tensor is None",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "address: of another dtype", "directclr_fast/address.py",
        "tensor.dtype is dtype\n            and ", "",
        "test_tensor_kinds.py -k asked_for",
    ),
    Mutation(
        "address: of another size", "directclr_fast/address.py",
        "and tensor.numel() == size\n", "",
        "test_tensor_kinds.py -k asked_for",
    ),
    Mutation(
        "address: of other strides", "directclr_fast/address.py",
        "and tensor.is_contiguous()\n            and (tensor.is_cpu", "and (tensor.is_cpu",
        "test_tensor_kinds.py -k asked_for",
    ),
    Mutation(
        "address: on another device", "directclr_fast/address.py",
        "and (tensor.is_cpu if on_cpu else tensor.device == device)\n", "",
        "test_tensor_kinds.py -k asked_for",
    ),
    Mutation(
        "address: of memory that was freed", "directclr_fast/address.py",
        "((at := tensor.data_ptr()) or not size)", "((at := tensor.data_ptr()) is not None)",
        "test_tensor_kinds.py -k asked_for",
    ),
    Mutation(
        "address: a start on another device", "directclr_fast/address.py",
        "if tensor.device == device and (at", "if (at",
        "test_tensor_kinds.py -k start",
    ),
    # -------------------------------------------------------------------------- ops.py
    Mutation(
        "ops: rows of another length are unpacked", "directclr_fast/ops.py",
        "[(value.dtype, value.shape) for value in saved] != made",
        "[value.dtype for value in saved] != [dtype for dtype, _ in made]",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "ops: rows of another dtype are unpacked", "directclr_fast/ops.py",
        "[(value.dtype, value.shape) for value in saved] != made",
        "[value.shape for value in saved] != [shape for _, shape in made]",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "ops: rows are unpacked on another device", "directclr_fast/ops.py",
        "or any(value.device != dloss.device for value in saved)", "",
        "test_tensor_kinds.py -k torch",
    ),
    Mutation(
        "ops: what is unpacked counts as untouched", "directclr_fast/ops.py",
        "if places != ctx.places:", "if False:",
        "test_tensor_kinds.py -k single_saved",
    ),
    Mutation(
        "ops: a negated view counts as untouched", "directclr_fast/ops.py",
        "v.stride(), v.is_neg())", "v.stride())",
        "test_tensor_kinds.py -k single_saved",
    ),
    Mutation(
        "cpu: equal ids stay in the sums", "csrc/cpu/similarity.h",
        "== id ? left_out : s", "== id ? s : s",
        "test_labels.py -k 'every_backend and cpu and ignore'",
    ),
    Mutation(
        "triton: equal ids stay in the sums", "kernels/sums.py",
        "inside & (id_t[:, None] != id_f[None, :])", "inside",
        "test_triton.py -k 'test_labels and ignore'",
    ),
    Mutation(
        "triton: equal ids keep their weights", "kernels/weights.py",
        "keep & (id_m[:, None] != id_n[None, :])", "keep",
        "test_triton.py -k 'test_labels and ignore'",
    ),
    Mutation(
        "triton: ranges of ids that meet at one end", "kernels/common.py",
        "(tl.min(a, 0) <= tl.max(b, 0))", "(tl.min(a, 0) < tl.max(b, 0))",
        "test_triton.py -k 'test_labels and ignore'",
    ),
    Mutation(
        "labels: a positive alone is one of several", "directclr_fast/labels.py",
        "torch.where(count > 1, weights, 0.0)", "weights * 1.0",
        "test_labels.py -k keeps_its_digits",
    ),
    Mutation(
        "labels: an anchor is its own positive", "directclr_fast/labels.py",
        "2.0 * w[own, None] * z", "0.0 * z",
        "test_labels.py -k 'every_backend and torch and positive and both'",
    ),
    Mutation(
        "labels: a negative one equals others", "directclr_fast/reference.py",
        "labels < 0, -1 - ", "labels < 0, 0 * ",
        "test_labels.py -k 'every_backend and torch'",
    ),
    Mutation(
        "driver: a column with nothing left", "directclr_fast/driver.py",
        "if problem.ignores:  # a column", "if False:  # a column",
        "test_labels.py -k 'every_backend and torch and ignore'",
    ),
    Mutation(
        "ops: an index is unpacked elsewhere", "directclr_fast/ops.py",
        "or any(v is not None and v.device != dloss.device for v in (columns, labels))", "",
        "test_tensor_kinds.py -k triton",
    ),
    Mutation(
        "ops: a compiled call does not look at columns", "directclr_fast/ops.py",
        "if columns is not None and columns.is_cpu:\n", "if False:\n",
        "test_ops.py -k 'columns_are_checked and torch'",
    ),
    Mutation(
        "ops: a compiled formula does not look at columns", "directclr_fast/ops.py",
        "if columns.is_cpu:\n", "if False:\n",
        "test_ops.py -k 'columns_are_checked and reference'",
    ),
    Mutation(
        "ops: a compiled second derivative is left out", "directclr_fast/ops.py",
        "return torch.is_grad_enabled() or (keeps and not torch._C._is_fwd_grad_enabled())",
        "return False",
        "test_ops.py -k 'second_derivative and aot_eager'",
    ),
    Mutation(
        "ops: autocast stays on inside", "directclr_fast/ops.py",
        "stack.enter_context(torch.autocast(kind, enabled=False))", "pass",
        "test_loss_api.py -k 'autocast and torch'",
    ),
    Mutation(
        "ops: a candidate that changed since", "directclr_fast/ops.py",
        "if version is not None and r._version != version:", "if False:",
        "test_autograd_surface.py -k 'second_derivatives_beside and torch'",
    ),
    Mutation(
        "ops: vmap over another dimension", "directclr_fast/ops.py",
        "value.select(dim, i)", "value.select(0, i)",
        "test_autograd_surface.py -k 'test_vmap and torch'",
    ),
    Mutation(
        "ops: fake column statistics of one direction", "directclr_fast/ops.py",
        "columns, own = (n, m) if problem.symmetric else (0, 0)", "columns, own = n, m",
        "test_ops.py -k 'opcheck and one-direction and torch'",
    ),
    # -------------------------------------------------------------------------- loss, products
    Mutation(
        "ops: only the temperature wants a gradient", "directclr_fast/ops.py",
        "wanted or (temperature is not None and temperature.requires_grad)", "wanted",
        "test_loss_api.py -k 'only_the_temperature and torch'",
    ),
    Mutation(
        "problem: autocast is not told", "directclr_fast/problem.py",
        "*values, autocast)", "*values, False)",
        "test_triton.py -k autocast",
    ),
    Mutation(
        "problem: more columns than there are", "directclr_fast/problem.py",
        "if not 0 < dim <= width:", "if not 0 < dim:",
        "test_loss_api.py -k bad_input",
    ),
    Mutation(
        "loss: a bound of the temperature lets go", "directclr_fast/loss.py",
        "grad.clamp(max=0.0)", "grad",
        "test_loss_api.py -k keeps_within",
    ),
    Mutation(
        "products: bf16 products are exact", "directclr_fast/products.py",
        'in ("tf32", "bf16")', 'in ("tf32",)',
        "test_autograd_surface.py -k switch",
    ),
    Mutation(
        "products: a switch is not put back", "directclr_fast/products.py",
        "    finally:\n        switch.fp32_precision = before", "    finally:\n        pass",
        "test_autograd_surface.py -k put_back",
    ),
    Mutation(
        "dispatch: interpreted kernels are chosen", "directclr_fast/dispatch.py",
        'if not against and asked == "auto":', "if False:",
        "test_triton.py -k never_takes",
    ),
    # -------------------------------------------------------------------------- several processes
    Mutation(
        "world: the parts of a column", "directclr_fast/world.py",
        "return join(arriving.unflatten(0, (size, rows)), 0)",
        "return arriving.unflatten(0, (size, rows)).amax(0)",
        "test_distributed.py -k reference_in_fp64",
    ),
    Mutation(
        "world: the offset of a process's rows", "directclr_fast/world.py",
        "yield slice(0, sum(self.counts)), self.own(problem).start, *held",
        "yield slice(0, sum(self.counts)), 0, *held",
        "test_distributed.py -k reference_in_fp64",
    ),
    Mutation(
        "world: dz2 of fewer rows than the most have", "directclr_fast/world.py",
        "into[: len(rows)] = rows", "into[-len(rows) :] = rows",
        "test_distributed.py -k reduce_scatter",
    ),
    Mutation(
        "distributed: the hosts' group waits for half an hour", "directclr_fast/distributed.py",
        "dist.get_world_size(group), limit", "dist.get_world_size(group)",
        "test_distributed.py -k companion",
    ),
    Mutation(
        "ops: what is unpacked is not looked at", "directclr_fast/ops.py",
        "[(value.dtype, value.shape) for value in saved] != made", "False",
        "test_tensor_kinds.py -k torch",
    ),
    # -------------------------------------------------------------------------- train
    Mutation(
        "gradcache: another random state in the second pass", "directclr_fast/train/gradcache.py",
        "_set_random_state(random[number], device)", "pass",
        "test_gradcache.py -k random_state",
    ),
    Mutation(
        "gradcache: the gradient of the other view", "directclr_fast/train/gradcache.py",
        "(d1, d2)[view][rows]", "(d1, d2)[0][rows]",
        "test_gradcache.py -k 'plain_step and 5-directclr'",
    ),
    Mutation(
        "checkpoint: written where the old one is", "directclr_fast/train/checkpoint.py",
        'temporary = path.with_name(f".{path.name}.tmp")', "temporary = path",
        "test_checkpoint.py -k replacing_keeps",
    ),
    Mutation(
        "checkpoint: not synced before it takes its name", "directclr_fast/train/checkpoint.py",
        "            os.fsync(file.fileno())\n", "",
        "test_checkpoint.py -k failure_at_each_step",
    ),
    Mutation(
        "checkpoint: damage is not looked for", "directclr_fast/train/checkpoint.py",
        "if damaged is not None:", "if False:",
        "test_checkpoint.py -k flipped_byte_of_a_tensor",
    ),
    Mutation(
        "resume: the views begin anew", "directclr_fast/train/checkpoint.py",
        "        views.set_state(saved)\n", "",
        "'test_train_run.py::test_resumed_run_is_bitwise_the_uninterrupted_one[adamw]'",
    ),
    Mutation(
        "folder: links are followed into the data", "directclr_fast/train/folder.py",
        "any(_within(real, root) for root in self.roots)", "False",
        "test_folders.py -k links_and_cycles",
    ),
    Mutation(
        "crops: each epoch cuts the same pieces", "directclr_fast/train/data.py",
        "_mix(self.seed, epoch, position)", "_mix(self.seed, position)",
        "test_crops.py -k seed_epoch_and_batch",
    ),
    Mutation(
        "crops: every view has the first one's piece", "directclr_fast/train/loop.py",
        "images[rows, which] if cut", "images[rows, 0] if cut",
        "'test_crops.py::test_a_run_on_pictures_in_chunks_and_parts[small]'",
    ),
    Mutation(
        "resume: a setting that differs", "directclr_fast/train/config.py",
        'elif now != before and rule == "same":', "elif False:",
        "test_resume.py -k not_given",
    ),
    Mutation(
        "train: a rank's rows of the views", "directclr_fast/train/loop.py",
        "first + rows.start", "rows.start",
        "test_train_distributed.py -k views_are_the_same",
    ),
    Mutation(
        "ranks: what arrives is run", "directclr_fast/train/ranks.py",
        "weights_only=True", "weights_only=False",
        "test_train_distributed.py -k what_ranks_send",
    ),
    Mutation(
        "ranks: the others are not told why", "directclr_fast/train/ranks.py",
        'self._note("ended", why)', 'self._note("ended", "")',
        "test_train_distributed.py -k who_is_missing",
    ),
    Mutation(
        "ranks: gradients in the order of a bucket", "directclr_fast/train/loop.py",
        "if gpu is None and ranks.size > 2:", "if False:",
        "test_train_distributed.py -k to_the_bit",
    ),
    Mutation(
        "train: a loss that is nan", "directclr_fast/train/guard.py",
        "good = loss.detach().isfinite() & (bad == 0)", "good = bad == 0",
        "'test_train_run.py::test_a_step_that_is_not_finite_changes_nothing[adamw-loss-True]'",
    ),
    Mutation(
        "train: statistics of a step left out", "directclr_fast/train/guard.py",
        "b.copy_(old)", "pass",
        "'test_train_run.py::test_a_step_that_is_not_finite_changes_nothing[adamw-loss-True]'",
    ),
    Mutation(
        "train: weights that are nan are saved", "directclr_fast/train/loop.py",
        "            raise self._diverged()\n", "            pass\n",
        "test_train_run.py -k weights_that_are_not_finite",
    ),
    Mutation(
        "paper: differences are paired by seed", "directclr_fast/paper/report.py",
        "for v, w in zip(x, y)]", "for v, w in zip(x, sorted(y))]",
        "test_compare.py -k verdict",
    ),
    Mutation(
        "paper: a search looks at the test part", "directclr_fast/paper/runs.py",
        "    if run.search:\n        images", "    if False:\n        images",
        "test_compare.py -k what_is_run",
    ),
    Mutation(
        "paper: a look trains on", "directclr_fast/paper/mechanism.py",
        "copy.deepcopy(model).eval()", "model.eval()",
        "test_mechanism.py -k changes_nothing",
    ),
    Mutation(
        "paper: the last shortcut stays", "directclr_fast/train/encoders.py",
        "self.shortcut = None", "pass",
        "test_train_encoders.py -k last_shortcut",
    ),
]  # fmt: skip


class NoVerdict(Exception):
    """The tests could not be run with this mutation, or none of them ran."""


class Copy:
    """The checkout's files, laid out so that they are imported and not the installed package."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        (folder / "directclr_fast/kernels").symlink_to("../kernels")
        # Nothing that a process compiled from broken code may serve another.
        self.environment = os.environ | {
            "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "CXXFLAGS": "-O1",
        }  # fmt: skip
        asked = (
            "import directclr_fast.kernels as k, directclr_fast as d; print(k.__path__, d.__path__)"
        )
        places = self.run(sys.executable, "-c", asked).stdout
        if places.count(str(folder)) != 2:
            raise SystemExit(f"expected the copy in {folder} to be imported, got {places}")

    def run(self, *command: str, folder: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.folder / folder, env=self.environment, capture_output=True, text=True
        )

    def noticed(self, mutation: Mutation) -> str | None:
        """The test that failed, or None."""
        file = self.folder / mutation.file
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise NoVerdict(f"{text.count(mutation.old)} places in {file.name}")
        compiled = mutation.file.startswith("csrc/cpu")
        built = list((self.folder / "directclr_fast").glob("_cpu.*")) if compiled else []
        before = [path.read_bytes() for path in built]
        try:
            file.write_text(text.replace(mutation.old, mutation.new))
            if compiled:
                self.build()
            return self.test(mutation)
        finally:
            file.write_text(text)
            for path, data in zip(built, before):
                path.write_bytes(data)

    def build(self) -> None:
        done = self.run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        if done.returncode or "without its compiled" in done.stderr:
            raise NoVerdict(done.stdout[-2000:] + done.stderr[-2000:])

    def test(self, mutation: Mutation) -> str | None:
        options = ("-x", "-rf", "-p", "no:cacheprovider", *shlex.split(mutation.tests))
        done = self.run(sys.executable, "-m", "pytest", *options, folder="tests")
        if done.returncode < 0:
            return f"the process died ({done.returncode})"
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if done.returncode == 1 and failed:
            return failed[0].removeprefix("FAILED ").partition(" - ")[0]
        if done.returncode or " passed" not in done.stdout:
            raise NoVerdict(done.stdout[-2000:] + done.stderr[-2000:])
        return None


def main() -> int:
    """Runs the mutations named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--untouched", action="store_true")
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        copy = Copy(Path(name) / "copy")
        for mutation in MUTATIONS:
            if arguments.words and not any(word in mutation.name for word in arguments.words):
                continue
            begin, by = time.monotonic(), None
            if arguments.untouched:
                mutation = mutation._replace(new=mutation.old)
            try:
                by = copy.noticed(mutation)
                verdict = "survived" if by is None else "noticed"
            except NoVerdict as reason:
                verdict, by = "no verdict", str(reason)
            wrong += verdict != ("survived" if arguments.untouched else "noticed")
            seconds = time.monotonic() - begin
            print(f"{verdict:10} {seconds:4.0f} s  {mutation.name}  {by or ''}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
