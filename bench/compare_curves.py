"""How far loss curves are apart.

    python compare_curves.py OURS.jsonl SAME_START.jsonl OTHER_SEED.jsonl [OTHER_SEED.jsonl …]

Ours against PyTorch's from the same start, and, as the measure of noise, PyTorch's runs from different starts against one
another: mean and largest difference of the single steps and of means over ten steps. Lines without a `loss` are skipped.
"""

import itertools
import json
import sys


def losses(path):
    lines = [json.loads(line) for line in open(path, encoding="utf-8") if line.strip()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def apart(a, b):
    steps = sorted(a.keys() & b.keys())
    single = [abs(a[step] - b[step]) for step in steps]
    windows = [steps[i : i + 10] for i in range(0, len(steps) - 9, 10)]
    means = [abs(sum(a[s] - b[s] for s in window) / len(window)) for window in windows]
    return steps, [sum(single) / len(single), max(single), sum(means) / len(means), max(means)]


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    ours, *theirs = [losses(path) for path in sys.argv[1:]]
    print(f"{'':34} {'steps':>5} {'mean':>9} {'largest':>9} {'mean/10':>9} {'largest/10':>10}")

    def show(name, a, b):
        steps, figures = apart(a, b)
        print(f"{name:34} {len(steps):5} " + " ".join(f"{figure:9.5f}" for figure in figures))
        return figures

    found = show("ours, PyTorch from the same start", ours, theirs[0])
    noise = [
        show(f"PyTorch {i}, PyTorch {j}", theirs[i], theirs[j])
        for i, j in itertools.combinations(range(len(theirs)), 2)
    ]
    least = [min(figures) for figures in zip(*noise)]
    print("within the noise" if all(f <= n for f, n in zip(found, least)) else "NOT within the noise")


if __name__ == "__main__":
    main()
