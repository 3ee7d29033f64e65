"""Times in PyTorch of the operations that `cargo bench --bench kernels` times, at the same shapes.

    python torch_ops.py --shape 25m --batch 4 --seq 256 --rank 8
    python torch_ops.py --shape 1b --batch 4 --seq 1024 --rank 16 --device cuda attention

Names choose among attention, head_loss and adapted_linear. Each is what transformers and PEFT run, an operation after
another: base product, then the two of the term; rotation and scaled_dot_product_attention; head, cast and cross-entropy.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from hf_common import DTYPES, device_name, finish
from shapes import SHAPES


def seconds_of(call, device, rounds=7):
    call()
    finish(device)
    start = time.perf_counter()
    call()
    finish(device)
    calls = int(min(50, max(1, 0.05 / (time.perf_counter() - start))))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        finish(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def show(name, seconds):
    print(f"{name:<34} {seconds * 1e3:9.3f} ms", flush=True)


def both(name, forward, inputs, device):
    """Times `forward` with a graph recorded, then the backward alone."""
    show(f"{name} forward", seconds_of(forward, device))
    y = forward()
    dy = torch.randn_like(y)
    show(f"{name} backward", seconds_of(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), device))


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("operations", nargs="*", help="of these names, all without any")
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or ("f32" if args.device == "cpu" else "bf16")]
    device = args.device
    shape = SHAPES[args.shape]
    hidden, intermediate, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    heads, kv_heads, head_dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    tokens = args.batch * args.seq
    print(f"{device_name(device)}, PyTorch {torch.__version__}, {dtype}")

    def numbers(*size, dtype=dtype, grad=False):
        return (torch.randn(*size, device=device) * 0.05).to(dtype).requires_grad_(grad)

    def runs(operation):
        return not args.operations or operation in args.operations

    q, kv = heads * head_dim, kv_heads * head_dim
    if runs("adapted_linear"):
        for what, inputs, outs in [
            ("q,k,v", hidden, [q, kv, kv]),
            ("o", q, [hidden]),
            ("gate,up", hidden, [intermediate, intermediate]),
            ("down", intermediate, [hidden]),
        ]:
            x = numbers(1, tokens, inputs, grad=True)
            maps = [
                (
                    numbers(out, inputs),
                    numbers(args.rank, inputs, dtype=torch.float32, grad=True),
                    numbers(out, args.rank, dtype=torch.float32, grad=True),
                )
                for out in outs
            ]
            factors = [factor for _, a, b in maps for factor in (a, b)]

            def forward():
                # As PEFT does it: the term in the factors' type, the sum back in that of the base.
                return torch.cat(
                    [(F.linear(x, w) + F.linear(F.linear(x.to(a.dtype), a), b) * 2.0).to(dtype) for w, a, b in maps], -1
                )

            both(f"adapted_linear {what}", forward, [x, *factors], device)

    if runs("attention"):
        angles = torch.randn(args.seq, head_dim // 2, device=device).repeat(1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        qkv = numbers(args.batch, args.seq, q + 2 * kv, grad=True)

        def attention():
            parts = qkv.split((q, kv, kv), -1)
            qs, ks, vs = (p.view(args.batch, args.seq, -1, head_dim).transpose(1, 2) for p in parts)
            qs, ks = rotate(qs, cos, sin), rotate(ks, cos, sin)
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).contiguous().view(args.batch, args.seq, q)

        both("attention", attention, [qkv], device)

    if runs("head_loss"):
        x, head = numbers(tokens, hidden, grad=True), numbers(vocab, hidden)
        targets = torch.randint(vocab, (tokens,), device=device)

        def head_and_loss():
            loss = F.cross_entropy(F.linear(x, head).float(), targets, reduction="sum")
            torch.autograd.grad(loss, [x])

        show("head_loss, both ways", seconds_of(head_and_loss, device))


if __name__ == "__main__":
    main()
