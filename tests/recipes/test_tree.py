"""Walks through nested options: values by their keys, leaves by their paths, options by dotted names."""

from __future__ import annotations

from argparse import Namespace

from lightning_mpo.recipes.tree import leaves, options, value_at

TOP_K = {"class_path": "objective.supports.TopK", "init_args": {"k": 8, "ids": [1, 2]}}


def test_a_value_is_found_through_mappings_alone():
    assert value_at({"a": {"b": 0}}, "a", "b") == 0
    assert value_at({"a": {"b": 0}}, "a", "c") is None
    assert value_at({"a": "text"}, "a", "b") is None
    assert value_at(None, "a") is None


def test_leaves_of_mappings_lists_and_namespaces():
    tree = {"a": [{"b": 1}, (2, 3)], "c": Namespace(d=None), "e": {}}
    assert list(leaves(tree)) == [
        (("a", 0, "b"), 1),
        (("a", 1, 0), 2),
        (("a", 1, 1), 3),
        (("c", "d"), None),
    ]


def test_options_pass_over_class_path_and_init_args():
    found = dict(options({"support": TOP_K, "kl": None, "critic": {"coef": 0.1}}))
    assert found == {
        "support": TOP_K,
        "support.k": 8,
        "support.ids": [1, 2],
        "kl": None,
        "critic": {"coef": 0.1},
        "critic.coef": 0.1,
    }
    assert dict(options({"support": {"class_path": "TopK", "init_args": None}})) == {
        "support": {"class_path": "TopK", "init_args": None}
    }
