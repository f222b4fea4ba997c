"""The PTX of the kernels' inline assembly, run by numpy in Triton's interpreter: `with ptx.emulated(): ...`

An instruction is done for all threads at once, one element of the tensors each; a warp is 32 neighbours. What is not in
`Machine` raises. Fragments of mma: PTX ISA 9.7.14, "Matrix Fragments for mma.m16n8k16" and "m16n8k8".
"""

import ctypes
import re
from contextlib import contextmanager
from functools import cache
from unittest import mock

import numpy as np


def run(asm: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """uint32 [T] for each output; the inputs are uint32 or uint64 [T]."""
    machine = Machine([np.zeros(len(inputs[0]), np.uint32) for _ in range(outputs)] + [a.copy() for a in inputs])
    for statement in program(asm):
        machine.step(*statement)
    return machine.operands[:outputs]


@cache
def program(asm: str) -> list[tuple[str, list[str]]]:
    """(operation, its operands) of each statement of `asm`, read once."""
    read = []
    for text in statements(asm):
        name, _, rest = text.rstrip(";").partition(" ")
        read.append((name, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)))
    return read


def statements(asm: str):
    """Instructions and declarations with their ";", and the braces of scopes; braces within one are operands."""
    found, within = "", False
    for letter in asm:
        if letter in "{}" and not found.strip():
            yield letter
            continue
        found += letter
        within = letter == "{" or (within and letter != "}")
        if letter == ";" and not within:
            yield found.strip()
            found = ""
    assert not found.strip()


class Machine:
    def __init__(self, operands):
        self.operands, self.scopes = operands, [{}]
        self.threads = len(operands[-1])

    def step(self, name: str, arguments: list[str]) -> None:
        if name == "{":
            self.scopes.append({})
        elif name == "}":
            self.scopes.pop()
        elif name == ".reg":
            for register in arguments[1:]:  # the first is their type
                stem, _, count = register.rstrip(">").partition("<")
                for full in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                    self.scopes[-1][full] = np.zeros(self.threads, np.uint32)
        else:
            getattr(self, name.split(".")[0])(name, arguments)

    def get(self, name: str) -> np.ndarray:
        if name.startswith("$"):
            return self.operands[int(name[1:])]
        if name.startswith("0f"):
            return np.full(self.threads, int(name[2:], 16), np.uint32)
        if name[0].isdigit():
            return np.full(self.threads, int(name, 0), np.uint32)
        return next(scope[name] for scope in reversed(self.scopes) if name in scope)

    def set(self, name: str, value: np.ndarray) -> None:
        if name.startswith("$"):
            self.operands[int(name[1:])] = value.astype(np.uint32)
        else:
            next(scope for scope in reversed(self.scopes) if name in scope)[name] = value.astype(np.uint32)

    def names(self, braces: str) -> list[str]:
        return [name.strip() for name in braces.strip("{}").split(",")]

    # ---- instructions ----

    def mov(self, name, a):
        if a[0].startswith("{"):
            for i, half in enumerate(self.names(a[0])):
                self.set(half, self.get(a[1]) >> np.uint32(16 * i) & np.uint32(0xFFFF))
        elif a[1].startswith("{"):
            low, high = map(self.get, self.names(a[1]))
            self.set(a[0], low | high << np.uint32(16))
        else:
            self.set(a[0], self.get(a[1]))

    def ld(self, name, a):
        assert name == "ld.global.v4.b32"
        base, _, offset = a[1].strip("[]").replace(" ", "").partition("+")
        values = np.empty((self.threads, 4), np.uint32)
        for thread, address in enumerate(self.get(base).tolist()):
            address += int(offset or 0)
            assert address % 16 == 0, "a load of 16 bytes wants a multiple of 16"
            values[thread] = np.frombuffer((ctypes.c_char * 16).from_address(address), np.uint32)
        for register, value in zip(self.names(a[0]), values.T, strict=True):
            self.set(register, value)

    def shfl(self, name, a):
        assert name == "shfl.sync.bfly.b32" and a[3:] == ["31", "0xffffffff"]
        self.set(a[0], self.get(a[1])[np.arange(self.threads) ^ int(a[2])])

    def shr(self, name, a):
        self.set(a[0], self.get(a[1]) >> self.get(a[2]))

    def lop3(self, name, a):
        both, third, table = self.get(a[1]) & self.get(a[2]), self.get(a[3]), int(a[4], 16)
        assert table in (0xEA, 0x6A)
        self.set(a[0], both | third if table == 0xEA else both ^ third)

    def prmt(self, name, a):
        eight = np.stack([self.get(a[1]), self.get(a[2])], axis=1).astype("<u4").view(np.uint8)
        nibbles = self.get(a[3])[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        assert (nibbles < 8).all(), "the fourth bit asks for the sign"
        self.set(a[0], np.take_along_axis(eight, nibbles, axis=1).view("<u4")[:, 0])

    def mul(self, name, a):
        assert name == "mul.rn.f32"
        self.set(a[0], (self.get(a[1]).view(np.float32) * self.get(a[2]).view(np.float32)).view(np.uint32))

    def fma(self, name, a):
        assert name == "fma.rn.bf16x2"
        self._by_halves(a[0], "bf16", lambda x, y, z: x * y + z, *a[1:])

    def sub(self, name, a):
        assert name == "sub.rn.f16x2"
        self._by_halves(a[0], "f16", lambda x, y: x - y, *a[1:])

    def _by_halves(self, to, kind, function, *names):
        low, high = (
            _to_16_bits(function(*(_to_float(self.get(n), i, kind) for n in names)).view(np.uint32), kind)
            for i in range(2)
        )
        self.set(to, low | high << np.uint32(16))

    def cvt(self, name, a):
        halves = [_to_16_bits(self.get(register), name) for register in a[1:]]
        self.set(a[0], halves[0] if len(halves) == 1 else halves[1] | halves[0] << np.uint32(16))

    def mma(self, name, a):
        wide = "m16n8k16" in name
        to, a_, b_, c_ = map(self.names, a)
        assert (len(a_), len(b_)) == ((4, 2) if wide else (2, 1))
        g, t = np.arange(32) // 4, np.arange(32) % 4
        warps = self.threads // 32
        left, right = np.zeros((warps, 16, 16), np.float32), np.zeros((warps, 16, 8), np.float32)
        for i, register in enumerate(a_):
            for j in range(2):
                left[:, g + i % 2 * 8, 2 * t + j + i // 2 * 8] = _to_float(self.get(register), j, name).reshape(-1, 32)
        for i, register in enumerate(b_):
            for j in range(2):
                right[:, 2 * t + j + i * 8, g] = _to_float(self.get(register), j, name).reshape(-1, 32)
        product = left @ right
        for i, (register, before) in enumerate(zip(to, c_, strict=True)):
            added = product[:, g + i // 2 * 8, 2 * t + i % 2].reshape(-1)
            self.set(register, (self.get(before).view(np.float32) + added).view(np.uint32))

    def __getattr__(self, name):
        if name == "and":  # a word of Python's own
            return lambda _, a: self.set(a[0], self.get(a[1]) & self.get(a[2]))
        raise AttributeError(f"no such instruction here: {name}")


def _to_16_bits(register: np.ndarray, name: str) -> np.ndarray:
    if "bf16" in name:  # to the nearest, ties to even
        return register + np.uint32(0x7FFF) + (register >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return register.view(np.float32).astype(np.float16).view(np.uint16).astype(np.uint32)


def _to_float(register: np.ndarray, half: int, name: str) -> np.ndarray:
    bits = register >> np.uint32(16 * half) & np.uint32(0xFFFF)
    if "bf16" in name:
        return (bits << np.uint32(16)).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


@contextmanager
def emulated():
    """tl.inline_asm_elementwise works in the interpreter, for pack=1, and for pack=2 with 16 bits everywhere."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create(self, asm, constraints, values, types, is_pure, pack):
        assert len(constraints.split(",")) == len(values) + len(types)
        sizes = {v.data.itemsize for v in values} | {t.scalar.primitive_bitwidth // 8 for t in types}
        assert pack == 1 or (pack == 2 and sizes == {2})
        shape = np.broadcast_shapes(*(value.data.shape for value in values))
        inputs = []
        for value in values:
            flat = np.ascontiguousarray(np.broadcast_to(value.data, shape)).reshape(-1)
            inputs.append(flat.view(np.uint64 if flat.itemsize == 8 else np.uint32))
        outs = []
        for out, type_ in zip(run(asm, inputs, len(types)), types, strict=True):
            bits = type_.scalar.primitive_bitwidth
            if pack == 2:
                data = out.view(np.float16 if type_.scalar.is_fp16() else np.uint16)
            elif type_.scalar.is_floating():
                data = out.view(np.float32)
            else:
                data = out.astype(f"uint{bits}").view(f"int{bits}")
            outs.append(TensorHandle(data.reshape(shape), type_.scalar))

        class Call:
            def get_result(self, i):
                return outs[i]

        return Call()

    with mock.patch.object(InterpreterBuilder, "create_inline_asm", create):
        yield
