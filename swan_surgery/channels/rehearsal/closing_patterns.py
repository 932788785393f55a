"""Which channels a rehearsal closes: patterns under which a wrong guess does not fit by chance."""

from math import gcd
from typing import Any

import numpy as np

from swan_surgery.channels.solving.arrays import Flags, Ints, distinct
from swan_surgery.channels.solving.mapping import Solution


Floats = np.ndarray[Any, np.dtype[np.float64]]

_NARROW = 64
# Turns from here on close half of the kinds of components and leave the others whole.
_APART = 16
# From here on kinds that lose any lose half.
_HALVED = 2


def turns(solution: Solution) -> list[tuple[int, int]]:
    """The rehearsals: which closing pattern, and how many components every axis keeps.

    In narrow models a wrong guess may fit by chance (3 // 2 heads are 1, as 3 // 3 are; two widths of
    three both keep two), so they rehearse more often, and axes of three channels down to one. Axes of
    two come last and apart: at width 1 even torch takes other paths.
    """
    axes, _, kinds = _kinds(solution)
    sizes = [len(distinct(own)) for own in axes]
    narrow = max(sizes, default=0) <= _NARROW
    apart = range(_APART, _APART + 2 * _bits(np.bincount(kinds)) if narrow else _APART)
    found = [(turn, 2) for turn in range(4 if narrow and not apart else 2)]
    if 2 not in sizes:
        found += [(turn, 2) for turn in apart]
    if 2 in sizes or (narrow and 3 in sizes):
        found += [(turn, 1) for turn in range(2)]
    return found + [(turn, 1) for turn in apart if 2 in sizes]


def turn_of(turn: int, *, training: bool) -> int:
    """The two modes see different patterns where chance plays a part."""
    return turn if turn >= _APART else turn + training


def _bits(sizes: Ints) -> int:
    """How many binary digits tell kinds of the same size apart."""
    alike = max(np.unique(sizes, return_counts=True)[1], default=1)
    return (int(alike) - 1).bit_length()


def closing_pattern(solution: Solution, turn: int, least: int) -> Flags:
    """Which components stay in a rehearsal; every axis keeps `least` components (if it has them).

    Even turns close mostly low positions, odd turns mostly high ones, so that a slice that ends in
    the wrong place shows. Every second kind of component (those that lie on the same axes; the other
    half in the next turn) loses at least one. From turn `_APART` on, only those lose any, and every
    two kinds of equally many components are told apart in some turn: else `c.expand_as(x)` would look
    right as long as both happen to keep as many. Even turns before keep numbers without a factor in
    common with the whole; from turn 2 on, kinds that lose any keep at most half.
    """
    rng = np.random.default_rng(turn)
    prunable = solution.prunable
    axes, position, kinds = _kinds(solution)
    candidates = np.flatnonzero(prunable)
    chance = 0.8 * (1 - position if turn % 2 == 0 else position)
    forced = np.zeros(len(prunable), bool)
    # Every kind shrinks by another share: widths // heads must not come out right by chance.
    share = rng.uniform(0.3, 1.25, int(kinds.max(initial=-1)) + 1)
    chance[candidates] *= share[kinds]
    losing = np.arange(len(share)) % 2 == turn % 2
    if turn >= _APART:
        bit, wanted = divmod(turn - _APART, 2)
        losing = (_ranks(np.bincount(kinds)) >> bit) % 2 == wanted
        chance[candidates[~losing[kinds]]] = 0
    stays = ~(prunable & (rng.random(len(prunable)) < chance))
    for which in np.flatnonzero(losing):
        members = candidates[kinds == which]
        pick = members[0 if turn % 4 < 2 else -1]
        stays[pick], forced[pick] = False, True
    if turn < _APART and turn % 2 == 0:
        for kind in range(len(share)):
            _close_to_coprime_(stays, candidates[kinds == kind], least)
    if turn >= _HALVED:
        for kind in np.flatnonzero(losing).tolist():
            _close_to_half_(stays, candidates[kinds == kind], least)
    for own in axes:
        members = distinct(own)
        while stays[members].sum() < min(least, len(members)):
            gone = own[~stays[own]]
            free = gone[~forced[gone]]
            stays[(free if len(free) else gone)[-1 if turn % 2 == 0 else 0]] = True
    return stays


def _close_to_coprime_(stays: Flags, members: Ints, least: int) -> None:
    """Close more of a kind that loses some, until what stays has no factor in common with all.

    With six of eight heads, `width // 8 * 8` is the width; with five it is not.
    """
    kept = members[stays[members]]
    if len(kept) == len(members):
        return
    for last in range(len(kept), least - 1, -1):
        if gcd(last, len(members)) == 1:
            stays[kept[last:]] = False
            return


def _close_to_half_(stays: Flags, members: Ints, least: int) -> None:
    """Close more of a kind, until half of it stays at most.

    With three of four heads of two, `width // heads` is two as with all four; with two of them it is not.
    """
    kept = members[stays[members]]
    stays[kept[max(least, len(members) // 2) :]] = False


def _kinds(solution: Solution) -> tuple[list[Ints], Floats, Ints]:
    """The axes that may shrink; every component's place on its first one; every candidate's kind.

    Components that lie on the same axes are of one kind; candidates are those that could go.
    """
    prunable = solution.prunable
    axes = [
        solution.component[start : start + size]
        for (_, _, size), start in zip(
            solution.labelled.axes, solution.labelled.starts, strict=True
        )
    ]
    axes = [own for own in axes if prunable[own].any()]
    position = np.full(len(prunable), -1.0)
    kind = np.zeros(len(prunable), np.uint64)
    marks = np.random.default_rng(0).integers(1, 2**62, len(axes), dtype=np.uint64)
    for own, mark in zip(axes, marks, strict=True):
        fresh = position[own] < 0
        position[own[fresh][::-1]] = (np.arange(len(own)) / len(own))[fresh][::-1]
        np.add.at(kind, own, mark)
    _, kinds = np.unique(kind[np.flatnonzero(prunable)], return_inverse=True)
    return axes, position, kinds


def _ranks(sizes: Ints) -> Ints:
    """Of every kind its place among those of the same size."""
    ranks = np.zeros(len(sizes), np.int64)
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        ranks[same] = np.arange(len(same))
    return ranks
