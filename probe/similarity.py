"""How alike the representations of two layers are: linear CKA, debiased (Kornblith et al., 2019; Nguyen et al., 2021).

CKA compares which clips lie near which: 1 where one layer is a rotated and scaled copy of the other, 0 where the two
know nothing of each other. The plain estimate is far above 0 for unrelated features once channels outnumber clips; this
one takes the unbiased estimate of HSIC (Song et al., 2012), which has the mean 0 there, and so may be a little below.

With K and L the Gram matrices of two layers, their diagonals set to 0, and 1 a vector of ones:
    HSIC = (tr KL + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1) / (n(n-3))
    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

n clips that both caches have, A and B layers, M = A + B (or A alone), D channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from whisper_at_cli.extract.cache import FeatureCache
from whisper_at_cli.extract.errors import UsageError

BLOCK = 1 << 24  # numbers of Gram matrices in memory at once
LEAST_CLIPS = 4


@dataclass(frozen=True)
class Similarity:
    """CKA of every layer of one cache with every layer of another, or of itself."""

    first: str  # backbones
    second: str
    cka: list[list[float | None]]  # (A, B); None where a layer is the same for all clips
    clips: int  # that both have
    first_cache: str
    second_cache: str
    warnings: list[str] = field(default_factory=list)


def layer_similarity(first: FeatureCache, second: FeatureCache | None = None) -> Similarity:
    """Linear CKA of the layers' time means, over the finished clips that both caches have, by id.

    Raises UsageError where fewer than four clips are left.
    """
    other = second or first
    ids = [cache.ids.astype(str) for cache in (first, other)]
    done = [np.flatnonzero(cache.done) for cache in (first, other)]
    shared, *places = np.intersect1d(ids[0][done[0]], ids[1][done[1]], return_indices=True)
    if len(shared) < LEAST_CLIPS:
        raise UsageError(
            f"{first.path} and {other.path} have {len(shared)} finished clips in common by their ids; CKA needs "
            f"{LEAST_CLIPS}"
        )
    warnings = [
        f"{len(there) - len(shared)} finished clips of {cache.path} are not in the other cache and were left out"
        for cache, there in zip((first, other), done, strict=True)
        if len(there) > len(shared)
    ]
    caches = (first,) if second is None else (first, second)
    x = [
        _centred(cache.mean(layer=layer, rows=np.sort(rows[place]))[np.argsort(np.argsort(rows[place]))])
        for cache, rows, place in zip(caches, done, places, strict=False)
        for layer in cache.layer_numbers
    ]
    cka_MM = debiased_cka(x)
    A = first.spec.layers
    found = cka_MM[:A, :A] if second is None else cka_MM[:A, A:]
    return Similarity(
        first.spec.backbone, other.spec.backbone,
        [[None if np.isnan(value) else float(value) for value in row] for row in found],
        len(shared), str(first.path), str(other.path), warnings,
    )  # fmt: skip


def _centred(x_nD: np.ndarray) -> np.ndarray:
    """Moved and scaled, which CKA does not see and float32 does."""
    x_nD = x_nD - x_nD.mean(axis=0, dtype=np.float64).astype(np.float32)
    size = float(np.sqrt(np.mean(np.square(x_nD, dtype=np.float64)) * x_nD.shape[1]))
    return x_nD / np.float32(size or 1.0)


def debiased_cka(representations: list[np.ndarray]) -> np.ndarray:
    """(M, M) of representations (n, D), D their own; NaN where one does not vary. At least four clips.

    Gram matrices are made for some rows at a time, of all representations at once, so that the traces of all pairs are
    one matrix product.
    """
    M, n = len(representations), len(representations[0])
    trace_MM = np.zeros((M, M))
    sums_Mn = np.empty((M, n))
    step = max(1, BLOCK // (M * n))
    for first in range(0, n, step):
        here = np.arange(first, min(n, first + step))
        gram_Mbn = np.stack([x[here] @ x.T for x in representations])
        gram_Mbn[:, np.arange(len(here)), here] = 0
        sums_Mn[:, here] = gram_Mbn.sum(axis=2, dtype=np.float64)
        flat = gram_Mbn.reshape(M, -1)
        trace_MM += flat @ flat.T
    total_M = sums_Mn.sum(axis=1)
    hsic_MM = trace_MM + np.outer(total_M, total_M) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_Mn @ sums_Mn.T)
    own_M = np.diag(hsic_MM).copy()
    own_M[own_M <= 0] = np.nan
    return hsic_MM / np.sqrt(np.outer(own_M, own_M))
