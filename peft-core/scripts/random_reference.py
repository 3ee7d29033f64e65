"""The toolkit's random streams, written a second time in plain Python.

The literal values in the tests of `random.rs` come from here: `python3 random_reference.py`.
Nothing but the standard library is used, so any Python 3 reproduces them.
"""

import hashlib
import math
import struct

MASK = 0xFFFFFFFF


def key(seed, purpose, name, counters):
    """SHA-256 over a tag, then every part preceded by its length where the length can vary."""
    text = b"peft random stream 1"
    text += struct.pack("<Q", seed)
    for part in (purpose.encode(), name.encode()):
        text += struct.pack("<Q", len(part)) + part
    text += struct.pack("<Q", len(counters))
    for counter in counters:
        text += struct.pack("<Q", counter)
    return hashlib.sha256(text).digest()


def quarter_round(x, a, b, c, d):
    def rotate(v, n):
        return ((v << n) | (v >> (32 - n))) & MASK

    x[a] = (x[a] + x[b]) & MASK
    x[d] = rotate(x[d] ^ x[a], 16)
    x[c] = (x[c] + x[d]) & MASK
    x[b] = rotate(x[b] ^ x[c], 12)
    x[a] = (x[a] + x[b]) & MASK
    x[d] = rotate(x[d] ^ x[a], 8)
    x[c] = (x[c] + x[d]) & MASK
    x[b] = rotate(x[b] ^ x[c], 7)


def block(key_bytes, counter, rounds=8):
    """One 64-byte ChaCha block: 64-bit block counter, 64-bit nonce of zero."""
    state = list(struct.unpack("<4I", b"expand 32-byte k"))
    state += struct.unpack("<8I", key_bytes)
    state += [counter & MASK, counter >> 32, 0, 0]
    x = state[:]
    for _ in range(rounds // 2):
        quarter_round(x, 0, 4, 8, 12)
        quarter_round(x, 1, 5, 9, 13)
        quarter_round(x, 2, 6, 10, 14)
        quarter_round(x, 3, 7, 11, 15)
        quarter_round(x, 0, 5, 10, 15)
        quarter_round(x, 1, 6, 11, 12)
        quarter_round(x, 2, 7, 8, 13)
        quarter_round(x, 3, 4, 9, 14)
    return [(a + b) & MASK for a, b in zip(x, state)]


def ln(x):
    """Natural logarithm of a positive normal number by +, -, *, / alone, so that every machine agrees."""
    mantissa, exponent = math.frexp(x)  # in [0.5, 1)
    if mantissa < 0.7071067811865476:
        mantissa, exponent = mantissa * 2.0, exponent - 1
    z = (mantissa - 1.0) / (mantissa + 1.0)
    square = z * z
    total = 0.0
    for odd in range(23, 0, -2):
        total = total * square + 1.0 / odd
    return exponent * 0.6931471805599453 + 2.0 * z * total


class Stream:
    def __init__(self, seed, purpose, name="", counters=()):
        self.key = key(seed, purpose, name, list(counters))
        self.words = []
        self.counter = 0
        self.spare = None

    def next_u64(self):
        if not self.words:
            self.words = block(self.key, self.counter)
            self.counter += 1
        low, high = self.words.pop(0), self.words.pop(0)
        return low | (high << 32)

    def uniform(self):
        return (self.next_u64() >> 11) * 2.0**-53

    def uniform_f32(self):
        return (self.next_u64() >> 40) * 2.0**-24

    def normal(self):
        if self.spare is not None:
            value, self.spare = self.spare, None
            return value
        while True:
            u = 2.0 * self.uniform() - 1.0
            v = 2.0 * self.uniform() - 1.0
            s = u * u + v * v
            if 0.0 < s < 1.0:
                scale = math.sqrt(-2.0 * ln(s) / s)
                self.spare = v * scale
                return u * scale

    def below(self, n):
        threshold = (2**64 - n) % n
        while True:
            product = self.next_u64() * n
            if product & (2**64 - 1) >= threshold:
                return product >> 64

    def shuffle(self, items):
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]


if __name__ == "__main__":
    # The published ChaCha8 key stream for an all-zero key and nonce begins 3e00ef2f895f40d6.
    assert struct.pack("<2I", *block(bytes(32), 0)[:2]).hex() == "3e00ef2f895f40d6"
    for x in (1e-300, 1e-9, 0.3, 0.7071067811865475, 0.7071067811865476, 0.9999999, 1.0, 7.5):
        assert abs(ln(x) - math.log(x)) <= 4e-16 * max(1e-9, abs(math.log(x))) + 1e-22, (x, ln(x), math.log(x))
    print("key", key(42, "adapter", "layers.0.q", [3, 7]).hex())
    stream = Stream(42, "adapter", "layers.0.q", [3, 7])
    print("u64", [hex(stream.next_u64()) for _ in range(3)])
    stream = Stream(42, "adapter", "layers.0.q", [3, 7])
    print("u64[40]", hex([stream.next_u64() for _ in range(41)][40]))
    stream = Stream(0, "", "", [])
    print("empty", hex(stream.next_u64()))
    stream = Stream(1, "uniform")
    print("uniform", [stream.uniform() for _ in range(3)], [stream.uniform_f32() for _ in range(2)])
    stream = Stream(1, "normal")
    print("normal", [stream.normal() for _ in range(5)])
    print("normal bits", [hex(struct.unpack("<Q", struct.pack("<d", stream.normal()))[0]) for _ in range(3)])
    stream = Stream(1, "below")
    print("below", [stream.below(10) for _ in range(8)], stream.below(2**63 + 1), stream.below(2**63 + 1))
    stream = Stream(1, "shuffle")
    items = list(range(10))
    stream.shuffle(items)
    print("shuffle", items)
