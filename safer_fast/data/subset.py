"""Stratified subsets of a data set: every class in its proportion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from safer_fast.runtime.seeds import make_permutation

Indices = NDArray[np.int64]
Labels = NDArray[np.int64]


def fixed_order(labels: Labels) -> Indices:
    """Order all images so that the first N, for any N, are a stratified subset.

    The order depends only on the labels, not on the seed of a run: all ranks, commands and runs
    use the same subset, and a larger subset begins with a smaller one.
    """
    return stratified(make_permutation(len(labels), 0, "subset"), labels)


def describe_subset(num_images: int, of_images: int) -> str:
    """The size of a subset of a split, in words."""
    return f"{num_images:,} of {of_images:,} images, stratified by class"


def stratified(order: Indices, labels: Labels) -> Indices:
    """Rearrange indices so that the first N, for any N, hold the classes in their proportions.

    First comes one image of each class, larger classes before smaller ones; the others follow by
    the method of Sainte-Lague, which rounds shares to whole images. Images of one class keep their
    order, and earlier ones come first among equals.
    order: indices into labels; labels: class numbers of all images, int64 [N].
    """
    classes = labels[order]
    counts = np.bincount(classes)
    by_class = np.argsort(classes, kind="stable")
    rank_in_class = np.empty_like(by_class)
    rank_in_class[by_class] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    share = (rank_in_class + 0.5) / counts[classes]
    # lexsort is stable, and its last key weighs most
    rearranged: Indices = order[np.lexsort((share, rank_in_class > 0))]
    return rearranged


def draw(order: Indices, labels: Labels, num_images: int) -> Indices:
    """The first `num_images` of a random order; of its stratified order if the former would leave
    out a class that there is room for."""
    drawn = order[:num_images]
    room = min(num_images, len(np.unique(labels[order])))
    if len(np.unique(labels[drawn])) < room:
        return stratified(order, labels)[:num_images]
    return drawn
