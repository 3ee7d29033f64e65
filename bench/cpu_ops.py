"""Times in PyTorch of the operations that `cargo bench --bench kernels_cpu` times.

Usage: python bench/cpu_ops.py [threads]; with one thread times are CPU times, as in the bench.
"""

import sys
import time

import torch
import torch.nn.functional as F

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
torch.set_num_threads(THREADS)
torch.manual_seed(0)
TOKENS, SEQUENCE, RANK = 1024, 256, 8
MODELS = {
    "25M": dict(hidden=512, intermediate=1408, heads=8, kv_heads=4, head_dim=64, vocab=32000),
    "135M": dict(hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152),
}


def best(f):
    clock = time.process_time if THREADS == 1 else time.perf_counter
    f()
    until = time.perf_counter() + 1
    times = []
    while len(times) < 5 or time.perf_counter() < until:
        start = clock()
        f()
        times.append(clock() - start)
    return min(times)


def show(name, seconds, flops=None):
    rate = f"{flops / seconds / 1e9:8.1f} GFLOP/s" if flops else ""
    print(f"{name:<34} {seconds * 1e3:9.3f} ms {rate}", flush=True)


def both(name, forward, inputs):
    """Times `forward` with a graph recorded, then the backward pass alone."""
    show(f"{name} forward", best(forward))
    y = forward()
    dy = torch.randn_like(y)
    show(f"{name} backward", best(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)))


def lora(x, w, a, b):
    """One linear map as PEFT computes it: base, then the term, each an operation of its own."""
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0


def rms_norm(x, w):
    """As in LlamaRMSNorm."""
    variance = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-5))


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def run(name, hidden, intermediate, heads, kv_heads, head_dim, vocab):
    print(f"\n{name}")
    with torch.no_grad():
        for what, m, n, k in [
            ("product x·Wᵀ q", TOKENS, hidden, hidden),
            ("product x·Wᵀ gate+up", TOKENS, 2 * intermediate, hidden),
            ("product x·Wᵀ down", TOKENS, hidden, intermediate),
            ("product x·Wᵀ head", 256, vocab, hidden),
            ("product x·Wᵀ one row", 1, vocab, hidden),
            ("product x·Wᵀ eight rows", 8, vocab, hidden),
        ]:
            x, w, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
            show(what, best(lambda: torch.mm(x, w.t(), out=out)), 2 * m * n * k)

    q, kv = heads * head_dim, kv_heads * head_dim
    for what, inputs, outs in [
        ("q,k,v", hidden, [q, kv, kv]),
        ("o", q, [hidden]),
        ("gate,up", hidden, [intermediate, intermediate]),
        ("down", intermediate, [hidden]),
    ]:
        x = torch.randn(TOKENS, inputs, requires_grad=True)
        maps = [
            (
                torch.randn(out, inputs),
                torch.randn(RANK, inputs, requires_grad=True),
                torch.randn(out, RANK, requires_grad=True),
            )
            for out in outs
        ]
        factors = [factor for _, a, b in maps for factor in (a, b)]
        show(f"linear {what} forward", best(lambda: [lora(x, *m) for m in maps]))
        ys = [lora(x, *m) for m in maps]
        dys = [torch.randn_like(y) for y in ys]
        backward = lambda: torch.autograd.grad(ys, [x, *factors], dys, retain_graph=True)
        show(f"linear {what} backward", best(backward))

    batch = TOKENS // SEQUENCE
    angles = torch.randn(SEQUENCE, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(batch, SEQUENCE, q + 2 * kv, requires_grad=True)

    def attention():
        parts = qkv.split((q, kv, kv), -1)
        qs, ks, vs = (p.view(batch, SEQUENCE, -1, head_dim).transpose(1, 2) for p in parts)
        qs, ks = rotate(qs, cos, sin), rotate(ks, cos, sin)
        group = heads // kv_heads
        ks, vs = (
            t[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, heads, SEQUENCE, head_dim) for t in (ks, vs)
        )
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True)
        return out.transpose(1, 2).contiguous().view(batch, SEQUENCE, q)

    both("attention", attention, [qkv])

    x = torch.randn(TOKENS, hidden, requires_grad=True)
    weight = torch.randn(hidden)
    both("rms norm", lambda: rms_norm(x, weight), [x])
    gate = torch.randn(TOKENS, intermediate, requires_grad=True)
    up = torch.randn(TOKENS, intermediate, requires_grad=True)
    both("gate", lambda: F.silu(gate) * up, [gate, up])

    logits = torch.randn(64, vocab, requires_grad=True)
    targets = torch.randint(vocab, (TOKENS,))

    def loss_of_logits():
        torch.autograd.grad(F.cross_entropy(logits, targets[:64], reduction="sum"), [logits])

    show("cross-entropy of 64 rows", best(loss_of_logits))
    head = torch.randn(vocab, hidden) * 0.1

    def head_and_loss():
        torch.autograd.grad(F.cross_entropy(F.linear(x, head), targets, reduction="sum"), [x])

    show("head and loss, both ways", best(head_and_loss), 4 * TOKENS * hidden * vocab)

    size = RANK * (hidden + intermediate)
    parameters = [torch.randn(size, requires_grad=True) for _ in range(56)]
    for parameter in parameters:
        parameter.grad = torch.randn(size)
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, weight_decay=0.0)
    show(f"adamw of {56 * size}", best(optimizer.step))
    show("sum of squares", best(lambda: torch.nn.utils.get_total_norm([p.grad for p in parameters])))


print(f"{THREADS} threads, PyTorch {torch.__version__}")
for name, shape in MODELS.items():
    run(name, **shape)
