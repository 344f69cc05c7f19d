"""Tuples of arrays handed to inner functions by their address.

Numba hands a tuple over by value: of thirty arrays that is 250 numbers, emitted, optimised and copied at every call.
"""

from __future__ import annotations

from typing import Any

from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model


class Address(types.Type):
    """Where a named tuple lies that is read field by field."""

    def __init__(self, own: Any) -> None:
        self.own = own
        super().__init__(name=f"address of {own}")


@register_model(Address)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Address) -> None:
        super().__init__(manager, kind, manager.lookup(kind.own).get_value_type().as_pointer())  # type: ignore[no-untyped-call]


@infer_getattr
class _Fields(AttributeTemplate):
    key = Address

    def generic_resolve(self, kind: Address, name: str) -> Any:  # type: ignore[override]
        return kind.own.types[kind.own.fields.index(name)] if name in kind.own.fields else None


@lower_getattr_generic(Address)  # type: ignore[no-untyped-call]
def _read(context: Any, builder: Any, kind: Address, address: Any, name: str) -> Any:
    return builder.load(_field(builder, address, kind.own.fields.index(name)))


def _field(builder: Any, address: Any, n: int) -> Any:
    return cgutils.gep_inbounds(builder, address, 0, n)  # type: ignore[no-untyped-call]


def _lent(typing: Any, fields: Any) -> Any:
    """The address of a named tuple, good until the function that asks for it ends."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = cgutils.alloca_once(builder, values[0].type)  # type: ignore[no-untyped-call]
        for n in range(len(fields.types)):
            builder.store(builder.extract_value(values[0], n), _field(builder, place, n))
        return place

    return Address(fields)(fields), code


lent: Any = intrinsic(_lent)
