"""Checks and times the attention kernels in peft-core/src/kernels/cuda/attention.cu on a CUDA card.

    python3 bench/attention_cuda.py [--source FILE] [--check] [--time] [--tune]

Needs torch and cupy. --check compares every kernel with a float64 reference (relative error by norm; the error of torch's
own bf16 attention on the same inputs beside it), --time compares speed with torch's flash attention, --tune times
alternative tiles. Exits with 1 if a check fails.
"""
import argparse
import math
import os
import random
import re
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import cupy
import numpy as np
import torch
import torch.nn.functional as F
from cupy.cuda import nvrtc
from torch.nn.attention import SDPBackend, sdpa_kernel

SOURCE = ARCHITECTURE = None
I, FLOAT = np.int32, np.float32


def ceil_div(a, b):
    return (a + b - 1) // b


def compile_module(d, tiles):
    """A module for head_dim d, with other values for the named constants of the source."""
    source = SOURCE
    for name, value in tiles.items():
        source, count = re.subn(rf"(constexpr (?:int|bool) {name}) = [^;]*;", rf"\1 = {value};", source)
        assert count, name
    program = nvrtc.createProgram(source, "attention.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-DHEAD_DIM={d}", f"--gpu-architecture={ARCHITECTURE}"))
    except nvrtc.NVRTCError:
        print(nvrtc.getProgramLog(program))
        raise
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.getCUBIN(program))
        file.flush()
        module = cupy.RawModule(path=file.name)
        module.get_function("attention_forward")
    return module


class Kernels:
    """The kernels for one head_dim, with their launch geometry."""

    def __init__(self, d, module):
        self.d = d
        self.module = module
        self.functions = {}
        geometry = torch.zeros(13, dtype=torch.int32, device="cuda")
        self.launch("attention_geometry", (1,), 1, 0, geometry)
        geometry = geometry.tolist()
        self.forward_tile, self.dq_tile, self.dkv_tile = geometry[0:3], geometry[3:6], geometry[6:9]
        self.forward_rows, self.dq_rows, self.dkv_rows = geometry[0:9:3]
        self.lanes, self.slices, *self.decode_tile = geometry[9:]

    def launch(self, name, grid, block, shared, *args):
        function = self.functions.get(name)
        if function is None:
            function = self.functions[name] = self.module.get_function(name)
            if shared > 48 * 1024:
                function.max_dynamic_shared_size_bytes = shared
        args = tuple(a.data_ptr() if torch.is_tensor(a) else 0 if a is None else a for a in args)
        with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
            function(grid, (block,), args, shared_mem=shared)

    def prepare(self, n, h, kv, qk=None, qkv=None, turn=(None,) * 4, eps=0.0, delta=None, do=None, o=None, window=0,
                q_order=None, first=None, kv_order=None, last=None):
        rows = (self.forward_rows if delta is None else self.dq_rows, self.dkv_rows)
        blocks = sum(ceil_div(ceil_div(n, r), 256) for order, r in zip((q_order, kv_order), rows) if order is not None)
        blocks += 0 if qk is None else ceil_div(n * (h + kv) * self.lanes, 256)
        blocks += 0 if delta is None else ceil_div(n * h * self.lanes, 256)
        self.launch("attention_prepare", (blocks,), 256, 0, qk, qkv, *turn, I(n), I(h), I(kv), FLOAT(eps), delta, do, o,
                    I(window), q_order, first, I(rows[0]), kv_order, last, I(rows[1]))

    def empty_order(self, n, rows):
        return torch.full((ceil_div(n, rows),), -1, dtype=torch.int32, device="cuda")

    def empty_turned(self, n, h, kv):
        return torch.full((n, (h + kv) * self.d), float("nan"), dtype=torch.bfloat16, device="cuda")

    def rotate_backward(self, dqkv, qkv, n, h, kv, cos, sin, q_norm, k_norm, eps):
        self.launch("attention_rotate_backward", (ceil_div(n * (h + kv), 256 // self.lanes),), 256, 0, dqkv, qkv, cos,
                    sin, q_norm, k_norm, I(n), I(h), I(kv), FLOAT(eps))

    def forward(self, o, lse, qk, qkv, first, order, n, h, kv, window, scale):
        self.launch("attention_forward", (h, ceil_div(n, self.forward_rows)), *self.forward_tile[1:],
                    o, lse, qk, qkv, first, order, I(n), I(h), I(kv), I(window), FLOAT(scale))

    def backward_q(self, dqkv, do, qk, qkv, lse, delta, first, order, cos, sin, n, h, kv, window, scale):
        self.launch("attention_backward_q", (h, ceil_div(n, self.dq_rows)), *self.dq_tile[1:],
                    dqkv, do, qk, qkv, lse, delta, first, order, cos, sin, I(n), I(h), I(kv), I(window), FLOAT(scale))

    def backward_kv(self, dqkv, do, qk, qkv, lse, delta, last, order, cos, sin, n, h, kv, window, scale):
        self.launch("attention_backward_kv", (kv, ceil_div(n, self.dkv_rows), self.slices),
                    *self.dkv_tile[1:], dqkv, do, qk, qkv, lse, delta, last, order, cos, sin, I(n), I(h),
                    I(kv), I(window), FLOAT(scale))

    def decode(self, out, partial, arrived, q, k, v, first, length, window, scale, splits):
        b, t, h, d = q.shape
        kv, capacity = k.shape[1], k.shape[2]
        row_tiles = ceil_div(t * (h // kv), 16)
        self.launch("attention_decode", (splits, kv * row_tiles, b), *self.decode_tile, out, partial, arrived, q, k,
                    v, first, I(length), I(t), I(h), I(kv), I(capacity), I(window), FLOAT(scale))


def build(configurations):
    """Kernels of many (head_dim, tiles), compiled side by side."""
    with ThreadPoolExecutor(12) as pool:
        modules = list(pool.map(lambda c: compile_module(*c), configurations))
    return [Kernels(c[0], m) for c, m in zip(configurations, modules)]


# ---------------------------------------------------------------------------------------------------------- reference

def reference_rotate(x, cos, sin, norm, eps):
    """x [n, heads, d] float64 -> normed, rotated."""
    if norm is not None:
        x = norm.double() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    if cos is not None:
        a, b = x.chunk(2, -1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        x = torch.cat([a * c - b * s, b * c + a * s], -1)
    return x


def reference_attention(q, k, v, seen, scale):
    """q [n, h, d], k, v [n, kv, d], seen [n, n] -> o [n, h, d], lse [h, n]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    s = s.masked_fill(~seen, -math.inf)
    return torch.einsum("hij,jhd->ihd", torch.softmax(s, -1), v), torch.logsumexp(s, -1)


def segments(n, kind):
    """first, last of n tokens: one sequence, packed segments, or sequences padded on the right."""
    first, last, at = [], [], 0
    while at < n:
        length = n if kind == "one" else min(n - at, random.randint(1, max(1, n // 3)))
        first += [at] * length
        last += [at + length] * length
        at += length
        if kind == "padded":
            for _ in range(min(n - at, random.randint(0, 40))):
                first.append(at)
                last.append(at + 1)
                at += 1
    return (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (first, last))


def error(x, reference):
    x, reference = x.double(), reference.double()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-30)).item()


def check(kernels):
    failures = 0
    worst = {}
    print(f"{'case':58s} {'rotate':>8s} {'o':>8s} {'lse':>8s} {'dq':>8s} {'dk':>8s} {'dv':>8s} {'dqkv':>8s} {'fused':>8s} "
          f"| torch o, dq, dk, dv")
    cases = []
    for d in sorted(kernels):
        for n, h, kv, kind, window, norms, big in (
                (1, 2, 1, "one", 0, False, 1), (17, 3, 3, "one", 0, True, 1), (129, 4, 2, "packed", 0, False, 1),
                (513, 8, 1, "one", 0, True, 1), (777, 6, 2, "packed", 0, True, 1), (1000, 4, 1, "padded", 0, False, 1),
                (1025, 4, 4, "padded", 100, True, 1), (1999, 8, 2, "packed", 0, False, 1),
                (2000, 4, 2, "one", 333, False, 1), (640, 4, 2, "packed", 1, False, 1),
                (1536, 4, 2, "one", 0, False, 30)):
            cases.append((d, n, h, kv, kind, window, norms, big))
    for d, n, h, kv, kind, window, norms, big in cases:
        k = kernels[d]
        seed = n * 1000 + d
        random.seed(seed)
        torch.manual_seed(seed)
        first, last = segments(n, kind)
        qkv = (torch.randn(n, (h + 2 * kv) * d, device="cuda") * big).bfloat16()
        do = torch.randn(n, h * d, device="cuda").bfloat16()
        q_norm = (1 + 0.3 * torch.randn(d, device="cuda")).bfloat16() if norms else None
        k_norm = (1 + 0.3 * torch.randn(d, device="cuda")).bfloat16() if norms else None
        angle = torch.arange(n, device="cuda")[:, None] * (10000.0 ** (-torch.arange(d // 2, device="cuda") * 2 / d))
        cos, sin = angle.cos().float(), angle.sin().float()
        eps, scale = 1e-6, 1 / math.sqrt(d)
        nan = float("nan")

        qk, order_f, turn = k.empty_turned(n, h, kv), k.empty_order(n, k.forward_rows), (cos, sin, q_norm, k_norm)
        k.prepare(n, h, kv, qk, qkv, turn, eps, window=window, q_order=order_f, first=first)
        o = torch.full((n, h * d), nan, dtype=torch.bfloat16, device="cuda")
        lse = torch.full((h, n), nan, device="cuda")
        k.forward(o, lse, qk, qkv, first, order_f, n, h, kv, window, scale)
        delta, turned = torch.full((h, n), nan, device="cuda"), qk
        qk, order_q, order_kv = torch.full_like(qk, nan), k.empty_order(n, k.dq_rows), k.empty_order(n, k.dkv_rows)
        k.prepare(n, h, kv, qk, qkv, turn, eps, delta, do, o, window, order_q, first, order_kv, last)
        assert torch.equal(qk, turned)
        dqkv = torch.full_like(qkv, nan)
        arguments = (do, qk, qkv, lse, delta)
        k.backward_q(dqkv, *arguments, first, order_q, None, None, n, h, kv, window, scale)
        k.backward_kv(dqkv, *arguments, last, order_kv, None, None, n, h, kv, window, scale)
        again = torch.full_like(qkv, nan)
        k.backward_q(again, *arguments, first, None, None, None, n, h, kv, window, scale)
        k.backward_kv(again, *arguments, last, None, None, None, n, h, kv, window, scale)
        same = torch.equal(dqkv, again)
        rotated = dqkv.clone()
        fused = torch.full_like(qkv, nan)                      # with the inverse rotation, as without norms
        if k.slices == 1:
            k.backward_q(fused, *arguments, first, None, cos, sin, n, h, kv, window, scale)
            k.backward_kv(fused, *arguments, last, None, cos, sin, n, h, kv, window, scale)
        else:
            fused = rotated.clone()
            k.rotate_backward(fused, qkv, n, h, kv, cos, sin, None, None, eps)
        k.rotate_backward(dqkv, qkv, n, h, kv, cos, sin, q_norm, k_norm, eps)
        torch.cuda.synchronize()

        i = torch.arange(n, device="cuda")
        seen = (i[None] <= i[:, None]) & (i[None] >= first[:, None])
        if window:
            seen &= i[:, None] - i[None] < window
        # rotation alone
        whole = qkv.double().view(n, h + 2 * kv, d).requires_grad_()
        rq = reference_rotate(whole[:, :h], cos, sin, q_norm, eps)
        rk = reference_rotate(whole[:, h:h + kv], cos, sin, k_norm, eps)
        e_rotate = error(qk, torch.cat([rq, rk], 1).reshape(n, -1))
        # attention from the same bf16 q and k
        q64 = qk.double().view(n, h + kv, d)[:, :h].clone().requires_grad_()
        k64 = qk.double().view(n, h + kv, d)[:, h:].clone().requires_grad_()
        v64 = qkv.double().view(n, h + 2 * kv, d)[:, h + kv:].clone().requires_grad_()
        ro, rlse = reference_attention(q64, k64, v64, seen, scale)
        do64 = do.double().view(n, h, d)
        rdq, rdk, rdv = torch.autograd.grad(ro, (q64, k64, v64), do64)
        part = rotated.view(n, h + 2 * kv, d)
        errors = dict(rotate=e_rotate, o=error(o.view(n, h, d), ro), lse=error(lse, rlse),
                      dq=error(part[:, :h], rdq), dk=error(part[:, h:h + kv], rdk), dv=error(part[:, h + kv:], rdv))
        # the backward of the rotation, given our dq', dk'
        (rd,) = torch.autograd.grad(torch.cat([rq, rk, whole[:, h + kv:]], 1), whole, part.double())
        errors["dqkv"] = error(dqkv.view(n, h + 2 * kv, d), rd)
        back = [reference_rotate(x, cos, -sin, None, eps) for x in (rdq, rdk)]
        errors["fused"] = error(fused.view(n, h + 2 * kv, d), torch.cat(back + [rdv], 1))
        # torch's bf16 attention
        tq, tk, tv = (x.detach().bfloat16().transpose(0, 1)[None].requires_grad_() for x in (q64, k64, v64))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            to = F.scaled_dot_product_attention(tq, tk.repeat_interleave(h // kv, 1), tv.repeat_interleave(h // kv, 1),
                                                attn_mask=seen, scale=scale)
        td = torch.autograd.grad(to, (tq, tk, tv), do.view(n, h, d).transpose(0, 1)[None])
        torch_errors = [error(to[0].transpose(0, 1), ro)] + [
            error(g[0].transpose(0, 1), r) for g, r in zip(td, (rdq, rdk, rdv))]
        # a token that sees only itself has dq = dk = 0 exactly: nothing to be relative to
        alone = rdq.norm() < 1e-9
        bad = [x for x, e in errors.items() if not e <= 1e-2 and not (alone and x in ("dq", "dk", "dqkv"))]
        if alone and not (part.double().isfinite().all() and part[:, :h + kv].double().norm() <= 1e-2 * rdv.norm()):
            bad.append("alone")
        if not same:
            bad.append("order or run changes bits")
        for x, e in errors.items():
            if not (alone and x in ("dq", "dk", "dqkv")):
                worst[x] = max(worst.get(x, 0), e)
        failures += bool(bad)
        name = f"d{d} n{n} h{h}/{kv} {kind} window {window}{' norms' if norms else ''}{f' x{big}' if big > 1 else ''}"
        print(f"{name:58s} " + " ".join(f"{e:8.1e}" for e in errors.values()) + " | "
              + " ".join(f"{e:.1e}" for e in torch_errors) + ("   FAILED: " + ", ".join(bad) if bad else ""), flush=True)
    print("worst", {x: f"{e:.1e}" for x, e in worst.items()})
    return failures


def check_decode(kernels):
    failures, worst = 0, 0.0
    for d, k in sorted(kernels.items()):
        for b, t, h, kv, length, capacity, window, splits in (
                (1, 1, 4, 1, 1, 8, 0, 1), (1, 1, 32, 8, 4001, 4100, 0, 32), (3, 1, 9, 3, 257, 300, 0, 5),
                (2, 4, 8, 1, 500, 512, 0, 7), (2, 7, 16, 4, 700, 701, 100, 3), (1, 1, 8, 8, 77, 128, 0, 40)):
            torch.manual_seed(length)
            q = torch.randn(b, t, h, d, device="cuda").bfloat16()
            kc, vc = (torch.randn(b, kv, capacity, d, device="cuda").bfloat16() for _ in range(2))
            kc[:, :, length:] = vc[:, :, length:] = float("nan")
            first = torch.tensor([(length - t) * x // (2 * b) for x in range(b)], dtype=torch.int32, device="cuda")
            for x in range(b):
                kc[x, :, :first[x]] = vc[x, :, :first[x]] = float("nan")
            out = torch.full((b, t, h * d), float("nan"), dtype=torch.bfloat16, device="cuda")
            units = b * kv * ceil_div(t * h // kv, 16)
            partial = torch.full((units * splits * 16 * (d + 2),), float("nan"), device="cuda")
            arrived = torch.zeros(units, dtype=torch.int32, device="cuda")
            outs = []
            for _ in range(2):
                k.decode(out, partial, arrived, q, kc, vc, first, length, window, 1 / math.sqrt(d), splits)
                outs.append(out.clone())
            e = 0.0
            for x in range(b):
                f = first[x].item()
                kk, vv = kc[x, :, f:length].double().transpose(0, 1), vc[x, :, f:length].double().transpose(0, 1)
                i = torch.arange(length - t, length, device="cuda")[:, None]
                j = torch.arange(f, length, device="cuda")[None]
                seen = (j <= i) & ((i - j < window) if window else (j >= 0))
                ro, _ = reference_attention(q[x].double(), kk, vv, seen, 1 / math.sqrt(d))
                e = max(e, error(out[x].view(t, h, d), ro))
            bad = not e <= 1e-2 or not torch.equal(*outs) or arrived.any().item()
            worst = max(worst, e)
            failures += bad
            if bad:
                print(f"decode d{d} b{b} t{t} h{h}/{kv} length {length} window {window} splits {splits}: {e:.1e} FAILED")
    print(f"decode: worst {worst:.1e}")
    return failures


# -------------------------------------------------------------------------------------------------------------- timing

def measure(run, repeats=10, replays=7):
    """Median microseconds of one run(), from replays of a graph of `repeats` runs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    times = []
    for _ in range(replays):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / repeats)
    return statistics.median(times)


class Problem:
    def __init__(self, batch, t, h, kv, d, window=0):
        self.batch, self.t, self.h, self.kv, self.d, self.window = batch, t, h, kv, d, window
        n = self.n = batch * t
        torch.manual_seed(0)
        self.qkv = torch.randn(n, (h + 2 * kv) * d, device="cuda").bfloat16()
        self.qk = self.qkv[:, :(h + kv) * d].contiguous()
        self.do = torch.randn(n, h * d, device="cuda").bfloat16()
        self.o = torch.empty(n, h * d, dtype=torch.bfloat16, device="cuda")
        self.lse, self.delta = torch.empty(h, n, device="cuda"), torch.empty(h, n, device="cuda")
        self.dqkv, self.turned = torch.empty_like(self.qkv), torch.empty_like(self.qk)
        start = torch.arange(n, device="cuda", dtype=torch.int32) // t * t
        self.first, self.last = start, start + t
        self.cos, self.sin = torch.rand(n, d // 2, device="cuda"), torch.rand(n, d // 2, device="cuda")
        self.scale = 1 / math.sqrt(d)
        self.flops = 4 * batch * t * t * h * d / 2
        self.name = f"{batch}x{t} {h}h/{kv}kv d{d}"

    def runs(self, k, ordered=True):
        n, h, kv, w, s = self.n, self.h, self.kv, self.window, self.scale
        shape = (n, h, kv, w, s)
        of, oq, ok = (k.empty_order(n, rows) if ordered else None for rows in (k.forward_rows, k.dq_rows, k.dkv_rows))
        before = (n, h, kv, self.turned, self.qkv, (self.cos, self.sin, None, None), 1e-6)
        rest = (self.delta, self.do, self.o, w, oq, self.first, ok, self.last)
        k.prepare(*before, window=w, q_order=of, first=self.first)
        k.prepare(*before, *rest)
        given = (self.do, self.qk, self.qkv, self.lse, self.delta)
        return dict(
            before=lambda: k.prepare(*before, window=w, q_order=of, first=self.first),
            forward=lambda: k.forward(self.o, self.lse, self.qk, self.qkv, self.first, of, *shape),
            between=lambda: k.prepare(*before, *rest),
            dq=lambda: k.backward_q(self.dqkv, *given, self.first, oq, self.cos, self.sin, *shape),
            dkv=lambda: k.backward_kv(self.dqkv, *given, self.last, ok, self.cos, self.sin, *shape))

    def torch_times(self, backend):
        b, t, h, kv, d = self.batch, self.t, self.h, self.kv, self.d
        q = self.qk[:, :h * d].view(b, t, h, d).transpose(1, 2).contiguous().requires_grad_()
        k, v = (self.qkv[:, (h + i * kv) * d:(h + (i + 1) * kv) * d].view(b, t, kv, d).transpose(1, 2)
                .repeat_interleave(h // kv, 1).contiguous().requires_grad_() for i in range(2))
        do = self.do.view(b, t, h, d).transpose(1, 2).contiguous()
        with sdpa_kernel([backend]):
            def forward():
                with torch.no_grad():
                    F.scaled_dot_product_attention(q, k, v, is_causal=True)
            f = measure(forward)
            out = None
            def both():
                o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                torch.autograd.grad(o, (q, k, v), do)
            return f, measure(both) - f


SHAPES = [(4, 1024, 32, 8, 64), (1, 1024, 32, 8, 64), (1, 8192, 32, 8, 64), (4, 1024, 32, 8, 128),
          (1, 8192, 32, 8, 128), (4, 1024, 9, 3, 64)]


def compare(kernels):
    print(f"{'us (TFLOP/s)':24s} {'before':>7s} {'forward':>14s} {'between':>7s} {'dq':>14s} {'dkv':>14s} {'backward':>14s} "
          f"{'rot.bwd':>7s} | flash fwd, bwd | cudnn fwd, bwd")
    for shape in SHAPES:
        p = Problem(*shape)
        k = kernels[p.d]
        runs = p.runs(k)
        us = {x: measure(run) for x, run in runs.items()}
        natural = {x: measure(run) for x, run in p.runs(k, ordered=False).items() if x not in ("before", "between")}
        us["back"] = measure(lambda: k.rotate_backward(p.dqkv, p.qkv, p.n, p.h, p.kv, p.cos, p.sin, None, None, 1e-6))

        def show(t, times=1.0):
            return f"{t:7.1f} ({p.flops * times / t / 1e6:4.0f})"
        backward = us["between"] + us["dq"] + us["dkv"]
        theirs = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                f, b = p.torch_times(backend)
                theirs.append(f"{show(f)} {show(b, 2.5)}")
            except Exception as e:
                theirs.append(type(e).__name__)
        print(f"{p.name:24s} {us['before']:7.1f} {show(us['forward'])} {us['between']:7.1f} {show(us['dq'], 1.5)} "
              f"{show(us['dkv'], 2.0)} {show(backward, 2.5)} {us['back']:7.1f} | " + " | ".join(theirs))
        print(f"{'  natural order':24s} {'':7s} {show(natural['forward'])} {'':7s} {show(natural['dq'], 1.5)} "
              f"{show(natural['dkv'], 2.0)}", flush=True)


def time_decode(kernels):
    for d, h, kv, b, length in ((64, 32, 8, 1, 1024), (64, 32, 8, 1, 4096), (64, 32, 8, 1, 16384), (128, 32, 8, 1, 4096),
                                (64, 32, 8, 8, 4096), (64, 9, 3, 1, 4096)):
        k, layers = kernels[d], 16
        caches = [[torch.randn(b, kv, length, d, device="cuda").bfloat16() for _ in range(2)] for _ in range(layers)]
        q = torch.randn(b, 1, h, d, device="cuda").bfloat16()
        out = torch.empty(b, 1, h * d, dtype=torch.bfloat16, device="cuda")
        first = torch.zeros(b, dtype=torch.int32, device="cuda")
        cells = []
        for splits in (8, 16, 32, 64):
            if length // splits < 32:
                continue
            partial = torch.empty(b * kv * splits * 16 * (d + 2), device="cuda")
            arrived = torch.zeros(b * kv, dtype=torch.int32, device="cuda")
            def run():
                for kc, vc in caches:
                    k.decode(out, partial, arrived, q, kc, vc, first, length, 0, 1 / math.sqrt(d), splits)
            us = measure(run, repeats=2) / layers
            cells.append(f"{splits} splits {us:6.2f} us {b * kv * length * d * 4 / us / 1e3:5.0f} GB/s")
        print(f"decode b{b} {h}h/{kv}kv d{d} keys {length}: " + " | ".join(cells), flush=True)


# Alternatives to the wgmma kernels' tiles.
TUNE = {
    "forward": ("FORWARD_GROUPS FORWARD_BLOCKS Q_IN_REGISTERS", {
        64: ["1 4 1", "2 2 1", "1 3 1", "1 4 0"], 128: ["1 2 1", "3 1 0"]}),
    "dq": ("DQ_GROUPS DQ_BLOCKS", {64: ["1 3", "2 1"], 128: ["2 1", "1 1"]}),
    "dkv": ("DKV_GROUPS DKV_BLOCKS", {64: ["1 2", "2 1"], 128: ["2 1"]}),
}


def tune():
    todo, labels = [], []
    for kernel, (names, by_d) in TUNE.items():
        for d, rows in by_d.items():
            for row in rows:
                todo.append((d, dict(zip(names.split(), map(int, row.split())))))
                labels.append((kernel, d, row))
    built = build(todo)
    problems = {}
    for d in (64, 128):
        default = build([(d, {})])[0]
        for shape in ((4, 1024, 32, 8, d), (1, 8192, 32, 8, d)):
            p = Problem(*shape)
            for run in p.runs(default).values():
                run()
            problems[shape] = p, (p.dqkv.clone(), p.o.clone())
    multiple = {"forward": 1.0, "dq": 1.5, "dkv": 2.0}
    for (kernel, d, row), k in zip(labels, built):
        cells = []
        for shape in ((4, 1024, 32, 8, d), (1, 8192, 32, 8, d)):
            p, reference = problems[shape]
            try:
                p.runs(k)[kernel]()
                where = p.o if kernel == "forward" else p.dqkv
                e = error(where, reference[kernel == "forward"])
                if not e < 1e-2:
                    cells.append(f"WRONG {e:.1e}")
                us = measure(p.runs(k)[kernel], repeats=5, replays=5)
                cells.append(f"{us:8.1f} us {p.flops * multiple[kernel] / us / 1e6:4.0f}")
            except Exception as e:
                cells.append(f"{type(e).__name__} {e}"[:60])
        print(f"tune {kernel:8s} d{d:<4d} {row:16s} " + " | ".join(cells), flush=True)


def main():
    global SOURCE, ARCHITECTURE
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default=os.path.join(here, "../peft-core/src/kernels/cuda/attention.cu"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--define", nargs="*", default=[], help="NAME=VALUE: another value for a constant of the source")
    parser.add_argument("--dims", nargs="*", type=int, help="head_dims to check")
    parser.add_argument("--architecture", help="sm_90a on Hopper (wgmma), else the card's own")
    a = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    ARCHITECTURE = a.architecture or f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    SOURCE = open(a.source).read()
    print(torch.cuda.get_device_name(), ARCHITECTURE, "torch", torch.__version__)
    dims = a.dims or ([32, 64, 80, 96, 128, 256] if a.check else [64, 128])
    tiles = dict(x.split("=") for x in a.define)
    kernels = dict(zip(dims, build([(d, tiles) for d in dims])))
    failures = 0
    if a.check:
        failures = check(kernels) + check_decode(kernels)
        print("FAILED" if failures else "all checks passed", flush=True)
    if a.time:
        compare(kernels)
        time_decode(kernels)
    if a.tune:
        tune()
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
