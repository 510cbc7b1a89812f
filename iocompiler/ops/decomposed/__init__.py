"""Our own decompositions, one file a family; `iocompiler.ops.decompositions.table` puts them
together.
"""
