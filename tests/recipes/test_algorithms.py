"""An algorithm file sets every axis and every argument, and is the algorithm that it names."""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lightning_mpo import recipes
from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.classes import classes
from lightning_mpo.errors import UserError
from lightning_mpo.objective.objective import Objective
from tests.support.recipes import CONFIGS, name_of

ALGORITHMS = sorted((CONFIGS / "algorithm").glob("*.yaml"))


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_sets_every_axis_and_every_argument(path):
    """Files overlay key by key: what one does not set stays as the file before left it."""
    parts = [yaml.safe_load(part.read_text()) for part in recipes.with_includes(path)]
    assert parts[0]["model"]["class_path"] == "PolicyOptimization"
    assert {key for part in parts for key in part} <= {"include", "model", "rollout"}
    objectives = [part["model"]["init_args"]["objective"] for part in parts]
    assert set(objectives[0]) == {item.name for item in fields(Objective)}
    assert {key for part in objectives for key in part} == set(objectives[0])
    rollouts = [part["rollout"] for part in parts if "rollout" in part]
    assert set(rollouts[0]) == {"dynamic", "mask_truncated"}, (
        "what an algorithm asks of rollouts, and nothing else"
    )
    assert {key for part in rollouts for key in part} == set(rollouts[0])
    for part in (*objectives, *rollouts):
        assert_complete(part, str(path))


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_says_what_differs_from_grpo(path):
    """So no choice of an earlier file stays, and nothing is written twice."""
    includes = recipes.with_includes(path)
    assert [part.stem for part in includes] == list(dict.fromkeys(["grpo", path.stem]))
    base, own = (
        yaml.safe_load(part.read_text())["model"]["init_args"]["objective"]
        for part in (includes[0], path)
    )
    assert path.stem == "grpo" or not [axis for axis in own if own[axis] == base[axis]]


@pytest.mark.filterwarnings("ignore:.*also sets `rollout.dynamic`")
@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_grpo_after_another_algorithm_is_the_default(path):
    assert Objective.from_file(path, "grpo", max_new_tokens=8) == Objective()


def test_the_overlong_penalty_is_added_as_dapo_says(build):
    """By the option that its file names, and with a limit that is read from the rollout."""
    path = CONFIGS / "algorithm" / "dapo.yaml"
    option = re.search(r"--rollout\.rewards\+='(.+)'", path.read_text())
    assert option is not None
    reward = {
        "class_path": "OverlongPenalty",
        "init_args": {"limit": "${rollout.max_new_tokens}", "buffer": 3},
    }
    Path("penalty.yaml").write_text(
        yaml.safe_dump({"rollout": {"rewards": ["ExactAnswer", reward]}})
    )
    for more, limit, buffer in (
        (["-c", "penalty.yaml"], 6, 3),
        ([f"--rollout.rewards+={option[1]}"], 40, 8),
    ):
        _, _, trainer = build("-c", "base.yaml", "-c", path, *more)
        rewards = next(c for c in trainer.callbacks if isinstance(c, RolloutLoop)).rewards
        assert [type(part).__name__ for part in rewards] == ["ExactAnswer", "OverlongPenalty"]
        assert (rewards[1].limit, rewards[1].buffer) == (limit, buffer)


def assert_complete(value: object, where: str) -> None:
    """Check each class in a tree of options against its signature."""
    if isinstance(value, dict) and "class_path" in value:
        given = set(value.get("init_args", {}))
        takes = set(inspect.signature(classes()[value["class_path"]].__init__).parameters) - {
            "self"
        }
        assert given == takes, f"{where}: {value['class_path']} leaves {takes - given} open"
        assert_complete(value.get("init_args", {}), where)
    elif isinstance(value, dict):
        for key, inner in value.items():
            assert_complete(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            assert_complete(inner, where)
    elif isinstance(value, str) and value in classes():
        takes = set(inspect.signature(classes()[value].__init__).parameters) - {"self"}
        own = classes()[value].__init__ is not object.__init__
        assert not (takes and own), f"{where}: {value} takes {takes}; write them out"


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_is_the_one_it_says_also_after_another(build, path):
    other = {
        "dynamic": {"class_path": "DynamicSampling", "init_args": {"rounds": 7}},
        "mask_truncated": True,
    }
    Path("before.yaml").write_text(yaml.safe_dump({"rollout": other}))
    model, _, trainer = build("-c", "base.yaml", "-c", "before.yaml", "-c", path)
    rollout = next(c for c in trainer.callbacks if isinstance(c, RolloutLoop))
    assert (rollout.dynamic and rollout.dynamic.rounds) == (10 if "dapo" in path.stem else None)
    assert rollout.mask_truncated is False
    said = model.objective.describe()
    named = {
        "grpo": [
            "TokenActions",
            "SequenceMean",
            "scale='std'",
            "low=0.2, high=0.2",
            "FullVocabulary",
            "terms none",
        ],
        "dapo": ["TokenActions", "TokenMean", "low=0.2, high=0.28"],
        "dr_grpo": ["TokenActions", "ConstantLength(length=6)", "scale='none'"],
        "gdpo": ["TokenActions", "DecoupledRelative(whiten=True)", "SequenceMean", "terms none"],
        "gspo": [
            "SequenceActions(mean=True, form='sequence')",
            "SequenceMean",
            "low=0.0003, high=0.0004",
        ],
        "gspo_token": [
            "SequenceActions(mean=True, form='token')",
            "SequenceMean",
            "low=0.0003, high=0.0004",
        ],
        "rloo": [
            "SequenceActions(mean=False, form='sequence')",
            "LeaveOneOut",
            "SequenceMean",
            "estimator='k1', place='reward'",
            "0.05",
        ],
        "reinforce": ["ReturnToGo(gamma=1.0, whiten=False)", "PolicyGradient", "terms none"],
        "reinforce_plus_plus": [
            "ReturnToGo(gamma=1.0, whiten=True)",
            "ClippedRatio",
            "estimator='k1', place='reward'",
            "0.01",
        ],
        "reinforce_plus_plus_baseline": ["GroupRelative(scale='batch')", "TokenMean", "terms none"],
        "cispo": ["TokenActions", "TokenMean", "ClippedWeight(low=1.0, high=4.0)"],
        "aspo": [
            "TokenActions",
            "TokenMean",
            "AsymmetricRatio(low=0.2, high=0.2, cap_positive=3.0, cap_negative=3.0, wide=None)",
        ],
        "gmpo": [
            "SequenceActions(mean=True, form='sequence')",
            "BoundedTokens(low=0.4, high=0.4)",
            "SequenceMean",
        ],
        "dppo": [
            "scale='none'",
            "DivergenceMask(delta=0.15, delta_up=None, divergence='tv', cap=5.0, top_k=None)",
        ],
        "dppo_kl": [
            "scale='none'",
            "DivergenceMask(delta=0.05, delta_up=None, divergence='kl', cap=5.0, top_k=None)",
        ],
        "s_grpo": [
            "PolicyGradient",
            "SampledTokens(prefix=50, cap=100, probability=0.4, cap_mode='scan'",
            "SequenceMean",
        ],
        "t_spmo": [
            "PrefixTree(count=False)",
            "PolicyGradient",
            "TokenMean",
            "terms WeightPenalty(coef=0.01)",
        ],
        "grpo_high_entropy": ["HighEntropyTokens(share=0.2)", "ClippedRatio(low=0.2, high=0.2"],
        "rlpt": ["TopK(k=16, from_reference=False, outside='refuse', within=None)", "TokenActions"],
        "ctpo": [
            "PrefixActions(mean=False)",
            "PositionClip(low=0.025, high=0.05, dual=0.05, power=0.5)",
            "TokenMean",
        ],
        "rl_mtp": [
            "TokenActions",
            "TokenMean",
            "HeadPolicyLoss(offsets=2, coef=1.0, low=0.2, high=0.28)",
        ],
        "nfpo": ["ForwardTraceActions(steps=3)", "ClippedRatio(low=0.2, high=0.2", "TokenMean"],
        "mpo_segments": [
            "SegmentActions(segmenter=DelimiterSegmenter(",
            "ratio='mean'",
            "SequenceMean",
            "FullVocabulary",
        ],
        "mpo_backbone": ["length=3", "FutureShare(share=0.2)", "FullVocabulary"],
        "mpo": [
            "BlockActions(weights=FutureShare(share=0.2), length=3",
            "source='mtp'",
            "HeadUpkeep(coef=0.1)",
            "SequenceMean",
        ],
        "mpo_dapo": ["source='mtp'", "TokenMean", "low=0.2, high=0.28"],
        "mpo_rlpt": [
            "source='mtp'",
            "TopK(k=16, from_reference=False, outside='refuse', within=None)",
        ],
        "mpo_backbone_rlpt": [
            "BlockActions(weights=FutureShare(share=0.2), length=3",
            "TopK(k=16, from_reference=False, outside='refuse', within=None)",
        ],
        "ppo": [
            "TokenActions",
            "GeneralizedAdvantage(gamma=1.0, lam=0.95, whiten=True, length=1)",
            "ClippedRatio(low=0.2, high=0.2",
            "TokenMean",
            "terms ValueLoss(coef=0.1, clip=0.2)",
        ],
        "espo": [
            "SequenceActions(mean=True, form='sequence')",
            "LeaveOneOut",
            "SequenceMean",
            "CoupledElbo(pairs=2, padding=True)",
            "estimator='k2', place='loss', level='sequence'",
        ],
        "bgpo": [
            "SequenceActions(mean=False, form='sequence')",
            "scale='std'",
            "LinearBound(limit=20.0)",
            "Elbo(samples=16, padding=False, stratified=True)",
            "terms none",
        ],
        "agrpo": [
            "TokenActions",
            "scale='none'",
            "low=0.2, high=0.2",
            "ConstantLength(length=1)",
            "Denoising(steps=24, stratified=True, importance='entropy')",
        ],
        "diffu_grpo": ["TokenActions", "TokenMean", "MeanField(prompt_share=0.15)", "low=0.5"],
        "coupled_grpo": [
            "LeaveOneOut",
            "CoupledTokens(least=0.2, most=0.8)",
            "estimator='k3', place='loss', level='token'",
        ],
        "mpo_ppo": [
            "source='mtp'",
            "GeneralizedAdvantage",
            "HeadUpkeep(coef=0.1)",
            "ValueLoss(coef=0.1, clip=0.2)",
        ],
    }
    for part in named.get(path.stem, []):
        assert part in said


@pytest.mark.parametrize("path", ALGORITHMS, ids=name_of)
def test_an_algorithm_names_the_overlays_without_which_it_is_refused(build, path):
    overlays = re.findall(r"-c (\w+)", path.read_text())
    assert all(recipes.find(overlay).parent.name == "model" for overlay in overlays)
    for count in range(len(overlays) + 1):
        model, _, _ = build(
            "-c", "base.yaml", "-c", path, *sum((["-c", o] for o in overlays[:count]), [])
        )
        with (
            contextlib.nullcontext()
            if count == len(overlays)
            else pytest.raises(UserError, match="needs? ")
        ):
            model.policy.check(model.objective.request)
