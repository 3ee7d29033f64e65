"""Expected values of the tests in `src/linalg`, computed by NumPy: `python linalg_reference.py`."""

import numpy as np
from random_reference import Stream

MATRIX = np.array([[1, 1, 3, 0], [-1, 0, -2, 1], [1, -2, 1, 2]], dtype=float)


def fix_signs(u, vt):
    """The entry of each right vector that is largest in magnitude becomes positive."""
    signs = np.sign(vt[range(len(vt)), np.abs(vt).argmax(axis=1)])
    return u * signs, vt * signs[:, None]


def show(name, array):
    print(name, np.asarray(array).reshape(-1).tolist())


def randomized_svd(a, q, iterations, stream):
    """torch.svd_lowrank of a tall matrix, with the toolkit's random numbers."""
    random = np.array([stream.normal() for _ in range(a.shape[1] * q)]).reshape(a.shape[1], q)
    basis = np.linalg.qr(a @ random).Q
    for _ in range(iterations):
        basis = np.linalg.qr(a.T @ basis).Q
        basis = np.linalg.qr(a @ basis).Q
    u, s, vt = np.linalg.svd(basis.T @ a, full_matrices=False)
    return basis @ u, s, vt


if __name__ == "__main__":
    q, r = np.linalg.qr(MATRIX)
    show("Q", q)
    show("R", r)
    u, s, vt = np.linalg.svd(MATRIX, full_matrices=False)
    u, vt = fix_signs(u, vt)
    show("NUMPY_U", u)
    show("NUMPY_S", s)
    show("NUMPY_V", vt.T)
    a = np.array([[(7 * i + 3 * j) % 11 - 5 for j in range(4)] for i in range(5)], dtype=float)
    u, s, vt = randomized_svd(a, 2, 1, Stream(1, "sketch"))
    u, vt = fix_signs(u, vt)
    show("RANDOMIZED_S", s)
    show("RANDOMIZED_U", u)
    show("RANDOMIZED_V", vt.T)
