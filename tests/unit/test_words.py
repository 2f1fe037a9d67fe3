"""Titles by their words."""

import numpy as np

from training.words import word_components, word_similarity, word_vectors

TITLES = ["OPI Nail Lacquer, Red", "OPI Nail Lacquer, Blue", "Brush, Blue", "Brush, Red", "x", ""]


def test_a_shared_brand_is_nearer_than_a_shared_colour() -> None:
    near = word_similarity(word_vectors(TITLES)).toarray()
    assert near[0, 1] > near[0, 3] > 0
    assert near[0, 2] == 0
    np.testing.assert_allclose(near.diagonal(), [1, 1, 1, 1, 0, 0], rtol=1e-6)  # words of one title alone tell no likeness


def test_words_that_stand_together_are_nearer_than_the_same_words_apart() -> None:
    near = word_similarity(word_vectors(["nail art brush", "nail art pen", "art nail pen", "art nail brush"])).toarray()
    assert near[0, 1] > near[0, 2] > 0


def test_components_are_as_many_as_asked_for_or_there_are_and_the_same_every_time() -> None:
    vectors = word_vectors(TITLES)
    found = word_components(vectors, 3)
    assert found.shape == (6, 3)
    np.testing.assert_array_equal(found, word_components(vectors, 3))
    assert word_components(vectors).shape == (6, min(vectors.shape) - 1)
