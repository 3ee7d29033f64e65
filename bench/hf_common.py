"""What the peers' benchmarks share: a randomly initialised model of a shape, clocks and memory."""

import resource

import torch
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def add_model_arguments(parser):
    parser.add_argument("--shape", choices=SHAPES, default="25m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the base; f32 on the cpu, else bf16")
    parser.add_argument("--threads", type=int, default=2, help="of the cpu")


def random_model(args, context):
    """The shape's Llama with the library's initial values, made on the device in its type."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.dtype = args.dtype or ("f32" if args.device == "cpu" else "bf16")
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=max(2048, context))
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[args.dtype])
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    return model


def finish(device):
    """Waits until all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def peak_memory(device):
    """On CUDA, PyTorch's peak of allocated bytes, and what the driver counts as used on the card at this moment
    (caches of the allocator and the context included). On the CPU, the process's largest resident set."""
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "device_used_bytes": total - free,
        }
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
