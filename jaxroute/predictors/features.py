"""Turn prompts into numbers: hashed n-grams weighted by tf-idf, and waves of a few plain counts.

Hashing (Weinberger et al. 2009) needs no vocabulary: the hash of an n-gram names its bucket and its sign. A word is a
run of letters and digits, or any other mark alone; its hash is zlib.crc32 of its UTF-8 bytes in lower case. N-grams
combine hashes (words) or code points (characters) by multiplication with `_MULTIPLIER` and addition, modulo 2**32,
and end with the finaliser of MurmurHash3. None of this may change: stored predictors depend on it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix

BUCKETS = 2**16
_WAVES = 256
_CHARACTERS = 4
_NUM_PLAIN = 15
_TOKEN = re.compile(r"\w+|[^\w\s]")

HASHING: dict[str, Any] = {
    "version": 1,
    "token": _TOKEN.pattern,
    "word_ngrams": [1, 2],
    "character_ngrams": [_CHARACTERS],
    "buckets": BUCKETS,  # for words, and as many for characters
    "waves": _WAVES,
}
"""Settings on which the meaning of a stored predictor's weights depends."""

_SPACE = re.compile(r"\s+")
_MULTIPLIER = np.uint32(0x9E3779B1)

# Weights of the kinds of features, relative to words and waves, as shares of a prompt's squared length. On the
# published tables, characters add .01 to the R2 of log length over words and waves alone, and hardly anything to the
# AUC.
_CHARACTER_WEIGHT = 0.5
_STRAIGHT_WEIGHT = 0.01
# exp(-_BANDWIDTH * squared distance per plain count): the kernel that the waves stand for.
_BANDWIDTH = 0.3
_OUTLIER = 4.0  # standard deviations, to which plain counts are clipped
_FREQUENT = 1024  # buckets multiplied as a dense matrix


class Counts(NamedTuple):
    """Contents of some prompts, before anything is learned from them."""

    grams: csr_matrix
    """1 + log of how often an n-gram occurs, with its sign; columns are the words' buckets, then the characters'."""
    plain: Float[np.ndarray, "prompt count"]
    """Length, shares of digits and the like."""

    def rows(self, chosen: Int[np.ndarray, "chosen"]) -> Counts:
        """Return some of the prompts."""
        return Counts(self.grams[chosen], self.plain[chosen])


class Encoded(NamedTuple):
    """Prompts in the form that a linear model takes."""

    grams: csr_matrix
    """Tf-idf of the n-grams; a prompt's words have length 1, as have its characters before their weight."""
    dense: Float[np.ndarray, "prompt dense"]
    """Waves, standardised counts and a constant."""

    def rows(self, chosen: Int[np.ndarray, "chosen"]) -> Encoded:
        """Return some of the prompts."""
        return Encoded(self.grams[chosen], self.dense[chosen])


class Features(NamedTuple):
    """Figures learned from the texts alone, without any answer."""

    idf: Float[np.ndarray, "bucket"]
    """Weight of a bucket, log((1 + prompts) / (1 + prompts with it)) + 1; 0 if fewer than two have it."""
    centre: Float[np.ndarray, "count"]
    """Mean of the plain counts."""
    scale: Float[np.ndarray, "count"]
    """Standard deviation of the plain counts."""
    frequencies: Float[np.ndarray, "count wave"]
    """Frequencies of the waves, random Fourier features (Rahimi and Recht 2007) of a Gaussian kernel."""
    phases: Float[np.ndarray, "wave"]
    """Phases of the waves."""

    def encode(self, counts: Counts) -> Encoded:
        """Weight the n-grams, normalise words and characters separately, and compute the waves."""
        grams = counts.grams
        values = grams.data * self.idf[grams.indices]
        prompt = np.repeat(np.arange(grams.shape[0]), np.diff(grams.indptr))
        kind = 2 * prompt + (grams.indices >= BUCKETS)
        length = np.bincount(kind, values**2, minlength=2 * grams.shape[0])
        length[1::2] = length[1::2] / _CHARACTER_WEIGHT
        values /= np.sqrt(np.maximum(length, 1e-12)).astype(np.float32)[kind]
        plain = np.clip((counts.plain - self.centre) / self.scale, -_OUTLIER, _OUTLIER)
        waves = np.sqrt(2 / _WAVES) * np.cos(plain @ self.frequencies + self.phases)
        dense = [waves, np.sqrt(_STRAIGHT_WEIGHT) * plain, np.ones((len(plain), 1))]
        return Encoded(
            csr_matrix((values, grams.indices, grams.indptr), shape=grams.shape),
            np.concatenate(dense, axis=1, dtype=np.float32),
        )


def count(prompts: Sequence[str]) -> Counts:
    """Hash and count the contents of each prompt."""
    rows = [_count_one(prompt) for prompt in prompts]
    buckets, values, plain = zip(*rows, strict=True) if rows else ((), (), ())
    starts = np.concatenate([[0], np.cumsum([len(row) for row in buckets])])
    grams = csr_matrix(
        (np.concatenate([np.empty(0, np.float32), *values]), np.concatenate([np.empty(0, np.int32), *buckets]), starts),
        shape=(len(rows), 2 * BUCKETS),
    )
    return Counts(grams, np.array(plain, np.float32).reshape(len(rows), _NUM_PLAIN))


def fit_features(counts: Counts, seed: int) -> Features:
    """Learn idf and scale from these texts; the seed draws the waves."""
    num_prompts = counts.grams.shape[0]
    present = np.bincount(counts.grams.indices, minlength=2 * BUCKETS)
    idf = np.log((1 + num_prompts) / (1 + np.minimum(present, num_prompts))) + 1
    scale = counts.plain.std(axis=0)
    rng = np.random.default_rng(seed)
    shape = (counts.plain.shape[1], _WAVES)
    frequencies = rng.standard_normal(shape) * np.sqrt(2 * _BANDWIDTH / shape[0])
    return Features(
        # An n-gram of a single prompt says nothing about other prompts.
        idf=np.where(present >= 2, idf, 0.0).astype(np.float32),
        centre=counts.plain.mean(axis=0),
        scale=np.where(scale > 1e-6, scale, 1.0).astype(np.float32),
        frequencies=frequencies.astype(np.float32),
        phases=rng.uniform(0, 2 * np.pi, _WAVES).astype(np.float32),
    )


def inner_products(encoded: Encoded) -> Float[np.ndarray, "prompt prompt"]:
    """Return the inner products of the prompts' features: the kernel of a linear model."""
    grams, dense = encoded
    # The most frequent buckets are multiplied as a dense matrix: a sparse product would take several times longer over
    # them, whereas all the others together cost it little.
    present = np.bincount(grams.indices, minlength=grams.shape[1])
    frequent = np.sort(np.argsort(present, kind="stable")[-_FREQUENT:])
    rare = np.setdiff1d(np.flatnonzero(present), frequent)
    dense = np.concatenate([dense, grams[:, frequent].toarray()], axis=1)
    kernel = dense @ dense.T
    kernel += (grams[:, rare] @ grams[:, rare].T).toarray()
    return kernel


def _count_one(prompt: str) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Return the buckets and values of one prompt's n-grams, and its plain counts."""
    text = prompt.lower()
    tokens = _TOKEN.findall(text)
    # surrogatepass: half a character, which a broken tokenizer may leave, counts like any other.
    word = np.array([zlib.crc32(token.encode("utf-8", "surrogatepass")) for token in tokens], np.uint32)
    words = _mixed(np.concatenate([word, word[:-1] * _MULTIPLIER + word[1:]]))
    point = np.frombuffer(_SPACE.sub(" ", text).encode("utf-32-le", "surrogatepass"), np.uint32)
    characters = np.zeros(max(len(point) - _CHARACTERS + 1, 0), np.uint32)
    for place in range(_CHARACTERS if len(characters) else 0):
        characters = characters * _MULTIPLIER + point[place : place + len(characters)]
    buckets, values = [], []
    for kind, hashes in enumerate((words, _mixed(characters))):
        distinct, times = np.unique(hashes, return_counts=True)
        sign = 1 - 2 * (distinct >> np.uint32(31)).astype(np.float32)
        buckets.append((distinct % np.uint32(BUCKETS)).astype(np.int32) + kind * BUCKETS)
        values.append(sign * (1 + np.log(times.astype(np.float32))))
    return np.concatenate(buckets), np.concatenate(values), _plain(prompt, tokens)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Apply the finaliser of MurmurHash3 (Austin Appleby, public domain): each bit of the input affects every bit."""
    hashes = (hashes ^ hashes >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ hashes >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return hashes ^ hashes >> np.uint32(16)


def _plain(prompt: str, tokens: list[str]) -> list[float]:
    """Return lengths, shares and counts of one prompt."""
    point = np.frombuffer(prompt.encode("utf-32-le", "surrogatepass"), np.uint32)
    characters = max(len(point), 1)
    kinds = np.bincount(_KIND[np.minimum(point, len(_KIND) - 1)], minlength=len(_KINDS) + 2) / characters
    letters = sum(map(len, tokens))
    logs = [
        len(point),
        len(tokens),
        len(set(tokens)),
        sum(map(str.isdigit, tokens)),
        *(sum(map(prompt.count, marks)) for marks in ("\n", ",", "$\\", "\"'", "+-*/=^<>", "?")),
    ]
    return [*np.log1p(logs), *kinds[1:], letters / max(len(tokens), 1)]


# Kind of a character: digit, capital, other mark, beyond ASCII; 0 for small letters and space.
_KINDS = ("0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_KIND = np.zeros(129, np.int64)
for _number, _characters in enumerate(_KINDS, 1):
    _KIND[[ord(character) for character in _characters]] = _number
_KIND[128] = len(_KINDS) + 1
