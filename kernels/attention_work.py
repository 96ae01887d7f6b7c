"""How a step's attention is cut into pieces of work, as the kernels read it."""

from typing import NamedTuple

from torch import Tensor

ITEM_FIELDS = 8
"""int32 numbers of an item; a power of two, so that an item is one aligned read."""


LONG_ITEM_KEYS = 1024
"""Up to here an item of prefill attention is short: what a multiprocessor does beside it weighs more (NOTES.md)."""


class DecodeWork(NamedTuple):
    """The rows of a step that decode: a work list that is the same for every layer but for the counter.

    All tensors are int32 unless said otherwise.
    """

    items: Tensor
    """[capacity, ITEM_FIELDS]: (row of q, row of the block tables, first token, end token, partial or -1, first partial
    to go on from, number of these). A row with one item has -1: the item goes on from the partials of the row's shared
    prefix, if it has one, and writes the row's output. Of other rows each item writes one partial."""
    num_items: Tensor
    """[1]"""
    counters: Tensor
    """[layers], zeros: programs draw their items from their layer's counter."""
    merges: Tensor
    """[rows, 4]: (row of q, first partial, number of partials) of the other rows."""
    num_merges: Tensor
    """[1]"""
    prefix_items: Tensor
    """[capacity, ITEM_FIELDS]: (row of the block tables, first member, members, first token, end token, chunk)."""
    num_prefix_items: Tensor
    """[1]"""
    members: Tensor
    """[rows]: rows of q that share a prefix, group by group."""
    member_partials: Tensor
    """[rows]: the partial of the member's first prefix chunk; the other chunks' follow it."""
    partial_out: Tensor
    """float32 [partials, Q, H], scratch"""
    partial_lse: Tensor
    """float32 [partials, Q], scratch: log2 of the sum of exp2 of the scores"""
    shares_prefixes: bool
    """Whether there can be prefix items; without, their kernel is not launched."""
    cuts_rows: bool
    """Whether there can be merges; likewise."""


class PrefillWork(NamedTuple):
    """The rows of a step that prefill; int32."""

    items: Tensor
    """[capacity, ITEM_FIELDS]: (first query, queries, row of the block tables, position of the first query). Those that
    see most keys come first."""
    bounds: Tensor
    """[3]: 0, how many of the items see more than LONG_ITEM_KEYS keys, how many there are."""
    counters: Tensor
    """[layers], zeros"""
