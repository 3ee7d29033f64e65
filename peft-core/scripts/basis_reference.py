"""The toolkit's random bases, written a second time with numpy.

The literal values in the tests of `kernels/basis.rs` come from here: `python3 basis_reference.py`.
"""

import numpy as np
from random_reference import Stream

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox(key, counters):
    """Philox4x32-10: counters [n, 4] under a key of two words give words [n, 4]."""
    words = [np.asarray(column, dtype=np.uint64) for column in np.asarray(counters).T]
    low, high = (np.uint64(part) for part in key)
    for _ in range(10):
        product_0 = np.uint64(0xD2511F53) * words[0]
        product_1 = np.uint64(0xCD9E8D57) * words[2]
        words = [
            (product_1 >> SHIFT) ^ words[1] ^ low, product_1 & MASK,
            (product_0 >> SHIFT) ^ words[3] ^ high, product_0 & MASK,
        ]  # fmt: skip
        low = (low + np.uint64(0x9E3779B9)) & MASK
        high = (high + np.uint64(0xBB67AE85)) & MASK
    return np.stack(words, axis=1)


class Basis:
    def __init__(self, seed, purpose, name, length):
        word = Stream(seed, purpose, name).next_u64()
        self.key, self.length = (word & 0xFFFFFFFF, word >> 32), length

    def element(self, index):
        """The values of one element, f32 [length]."""
        groups = -(-self.length // 128)
        block = np.arange(16 * groups, dtype=np.uint64)
        counters = np.stack([block & MASK, block >> SHIFT, np.full_like(block, index), np.zeros_like(block)], axis=1)
        words = philox(self.key, counters).reshape(groups, 16, 4).transpose(0, 2, 1)
        halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=2)
        signed = halves.astype(np.uint16).view(np.int16).reshape(-1)[: self.length]
        return ((signed.astype(np.float64) + 0.5) / 32768).astype(np.float32)

    def elements(self, count):
        """f32 [count, length]."""
        return np.stack([self.element(index) for index in range(count)])


if __name__ == "__main__":
    published = {
        ((0, 0), (0, 0, 0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)): (
            0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
        ),
    }  # fmt: skip
    for (key, counter), expected in published.items():
        assert tuple(int(word) for word in philox(key, [counter])[0]) == expected
    basis = Basis(11, "basis", "layers.0.q", 3000)
    print("key", [hex(part) for part in basis.key])
    for index, position in [(0, 0), (0, 15), (0, 16), (0, 127), (0, 128), (3, 0), (3, 2999)]:
        print(index, position, repr(float(basis.element(index)[position])))
