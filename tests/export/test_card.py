"""The model card states what is known of a run and claims nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml

from lightning_mpo.export import Origin, Sampling, export
from lightning_mpo.objective.supports import MinP, TopK
from tests.support.exports import PROMPTS, adapted

CONFIGURED = {
    "seed_everything": 3,
    "model": {
        "class_path": "lightning_mpo.modules.PolicyOptimization",
        "init_args": {
            "policy": {
                "class_path": "CausalPolicy",
                "init_args": {"source": "x", "critic": {"class_path": "ValueHead"}},
            },
            "objective": {
                "support": {
                    "class_path": "lightning_mpo.objective.supports.TopK",
                    "init_args": {"k": 8},
                },
                "actions": {"class_path": "lightning_mpo.objective.action_spaces.TokenActions"},
                "advantage": {"class_path": "GroupRelative", "init_args": {"scale": "std"}},
                "surrogate": {
                    "class_path": "ClippedRatio",
                    "init_args": {"low": 0.2, "high": 0.2, "dual": None},
                },
                "selection": {"class_path": "AllTokens"},
                "reduction": {"class_path": "SequenceMean"},
            },
            "temperature": 0.7,
        },
    },
    "data": {"class_path": "Svamp", "init_args": {"path": "/home/me/secret/SVAMP.json"}},
    "rollout": {
        "rewards": [{"class_path": "MathAnswer"}],
        "prompts": 8,
        "completions": 4,
        "max_new_tokens": 30,
    },
}
SUMMARY = {
    "initial": {"pass_at_1": 0.25, "pass_at_1_interval": [0.2, 0.3], "kl": 0.0},
    "final": {"pass_at_1": 0.5, "pass_at_1_interval": [0.45, 0.55], "kl": 0.02},
    "problems": 200,
}


def test_the_card_says_what_is_known_and_what_is_not(tiny_folder, tmp_path):
    origin = Origin(CONFIGURED, updates=40, rollouts=20, summary=SUMMARY)
    export(
        adapted(tiny_folder),
        tmp_path,
        "merged",
        PROMPTS,
        sampling=Sampling(0.7, 30, TopK(8)),
        origin=origin,
    )
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == Path(tiny_folder).name
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers"
    assert "rlpt" in front["tags"]
    for said in (
        "closest method file: rlpt",
        "paper: arXiv:2602.03195",
        "support.k = 8 (file: 16)",
        "rank 4, alpha 8, on all-linear",
        "temperature 0.7, at most 30 tokens",
        "rewards: `MathAnswer`",
        "20 of 8 prompts x 4 completions; 40 updates",
        "Svamp(path SVAMP.json)",
        "| pass@1 | 0.25 [0.200, 0.300] | 0.5 [0.450, 0.550] |",
        "On 200 held-out problems",
        "greedy texts are equal",
        "rounded to bfloat16",
        "## Not known",
    ):
        assert said in body, said
    assert "/home/me" not in body


def test_a_card_without_a_run_claims_nothing(tiny_policy, tmp_path):
    export(tiny_policy(), tmp_path, "full", PROMPTS, sampling=Sampling(support=MinP()))
    text = (tmp_path / "README.md").read_text()
    assert "method" not in text
    assert "the configuration of the run" in text
    assert "no evaluation was kept" in text
    assert "`MinP` support, which `generation_config.json` cannot say" in text
    assert "base_model" not in text
    assert not list(tmp_path.glob("*.yaml"))
