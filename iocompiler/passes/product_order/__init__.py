"""Chains of matrix products in the order that costs least."""

from iocompiler.passes.product_order.rewrite import product_order

__all__ = ["product_order"]
