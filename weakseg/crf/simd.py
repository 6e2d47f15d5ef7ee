"""Rows of `width` floats as one vector: what the kernels do at the vertices of a pixel, as LLVM instructions.

The compiler's own vectoriser does not find these vectors behind gathered indices: with plain loops, splat and slice
took 3 to 7 times as long. `dimension` and `width` must be constants of the calling kernel. Arrays are C-contiguous:
vertices (M + 1, width) float32, offsets (N, dimension + 1) uint32, weights like offsets but float32, values (width, N)
float32, neighbours (M, 2) uint32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

INT, LANE, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def slice_row(
    _: Any, dimension: Any, width: Any, vertices: Any, offsets: Any, weights: Any, values: Any, pixel: Any
) -> Any:
    """values[:, pixel] += sum_r weights[pixel, r] * vertices[offsets[pixel, r]]"""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vertex_rows, offset, weight, columns = _arrays(context, builder, signature, arguments, (2, 3, 4, 5))
        first = builder.mul(arguments[6], INT(dimension.literal_value + 1))
        row = Row(builder, width.literal_value)
        total = row.column(columns, arguments[6])
        for r in range(dimension.literal_value + 1):
            at = builder.add(first, INT(r))
            total = row.add_product(total, weight.at(at), row.load(vertex_rows, offset.at(at)))
        row.store_column(total, columns, arguments[6])
        return context.get_dummy_value()

    return types.void(dimension, width, vertices, offsets, weights, values, pixel), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def splat_row(
    _: Any, dimension: Any, width: Any, vertices: Any, offsets: Any, weights: Any, values: Any, pixel: Any
) -> Any:
    """vertices[offsets[pixel, r]] += weights[pixel, r] * values[:, pixel] for every r"""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vertex_rows, offset, weight, columns = _arrays(context, builder, signature, arguments, (2, 3, 4, 5))
        first = builder.mul(arguments[6], INT(dimension.literal_value + 1))
        row = Row(builder, width.literal_value)
        value = row.column(columns, arguments[6])
        for r in range(dimension.literal_value + 1):
            at = builder.add(first, INT(r))
            vertex = offset.at(at)
            row.store(row.add_product(row.load(vertex_rows, vertex), weight.at(at), value), vertex_rows, vertex)
        return context.get_dummy_value()

    return types.void(dimension, width, vertices, offsets, weights, values, pixel), codegen


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def blur_row(_: Any, width: Any, vertices: Any, neighbours: Any, m: Any, out: Any) -> Any:
    """out[m] = vertices[m] + (vertices[neighbours[m, 0]] + vertices[neighbours[m, 1]]) / 2"""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, neighbour, target = _arrays(context, builder, signature, arguments, (1, 2, 4))
        row = Row(builder, width.literal_value)
        first = builder.mul(arguments[3], INT(2))
        sides = [row.load(source, neighbour.at(builder.add(first, INT(side)))) for side in (0, 1)]
        both = builder.fadd(*sides, flags=["fast"])
        row.store(row.add_product(row.load(source, arguments[3]), FLOAT(0.5), both), target, arguments[3])
        return context.get_dummy_value()

    return types.void(width, vertices, neighbours, m, out), codegen


class Array:
    """Pointer and shape of an array argument."""

    def __init__(self, builder: Any, struct: Any) -> None:
        self.builder, self.data, self.shape = builder, struct.data, struct.shape

    def at(self, index: Any) -> Any:
        """The element at a flat index; unsigned integers as 64 bits."""
        value = self.builder.load(self.builder.gep(self.data, [index]))
        return self.builder.zext(value, INT) if isinstance(value.type, ir.IntType) else value


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any, which: tuple[int, ...]) -> list[Array]:
    return [Array(builder, context.make_array(signature.args[i])(context, builder, arguments[i])) for i in which]


class Row:
    """Vectors of `width` floats and what moves them."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder, self.width, self.type = builder, width, ir.VectorType(FLOAT, width)

    def load(self, array: Array, index: Any) -> Any:
        """Row `index` of an array (n, width)."""
        vector = self.builder.load(self._pointer(array, index))
        vector.align = 4  # of a float: rows start anywhere
        return vector

    def store(self, vector: Any, array: Array, index: Any) -> None:
        self.builder.store(vector, self._pointer(array, index)).align = 4

    def column(self, array: Array, index: Any) -> Any:
        """Column `index` of an array (width, n)."""
        vector = self.type(ir.Undefined)
        for lane in range(self.width):
            value = self.builder.load(self._cell(array, lane, index))
            vector = self.builder.insert_element(vector, value, LANE(lane))
        return vector

    def store_column(self, vector: Any, array: Array, index: Any) -> None:
        for lane in range(self.width):
            self.builder.store(self.builder.extract_element(vector, LANE(lane)), self._cell(array, lane, index))

    def add_product(self, vector: Any, scalar: Any, other: Any) -> Any:
        """vector + scalar * other"""
        one = self.builder.insert_element(self.type(ir.Undefined), scalar, LANE(0))
        lanes = ir.VectorType(LANE, self.width)([0] * self.width)
        scalars = self.builder.shuffle_vector(one, self.type(ir.Undefined), lanes)
        return self.builder.fadd(vector, self.builder.fmul(scalars, other, flags=["fast"]), flags=["fast"])

    def _pointer(self, array: Array, index: Any) -> Any:
        first = self.builder.gep(array.data, [self.builder.mul(index, INT(self.width))])
        return self.builder.bitcast(first, self.type.as_pointer())

    def _cell(self, array: Array, lane: int, index: Any) -> Any:
        length = self.builder.extract_value(array.shape, 1)
        return self.builder.gep(array.data, [self.builder.add(index, self.builder.mul(length, INT(lane)))])
