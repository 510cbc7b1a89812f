"""Rows that are copied to where they are not aligned, in words of eight bytes.

A word of the copy has its first elements from one word of the row and the others from the next. The
row is therefore read in words, each again beside the one behind it (which is in L1 by then), and
the two are shifted into place: elements written one by one go through shared memory, and to L2 in
eight times as many pieces.
"""

import triton
import triton.language as tl

WORD = tl.constexpr(8)  # bytes
LINE = tl.constexpr(32)  # a sector: what threads side by side write begins at one


@triton.jit
def words_of(start):
    """A row as words. By way of a number: Triton no longer knows more of its address than that
    words are aligned, and so lays what is read and what is written out over threads alike.
    """
    return start.to(tl.uint64).to(tl.pointer_type(tl.uint64))


@triton.jit
def places(start, tail, at, cut):
    """Where elements or words ``at`` of a row lie: those from ``cut`` on in its ``tail`` (None:
    there is none).
    """
    if tail is None:
        found = start + at
    else:
        found = tl.where(at < cut, start + at, tail + (at - cut))
    return found


@triton.jit
def opened(words, dtype: tl.constexpr):
    """The elements of words [N]: [N, elements of a word]."""
    low, high = words.to(tl.uint32), (words >> 32).to(tl.uint32)
    if dtype.primitive_bitwidth == 32:
        elements = tl.join(low.to(dtype, bitcast=True), high.to(dtype, bitcast=True))
    else:
        first = tl.join(_short(low, dtype), _short(high, dtype))
        second = tl.join(_short(low >> 16, dtype), _short(high >> 16, dtype))
        elements = tl.reshape(tl.join(first, second), [words.shape[0], 4])
    return elements


@triton.jit
def _short(bits, dtype: tl.constexpr):
    return bits.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def place_of(kept, PER: tl.constexpr):
    """Of a row of a copy: (its words, from the line it begins in; how many elements of that line
    are not this row's).
    """
    address = kept.to(tl.uint64)
    missing = address % LINE
    return (address - missing).to(tl.pointer_type(tl.uint64)), (missing // (WORD // PER)).to(
        tl.int32
    )


@triton.jit
def copy_words(source, tail, cut, place, missing, at, vocabulary, PER: tl.constexpr):
    """Write those words ``at`` of the copy that belong to the row whole: `copy_ends` writes the
    rest. What is read lies as `places` says, in words.
    """
    whole = (at * PER >= missing) & (at < (vocabulary + missing) // PER)
    last = at - missing // PER
    shift = (missing % PER * (64 // PER)).to(tl.uint64)
    there = places(source, tail, last, cut)
    ahead = there - 1
    if tail is not None:
        ahead = tl.where(last == cut, source + last - 1, ahead)
    words = tl.load(there, mask=whole, other=0)
    before = tl.load(ahead, mask=whole & (last > 0), other=0)
    moved = (words << shift) | ((before >> 1) >> (63 - shift))
    tl.store(place + at, moved, mask=whole, eviction_policy="evict_first")


@triton.jit
def copy_ends(start, tail, cut, kept, missing, vocabulary, covered, PER: tl.constexpr):
    """Write the elements of a row before its first whole word, and behind its last, or behind the
    first ``covered`` elements of its lines. What is read lies as `places` says.
    """
    each = tl.arange(0, PER)
    first = (each < (PER - missing % PER) % PER) & (each < vocabulary)
    tl.store(kept + each, tl.load(places(start, tail, each, cut), mask=first), mask=first)
    end = tl.minimum((vocabulary + missing) // PER * PER, covered) - missing
    each = end + tl.arange(0, 2 * LINE * PER // WORD)
    last = (each >= 0) & (each < vocabulary)
    tl.store(kept + each, tl.load(places(start, tail, each, cut), mask=last), mask=last)
