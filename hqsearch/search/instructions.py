"""Instructions that numba's loops do not become, each a few lines of LLVM's own language.

Comparisons of many values at once give the bits of one integer; LLVM cuts them to the processor's width.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

__all__ = [
    "AHEAD",
    "LEAF_KERNEL",
    "array_at",
    "bits_at_most",
    "bits_below",
    "count_bits",
    "lowest_bit",
    "prefetch",
    "sum_squares_16",
    "sum_squares_32",
    "sum_squares_64",
    "take_minima",
]

# Options of kernels that make no arrays and return none: with reference counts, each call would count all
# its arrays up and down again, 10 ns an array. They call each other only: what they call inherits this.
# `_nrt` is numba's own name for them; its manual does not speak of it.
LEAF_KERNEL: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}

# Rows that are worked on while the memory of one is on its way.
AHEAD = 8

# For mypy a decorated function would still take the typing context.
intrinsic: Any = _intrinsic


def _address(context, builder, kind, array, index, vector):
    """Point at the vector that begins at ``array[index]``; `kind` is the array's numba type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _splat(builder, value, vector):
    """Make a vector whose lanes all hold `value`."""
    nothing, lanes = ir.Constant(vector, ir.Undefined), ir.VectorType(ir.IntType(32), vector.count)
    one = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(lanes, None))


def _compare(context, builder, signature, args, n_lanes, operator):
    """Compare the `n_lanes` values from ``args[1]`` on with ``args[2]``; lane i gives bit i."""
    element = context.get_value_type(signature.args[0].dtype)
    vector = ir.VectorType(element, n_lanes)
    address = _address(context, builder, signature.args[0], args[0], args[1], vector)
    values = builder.load(address, align=element.width // 8)
    bound = _splat(builder, args[2], vector)
    bits = builder.bitcast(builder.icmp_signed(operator, values, bound), ir.IntType(n_lanes))
    return builder.zext(bits, ir.IntType(64)) if n_lanes < 64 else bits


@intrinsic
def bits_at_most(typing_context, words, first, bound):
    """Which of the 64 int32 values ``words[first:first + 64]`` are at most `bound` (uint64)."""

    def codegen(context, builder, signature, args):
        return _compare(context, builder, signature, args, 64, "<=")

    return types.uint64(words, types.int64, types.int32), codegen


@intrinsic
def bits_below(typing_context, keys, first, bound):
    """Which of the 32 int64 values ``keys[first:first + 32]`` are less than `bound` (uint64)."""

    def codegen(context, builder, signature, args):
        return _compare(context, builder, signature, args, 32, "<")

    return types.uint64(keys, types.int64, types.int64), codegen


@intrinsic
def take_minima(typing_context, first, first_index, second, second_index, target):
    """Set ``target[:64]`` to the lesser of 64 int32 values of each of two arrays, lane by lane."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(32), 64)
        kinds = signature.args
        a, b, c = (
            _address(context, builder, kinds[i], args[i], index, vector)
            for i, index in ((0, args[1]), (2, args[3]), (4, ir.IntType(64)(0)))
        )
        lesser, other = builder.load(a, align=4), builder.load(b, align=4)
        lesser = builder.select(builder.icmp_signed("<", lesser, other), lesser, other)
        builder.store(lesser, c, align=4)
        return context.get_dummy_value()

    return types.void(first, types.int64, second, types.int64, target), codegen


def _sum_squares(n_lanes):
    """Make the function of one query's squared distances to `n_lanes` items, whose sums stay in registers.

    In a loop over the lanes each sum would wait for the memory that it was put into four dimensions before.
    """

    @intrinsic
    def sum_squares(typing_context, flat, query, dim, source, start, width, out, first):
        def codegen(context, builder, signature, args):
            kinds = signature.args
            real = ir.FloatType()
            vector = ir.VectorType(real, n_lanes)
            sums = cgutils.alloca_once_value(builder, ir.Constant(vector, None))
            with cgutils.for_range(builder, args[2]) as loop:
                place = builder.add(args[1], loop.index)
                value = builder.load(_address(context, builder, kinds[0], args[0], place, real))
                place = builder.add(args[4], builder.mul(loop.index, args[5]))
                items = builder.load(_address(context, builder, kinds[3], args[3], place, vector), align=4)
                gaps = builder.fsub(items, _splat(builder, value, vector))
                # Fused where the loops' sums are: the same bits.
                squares = builder.fmul(gaps, gaps, flags=("contract",))
                builder.store(builder.fadd(builder.load(sums), squares, flags=("contract",)), sums)
            target = _address(context, builder, kinds[6], args[6], args[7], vector)
            builder.store(builder.load(sums), target, align=4)
            return context.get_dummy_value()

        int64 = types.int64
        return types.void(flat, int64, int64, source, int64, int64, out, int64), codegen

    return sum_squares


sum_squares_16, sum_squares_32, sum_squares_64 = _sum_squares(16), _sum_squares(32), _sum_squares(64)


@intrinsic
def count_bits(typing_context, bits):
    """Count the bits that are set (int64)."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), codegen


@intrinsic
def lowest_bit(typing_context, bits):
    """Find the lowest bit that is set (int64); `bits` is not 0."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.IntType(1)(1))

    return types.int64(types.uint64), codegen


@intrinsic
def prefetch(typing_context, values, index):
    """Ask for the cache line of ``values[index]`` without waiting for it."""

    def codegen(context, builder, signature, args):
        byte, word = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        address = _address(context, builder, signature.args[0], args[0], args[1], byte)
        # To be read, and kept near; a line of data.
        builder.call(function, [address, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(values, types.int64), codegen


@intrinsic
def _pointer(typing_context, address, dtype):
    """Turn an address (int64) into a pointer to values of a dtype."""
    kind = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, dtype), codegen


@njit(cache=True, nogil=True)
def array_at(places, i, dtype):
    """Return the array of a dtype that has ``places[i, 1]`` values from the address ``places[i, 0]`` on.

    An argument that is an array costs a call from Python 40 ns. The caller keeps the arrays alive.
    """
    return carray(_pointer(places[i, 0], dtype), (places[i, 1],))
