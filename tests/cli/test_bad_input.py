"""Whatever a user gets wrong ends in one line that says what to write instead, before a model is loaded.

python tests/cli/test_bad_input.py      prints the table of inputs and messages
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_mpo.objective.segmenters import Segmenter
from lightning_mpo.policies import CausalPolicy, TinyPolicy
from lightning_mpo.rewards.base import Reward

POLICY = "model.init_args.policy"
LORA = f"--{POLICY}.init_args.lora"
OBJECTIVE = "--model.init_args.objective"
BASE = """
seed_everything: 0
model:
  class_path: PolicyOptimization
  init_args:
    policy:
      class_path: TinyPolicy
      init_args: {hidden_size: 32, layers: 1, heads: 2}
    objective:
      support: FullVocabulary
      actions: TokenActions
      advantage: GroupRelative
      surrogate: ClippedRatio
      selection: AllTokens
      reduction: TokenMean
data:
  class_path: Arithmetic
  init_args: {digits: 1, train_problems: 12, held_out_problems: 4}
rollout: {rewards: [ExactAnswer], prompts: 2, completions: 2, max_new_tokens: 6}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 1
  limit_val_batches: 0
  default_root_dir: run
  logger: {class_path: CSVLogger, init_args: {save_dir: ., name: run, version: ""}}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - {class_path: ModelCheckpoint, init_args: {dirpath: run/checkpoints, save_last: true}}
"""


class Raises(Reward):
    def score(self, completions):
        return [1 / 0 for _ in completions]


class ReturnsNan(Reward):
    def score(self, completions):
        return [float("nan")] * len(completions)


class ReturnsTooFew(Reward):
    def score(self, completions):
        return [1.0]


class Jumps(Segmenter):
    def segment(self, rollout, entropy_BT, texts):
        return (torch.arange(rollout.response_mask_BT.shape[1]) % 2).expand(
            rollout.response_mask_BT.shape
        )


class ReturnsText(Reward):
    def score(self, completions):
        return ["good"] * len(completions)


@dataclass(frozen=True)
class Case:
    """A mistake.

    Args:
        said: what the message must name; `…` stands for anything.
        arguments: after `fit -c base.yaml`.
        files: written beforehand.
        verb: instead of `fit`.
        without: a section of the base that is left out.
        late: found only once the policy has sampled.
    """

    said: str
    arguments: Sequence[str] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    verb: str = "fit"
    without: str = ""
    late: bool = False


def jsonl(*lines: str) -> dict[str, str]:
    return {"rows.jsonl": "\n".join(lines)}


def segments(segmenter: str) -> str:
    options = f"{{class_path: SegmentActions, init_args: {{segmenter: {segmenter}}}}}"
    return f"model: {{init_args: {{objective: {{actions: {options}}}}}}}"


def blocks(block: str, policy: str = "{}") -> dict[str, str]:
    """Overlay: blocks with these options, and a policy with these."""
    actions = f"{{class_path: BlockActions, init_args: {block}}}"
    return {
        "o.yaml": f"model: {{init_args: {{policy: {{init_args: {policy}}}, objective: {{actions: {actions}}}}}}}"
    }


def penalty(options: str) -> dict[str, str]:
    """Overlay: an overlong penalty with these options."""
    return {
        "o.yaml": f"rollout: {{rewards: [ExactAnswer, {{class_path: OverlongPenalty, init_args: {options}}}]}}"
    }


def axis(text: str) -> dict[str, str]:
    """Overlay: axes of the objective."""
    return {"o.yaml": f"model: {{init_args: {{objective: {{{text}}}}}}}"}


def stage(name: str, options: str) -> dict[str, str]:
    """Overlay: a stage before reinforcement learning, in place of the model."""
    policy = "{class_path: TinyPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2, mtp: ParallelHeads}}"
    return {"o.yaml": f"model: {{class_path: {name}, init_args: {{policy: {policy}, {options}}}}}"}


def adapters(options: str) -> list[str]:
    """Arguments: a policy with adapters of these options."""
    return [f"--{POLICY}", "tests.cli.test_bad_input.Adapted", f"--{POLICY}.lora", options]


def heads_checkpoint(**description: object) -> bytes:
    """A checkpoint that says which multi-token heads it holds."""
    own = {
        "family": "parallel",
        "offsets": 2,
        "own_unembedding": False,
        "trunk": "llama",
        "hidden_size": 32,
        "vocabulary": 19,
    }
    file = io.BytesIO()
    torch.save({"state_dict": {}, "mtp": own | description}, file)
    return file.getvalue()


def malicious() -> bytes:
    """A checkpoint that leaves a mark, `executed`, when it is unpickled."""
    from tests.policies.test_checkpoints import Malicious

    file = io.BytesIO()
    torch.save({"state_dict": {}, "callbacks": Malicious()}, file)
    return file.getvalue()


OVERLAY = ["-c", "o.yaml"]
BARE = """
model: {class_path: PolicyOptimization, init_args: {policy: {class_path: TinyPolicy}}}
rollout: {rewards: [ExactAnswer]}
"""
HEADS = "{mtp: {class_path: ParallelHeads, init_args: {offsets: 2}}, checkpoint: heads.ckpt}"
MTP = "{length: 3, source: mtp}"
DATA = ["--data", "JsonLines", "--data.train", "rows.jsonl", "--data.chat_template", "false"]
ROW = '{"prompt": "1+1=", "target": "2"}'
CASES = {
    # --- modules of one's own
    "a reward in a module that is not here": Case(
        "`rollout.rewards`: no module `my_modul` for `my_modul.EndsWithTarget`; looked in …and among the packages",
        ["--rollout.rewards", "[my_modul.EndsWithTarget]"],
    ),
    "a class that the module does not have": Case(
        "`rollout.rewards`: no `ExactAnswr` in `lightning_mpo.rewards` (…rewards/__init__.py); did you mean `ExactAnswer`?",
        ["--rollout.rewards", "[lightning_mpo.rewards.ExactAnswr]"],
    ),
    "a module that imports what is not there": Case(
        "`data`: `module_with_a_missing_import.Data` cannot be imported: no module `nowhere_to_be_seen`",
        ["--data", "module_with_a_missing_import.Data"],
        {"module_with_a_missing_import.py": "import nowhere_to_be_seen"},
    ),
    "a surrogate in a module that is not here": Case(
        "`model.objective.surrogate`: no module `not_here` for `not_here.Bounded`",
        [f"{OBJECTIVE}.surrogate", "not_here.Bounded"],
    ),
    "a recipe of nearly that name": Case(
        "no configuration file or recipe 'grop'; did you mean `grpo`?", ["-c", "grop"]
    ),
    # --- blocks and their heads
    "block weights that do not sum to 1": Case(
        "the weights of `BlockActions` must sum to 1, got 1.5; set `ratio: joint`",
        OVERLAY,
        blocks(
            "{length: 2, weights: {class_path: ExplicitWeights, init_args: {values: [1.0, 0.5]}}}"
        ),
    ),
    "a block of no tokens": Case(
        "`BlockActions.length` must be at least 1, got 0", OVERLAY, blocks("{length: 0}")
    ),
    "blocks over heads that are not there": Case(
        "blocks of 3 tokens with `source: mtp` need 2 future offsets, but the policy has none; give `policy.mtp`",
        OVERLAY,
        blocks(MTP),
    ),
    "more offsets than heads": Case(
        "need 4 future offsets, but `policy.mtp` has 2",
        OVERLAY,
        blocks("{length: 5, source: mtp}", HEADS),
    ),
    "heads of another family": Case(
        "'heads.ckpt' holds multi-token heads with family 'medusa', `policy.mtp` has 'parallel'",
        OVERLAY,
        blocks(MTP, HEADS) | {"heads.ckpt": heads_checkpoint(family="medusa")},
    ),
    "heads of another trunk": Case(
        "'heads.ckpt' holds multi-token heads with trunk 'qwen2', `policy.mtp` has 'llama'",
        OVERLAY,
        blocks(MTP, HEADS) | {"heads.ckpt": heads_checkpoint(trunk="qwen2")},
    ),
    "heads of another width": Case(
        "with hidden_size 64, `policy.mtp` has 32",
        OVERLAY,
        blocks(MTP, HEADS) | {"heads.ckpt": heads_checkpoint(hidden_size=64)},
    ),
    # --- stages before
    **{
        f"warm-up of heads: {options}": Case(
            said, OVERLAY, stage("HeadWarmup", options), without="model"
        )
        for options, said in {
            "prompts: 0": "`HeadWarmup.prompts` must be at least 1, got 0",
            "completions: 0": "`HeadWarmup.completions` must be at least 1, got 0",
            "max_new_tokens: 0": "`HeadWarmup.max_new_tokens` must be at least 1, got 0",
            "passes: 0": "`HeadWarmup.passes` must be at least 1, got 0",
            "batches_per_epoch: 0": "`HeadWarmup.batches_per_epoch` must be at least 1, got 0",
            "temperature: 0.0": "`HeadWarmup.temperature` must be positive, got 0.0",
            "temperature: .nan": "`model.temperature` is .nan, which is no number",
            "prompts: 3, completions: 1, passes: 2": "`HeadWarmup.passes` (2) must divide the 3 samples of a pool on each "
            "process (3 prompts x 1 completions)",
            "solutions: true, prompts: 2, completions: 4, passes: 8": "`HeadWarmup.passes` (8) must divide the 2 samples "
            "of a pool on each process (2 prompts x one solution each)",
        }.items()
    },
    "micro-batches of no rows": Case(
        "`SupervisedWarmup.batch_size` must be at least 1, got 0",
        OVERLAY,
        stage("SupervisedWarmup", "batch_size: 0"),
        without="model",
    ),
    "epochs of no micro-batches": Case(
        "`SupervisedWarmup.batches_per_epoch` must be at least 1, got 0",
        OVERLAY,
        stage("SupervisedWarmup", "batches_per_epoch: 0"),
        without="model",
    ),
    # --- names and types
    "unknown section": Case("`rolout`…did you mean `rollout`", ["--rolout", "3"]),
    "unknown key on the command line": Case(
        "`rollout.promts`…did you mean `rollout.prompts`", ["--rollout.promts", "3"]
    ),
    "unknown key in a file": Case(
        "`rollout.promts`…did you mean `rollout.prompts`",
        ["-c", "more.yaml"],
        {"more.yaml": "rollout: {promts: 3}"},
    ),
    "unknown trainer key": Case(
        "`trainer.max_step`…did you mean",
        ["-c", "more.yaml"],
        {"more.yaml": "trainer: {max_step: 3}"},
    ),
    "unknown argument of the model": Case(
        "`PolicyOptimization` has no argument `temprature`; did you mean `temperature`",
        ["-c", "more.yaml"],
        {"more.yaml": "model: {init_args: {temprature: 3}}"},
    ),
    "unknown argument of a class": Case(
        "`ClippedRatio` has no argument `lo`; did you mean `low`",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {surrogate: {class_path: ClippedRatio, init_args: {lo: 0.1}}}}}"
        },
    ),
    "unknown argument of a callback": Case(
        "`Watchdog` has no argument `patients`; did you mean `patience`",
        ["-c", "more.yaml"],
        {"more.yaml": "trainer: {callbacks: [{class_path: Watchdog, init_args: {patients: 3}}]}"},
    ),
    "unknown class": Case(
        "no class `ClipedRatio`; did you mean `ClippedRatio`",
        [f"{OBJECTIVE}.surrogate", "ClipedRatio"],
    ),
    "unknown class in a file": Case(
        "no class `SequenceMeans`; did you mean `SequenceMean`",
        ["-c", "more.yaml"],
        {"more.yaml": "model: {init_args: {objective: {reduction: SequenceMeans}}}"},
    ),
    "unknown reward": Case(
        "no class `ExactAnser`; did you mean `ExactAnswer`", ["--rollout.rewards", "[ExactAnser]"]
    ),
    "unknown callback": Case(
        "no class `Watchdogs`; did you mean `Watchdog`", ["--trainer.callbacks", "[Watchdogs]"]
    ),
    "unknown data": Case(
        "no class `Arithmetics`; did you mean `Arithmetic`", ["--data", "Arithmetics"]
    ),
    "unknown model": Case(
        "no class `PolicyOptimisation`; did you mean `PolicyOptimization`",
        ["--model", "PolicyOptimisation"],
    ),
    "class of another axis": Case(
        "`model.objective.support`: `TokenMean` is a `Reduction`",
        [f"{OBJECTIVE}.support", "TokenMean"],
    ),
    "wrong type": Case("rollout.prompts…int…many", ["--rollout.prompts", "many"]),
    "wrong type in a class": Case(
        "high…float…wide",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {surrogate: {class_path: ClippedRatio, init_args: {high: wide}}}}}"
        },
    ),
    "a choice that is none": Case(
        "scale…std…none…median",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {advantage: {class_path: GroupRelative, init_args: {scale: median}}}}}"
        },
    ),
    "missing section": Case("`data` is required", without="data"),
    "missing model": Case("`model` is required", without="model"),
    "missing rewards": Case("`rollout.rewards` is empty", without="rollout"),
    "missing argument of a class": Case(
        "`model.policy`: `CausalPolicy` needs the argument `source`",
        [f"--{POLICY}", "CausalPolicy"],
    ),
    "no objective": Case(
        "needs the argument `objective.support`; an algorithm sets it: add one, such as `-c grpo`",
        ["--data", "Arithmetic"],
        {"base.yaml": BARE},
    ),
    "a logger whose package is missing": Case(
        "the package `cloud` is not installed, and the configuration needs it: pip install 'cloud>=0.12'",
        ["--trainer.logger", "cloud_logger.CloudLogger"],
        {
            "cloud_logger.py": "from lightning.pytorch.loggers import CSVLogger\n"
            "class CloudLogger(CSVLogger):\n"
            "    def __init__(self):\n"
            "        raise ModuleNotFoundError(\"Requirement 'cloud>=0.12' not met. HINT: Try running `pip install`\")\n"
        },
    ),
    "a recipe without -c": Case("`quickstart` stands alone…`-c quickstart`", ["quickstart"]),
    "one reward, and no list": Case(
        "`rollout.rewards`: must be a list, got my_rewards.f; write '[my_rewards.f]'",
        ["--rollout.rewards", "my_rewards.f"],
    ),
    "a name of peft": Case(
        "`model.policy.lora`: `Lora` has no argument `target_modules`; it is `targets`",
        [
            f"--{POLICY}",
            "CausalPolicy",
            f"--{POLICY}.init_args.source",
            "x",
            LORA,
            "{target_modules: [q_proj]}",
        ],
    ),
    "an option of adapters that is none": Case(
        "`Lora` has no argument `scale`; it takes rank, alpha, targets, dropout",
        [
            f"--{POLICY}",
            "CausalPolicy",
            f"--{POLICY}.init_args.source",
            "x",
            f"--{POLICY}.init_args.lora",
            "{scale: 2}",
        ],
    ),
    "a shortened name": Case(
        "no option `rollout.completion`; did you mean `rollout.completions`?",
        ["--rollout.completion", "8"],
    ),
    "a name of TRL": Case(
        "no option `rollout.num_generations`: completions per prompt are `rollout.completions`",
        ["--rollout.num_generations", "8"],
    ),
    "a name of TRL in a file": Case(
        "no option `rollout.max_completion_length`: it is `rollout.max_new_tokens`",
        OVERLAY,
        {"o.yaml": "rollout: {max_completion_length: 8}"},
    ),
    "a verb that is none": Case("no verb 'fitt'; did you mean `fit`", verb="fitt"),
    # --- files
    "missing file": Case("no configuration file 'missing.yaml'", ["-c", "missing.yaml"]),
    "missing algorithm file": Case(
        "no configuration file 'configs/algorithm/grop.yaml'; did you mean `configs/algorithm/grpo.yaml`",
        ["-c", "configs/algorithm/grop.yaml"],
        {"configs/algorithm/grpo.yaml": "{}"},
    ),
    "missing included file": Case(
        "no configuration file 'other.yaml'",
        ["-c", "more.yaml"],
        {"more.yaml": "include: [other.yaml]"},
    ),
    "files that include each other": Case(
        "include", ["-c", "a.yaml"], {"a.yaml": "include: [b.yaml]", "b.yaml": "include: [a.yaml]"}
    ),
    "no YAML": Case(
        "bad.yaml is no valid YAML", ["-c", "bad.yaml"], {"bad.yaml": "rollout: {prompts: 3"}
    ),
    "a list for a file": Case("must hold a mapping", ["-c", "bad.yaml"], {"bad.yaml": "- 1\n- 2"}),
    "an option without its file": Case("-c", ["-c"]),
    "unknown interpolation": Case(
        "trainer.max_stepz",
        ["-c", "more.yaml"],
        {"more.yaml": 'rollout: {prompts: "${trainer.max_stepz}"}'},
    ),
    # --- data
    "missing data file": Case("there is no file rows.jsonl", DATA),
    "a row without the target": Case(
        "line 2 of rows.jsonl has no 'target'", DATA, jsonl(ROW, '{"prompt": "1+2="}')
    ),
    "a row that is not JSON": Case("line 2 of rows.jsonl is not JSON", DATA, jsonl(ROW, "{")),
    "no rows": Case("no training rows", DATA, jsonl("")),
    "rows in Latin-1": Case(
        "line 1 of rows.jsonl is not JSON in UTF-8: byte 0xe9",
        DATA,
        {"rows.jsonl": b'{"prompt": "caf\xe9"}'},
    ),
    "rows in Parquet": Case(
        "rows.jsonl is Parquet, not JSON lines; convert it", DATA, {"rows.jsonl": b"PAR1"}
    ),
    "a target of null": Case(
        "line 1 of rows.jsonl: 'target' is null", DATA, jsonl('{"prompt": "1", "target": null}')
    ),
    "an empty prompt": Case(
        "line 2 of rows.jsonl: 'prompt' is empty",
        DATA,
        jsonl(ROW, '{"prompt": " ", "target": "2"}'),
    ),
    "characters that the tokenizer does not know": Case(
        "'1Ä=' (line 2 of rows.jsonl) holds characters that the tokenizer does not know, such as 'Ä'",
        DATA,
        jsonl(ROW, '{"prompt": "1Ä=", "target": "2"}'),
    ),
    "a chat without a template": Case(
        "'1+1=' (line 2 of rows.jsonl) is a chat, but the tokenizer of the policy has no chat template; take a model that",
        DATA,
        jsonl(ROW, '{"messages": [{"role": "user", "content": "1+1="}], "target": "2"}'),
    ),
    "a chat without a template, which is applied": Case(
        "'1+1=' (line 1 of rows.jsonl) is a chat, but the tokenizer of the policy has no chat template",
        [*DATA[:-1], "true", "--data.system", "x"],
        jsonl('{"messages": [{"role": "user", "content": "1+1="}], "target": "2"}', ROW),
    ),
    "text without a template, which is applied": Case(
        "the tokenizer of the policy has no chat template; set `data.chat_template: false` for prompts that are text",
        [*DATA[:-1], "true"],
        jsonl(ROW, ROW.replace("1+1", "1+2")),
    ),
    "a system message without a template": Case(
        "`data.system` is for a chat template",
        [*DATA, "--data.system", "x"],
        jsonl(ROW, ROW.replace("1+1", "1+2")),
    ),
    "an unknown way with overlong rows": Case(
        "data", [*DATA, "--data.overlong", "cut"], jsonl(ROW)
    ),
    "a prompt over the limit": Case(
        "prompt '1+1=1+1=…over `data.max_prompt_tokens` (16)",
        [*DATA, "--data.validation_share", "0", "--data.max_prompt_tokens", "16"],
        jsonl('{"prompt": "1+1=1+1=1+1=1+1=1+1=", "target": "2"}'),
    ),
    "a chat template that is none": Case(
        "`data.chat_template: false`", ["--data.chat_template", "true"]
    ),
    "too few problems": Case("`Arithmetic.digits` = 1", ["--data.train_problems", "99999"]),
    "more digits than there are": Case("`Arithmetic.digits`", ["--data.digits", "0"]),
    # --- algorithm
    "K over the vocabulary": Case(
        "`TopK.k` must be at most the vocabulary size 19, got 64",
        [f"{OBJECTIVE}.support", "TopK", f"{OBJECTIVE}.support.k", "64"],
    ),
    "K of nothing": Case(
        "`TopK.k` must be at least 1, got 0",
        [f"{OBJECTIVE}.support", "TopK", f"{OBJECTIVE}.support.k", "0"],
    ),
    "k1 in the loss": Case(
        "`KLPenalty` with estimator k1 in the loss",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {kl: {controller: ConstantCoefficient, estimator: k1, place: loss}}}}"
        },
    ),
    "one completion": Case(
        "`rollout.completions` must be at least 2, got 1", ["--rollout.completions", "1"]
    ),
    "mini-batches that do not divide": Case(
        "`rollout.minibatches` (3) must divide the 4 sequences", ["--rollout.minibatches", "3"]
    ),
    "too many micro-batches": Case(
        "`trainer.accumulate_grad_batches` = 8", ["--trainer.accumulate_grad_batches", "8"]
    ),
    "a limit within a rollout": Case(
        "`trainer.limit_train_batches` (3) must be a multiple",
        ["--trainer.limit_train_batches", "3", "--rollout.minibatches", "2"],
    ),
    "no prompts": Case("`rollout.prompts` must be at least 1", ["--rollout.prompts", "0"]),
    "no new tokens": Case(
        "`rollout.max_new_tokens` must be at least 1", ["--rollout.max_new_tokens", "0"]
    ),
    "no completions of validation prompts": Case(
        "`rollout.validation_completions` must be at least 1, got 0",
        ["--rollout.validation_completions", "0"],
    ),
    "a temperature of zero": Case(
        "`model.temperature` must be positive", ["--model.temperature", "0"]
    ),
    "a clip of zero": Case(
        "`ClippedRatio.low` must be in (0, 1), got 0", [f"{OBJECTIVE}.surrogate.low", "0"]
    ),
    "half-precision weights": Case("`bf16-mixed`", ["--trainer.precision", "bf16-true"]),
    # --- tokens that learn
    "a sample that cannot be unbiased": Case(
        "`SampledTokens.unbiased` needs `cap: null`",
        OVERLAY,
        axis("selection: {class_path: SampledTokens, init_args: {unbiased: true}}"),
    ),
    "weighted tokens over sequences": Case(
        "`SampledTokens` weighs single tokens, which has no meaning over `SequenceActions`",
        OVERLAY,
        axis(
            "actions: SequenceActions, selection: {class_path: SampledTokens, init_args: {cap: null, unbiased: true}}"
        ),
    ),
    "a prefix tree over chosen tokens": Case(
        "`PrefixTree` chooses its tokens itself; use `selection: AllTokens`, not `HighEntropyTokens`",
        OVERLAY,
        axis("advantage: PrefixTree, selection: HighEntropyTokens"),
    ),
    "a weight penalty of zero": Case(
        "`WeightPenalty.coef` must be positive, got 0.0", OVERLAY, axis("penalty: {coef: 0.0}")
    ),
    "copies that an advantage would count": Case(
        "`PrefixReplay` copies the first tokens of other completions, which `GroupRelative` would count again",
        ["--rollout.replay", "PrefixReplay"],
    ),
    "branches of completions that do not count": Case(
        "`rollout.mask_truncated` takes completions away that `PrefixTree` counted at its branches",
        [*OVERLAY, "--rollout.mask_truncated", "true"],
        axis("advantage: PrefixTree"),
    ),
    "a replay of everything": Case(
        "`PrefixReplay.share` must be in (0, 1), got 1.0",
        OVERLAY,
        {"o.yaml": "rollout: {replay: {class_path: PrefixReplay, init_args: {share: 1.0}}}"},
    ),
    # --- critic
    "a critic's loss without a critic": Case(
        "`objective.critic` needs `policy.critic`: give `ValueHead`, say",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {advantage: GeneralizedAdvantage, critic: {coef: 0.1, clip: 0.2}}}}"
        },
    ),
    "a critic's advantage without its loss": Case(
        "`GeneralizedAdvantage` takes a critic's values; give `critic: {coef: 0.1, clip: 0.2}`",
        [f"{OBJECTIVE}.advantage", "GeneralizedAdvantage"],
    ),
    "a value clip of zero": Case(
        "`critic.clip` must be positive, got 0.0; null clips nothing",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {advantage: GeneralizedAdvantage, critic: {coef: 0.1, clip: 0.0}}}}"
        },
    ),
    "unknown critic": Case(
        "no class `ValueHeads`; did you mean `ValueHead`", [f"--{POLICY}.critic", "ValueHeads"]
    ),
    # --- dynamic sampling
    "no rounds": Case(
        "`DynamicSampling.rounds` must be at least 1, got 0",
        ["-c", "more.yaml"],
        {"more.yaml": "rollout: {dynamic: {class_path: DynamicSampling, init_args: {rounds: 0}}}"},
    ),
    "dynamic sampling without accuracy": Case(
        "`rollout.dynamic` needs a reward that says what is right…got Finished…`ExactAnswer`…`rollout.dynamic: null`",
        ["--rollout.dynamic", "DynamicSampling", "--rollout.rewards", "[Finished]"],
    ),
    "dynamic sampling of single completions": Case(
        "`rollout.dynamic`…`rollout.completions` must be at least 2, got 1",
        [
            *("--rollout.dynamic", "DynamicSampling", "--rollout.completions", "1"),
            *(f"{OBJECTIVE}.advantage", "ReturnToGo"),
        ],
    ),
    "a misspelt argument of dynamic sampling": Case(
        "`DynamicSampling` has no argument `round`; did you mean `rounds`",
        ["-c", "more.yaml"],
        {"more.yaml": "rollout: {dynamic: {class_path: DynamicSampling, init_args: {round: 3}}}"},
    ),
    "a misspelt dynamic sampling": Case(
        "no class `DynamicSample`; did you mean `DynamicSampling`",
        ["--rollout.dynamic", "DynamicSample"],
    ),
    "something else for dynamic sampling": Case(
        "`TokenMean` is a `Reduction`, which does not belong here",
        ["--rollout.dynamic", "TokenMean"],
    ),
    "truncated responses by a word": Case(
        "mask_truncated…bool…often", ["--rollout.mask_truncated", "often"]
    ),
    # --- segmenters
    "delimiters that no token contains": Case(
        "no token of the vocabulary contains…`DelimiterSegmenter.delimiters` ('€')",
        ["-c", "more.yaml"],
        {"more.yaml": segments("{class_path: DelimiterSegmenter, init_args: {delimiters: [€]}}")},
    ),
    "two ways to cut by entropy": Case(
        "`EntropySegmenter` needs either `threshold`",
        ["-c", "more.yaml"],
        {
            "more.yaml": segments(
                "{class_path: EntropySegmenter, init_args: {threshold: 1, quantile: 0.5}}"
            )
        },
    ),
    "a segmenter whose blocks are no neighbours": Case(
        "`Jumps.segment` gives token 2 of row 0 the number 0…must be neighbours",
        ["-c", "more.yaml"],
        {"more.yaml": segments("tests.cli.test_bad_input.Jumps")},
        late=True,
    ),
    # --- rewards
    "a module of rewards that exits": Case(
        "module `exits` cannot be imported: it calls `sys.exit`",
        ["--rollout.rewards", "[exits.f]"],
        {"exits.py": "import sys\nsys.exit(3)\n"},
    ),
    "a module of a class that exits": Case(
        "module `exits_too` cannot be imported: it calls `sys.exit`",
        ["--rollout.rewards", "[{class_path: exits_too.Mine}]"],
        {"exits_too.py": "raise SystemExit\n"},
    ),
    "a file of rewards that exits": Case(
        "reward 'exits.py:f' cannot be imported: SystemExit: 3",
        ["--rollout.rewards", "['exits.py:f']"],
        {"exits.py": "import sys\nsys.exit(3)\n"},
    ),
    "a file of rewards that is not there": Case(
        "there is no file 'none.py' with rewards", ["--rollout.rewards", "['none.py:f']"]
    ),
    "a file without that reward": Case(
        "reward 'some.py:g': some.py has no `g`; it has f",
        ["--rollout.rewards", "['some.py:g']"],
        {"some.py": "def f(completions): return [1.0]\n"},
    ),
    "a function that takes what is no column": Case(
        "reward `f` takes `answers`, which it is not given",
        ["--rollout.rewards", "['columns.py:f']"],
        {"columns.py": "def f(completions, answers): return [1.0]\n"},
    ),
    "a function within a class of rewards that exits": Case(
        "reward 'exits_deep.f' cannot be imported: SystemExit",
        [
            "--rollout.rewards",
            "[{class_path: FunctionReward, init_args: {function: exits_deep.f}}]",
        ],
        {"exits_deep.py": "raise SystemExit\n"},
    ),
    "a reward of infinite weight": Case(
        "`MathAnswer.weight` must be",
        ["--rollout.rewards", "[{class_path: MathAnswer, init_args: {weight: .inf}}]"],
    ),
    "no time for rewards": Case(
        "`rollout.reward_seconds` must be positive", ["--rollout.reward_seconds", "0"]
    ),
    "a reward that raises": Case(
        "reward `Raises` raised ZeroDivisionError",
        ["--rollout.rewards", "[tests.cli.test_bad_input.Raises]"],
        late=True,
    ),
    "a reward of nan": Case(
        "reward `ReturnsNan` returned nan",
        ["--rollout.rewards", "[tests.cli.test_bad_input.ReturnsNan]"],
        late=True,
    ),
    "a reward of a wrong count": Case(
        "reward `ReturnsTooFew` must return one number per completion (4), got 1",
        ["--rollout.rewards", "[tests.cli.test_bad_input.ReturnsTooFew]"],
        late=True,
    ),
    "a reward of text": Case(
        "reward `ReturnsText` returned 'good'",
        ["--rollout.rewards", "[tests.cli.test_bad_input.ReturnsText]"],
        late=True,
    ),
    "a penalty over no tokens": Case(
        "`OverlongPenalty.buffer` must be between 1 and `limit` = 6, got 0",
        OVERLAY,
        penalty("{limit: 6, buffer: 0}"),
    ),
    "a penalty over more than the limit": Case(
        "`OverlongPenalty.buffer` must be between 1 and `limit` = 6, got 7",
        OVERLAY,
        penalty("{limit: 6, buffer: 7}"),
    ),
    "a penalty at no limit": Case(
        "`OverlongPenalty.limit` must be at least 1, got 0",
        OVERLAY,
        penalty("{limit: 0, buffer: 0}"),
    ),
    "a penalty that is a bonus": Case(
        "`OverlongPenalty.factor` must be positive, got -1.0: it is taken off",
        OVERLAY,
        penalty("{limit: 6, buffer: 2, factor: -1}"),
    ),
    "a penalty that no response reaches": Case(
        "`OverlongPenalty` begins after 8 tokens (`limit - buffer`), and no response is longer than "
        "`rollout.max_new_tokens` = 6; give `limit: ${rollout.max_new_tokens}`",
        OVERLAY,
        penalty("{limit: 10, buffer: 2}"),
    ),
    "a penalty without its limit": Case(
        "`OverlongPenalty` needs the argument `limit`", OVERLAY, penalty("{buffer: 2}")
    ),
    # --- checkpoints and models
    "a missing checkpoint of the policy": Case(
        "`policy.checkpoint` 'x.ckpt' does not exist", [f"--{POLICY}.checkpoint", "x.ckpt"]
    ),
    "a checkpoint of the policy that is none": Case(
        "`policy.checkpoint` 'x.ckpt' cannot be read",
        [f"--{POLICY}.checkpoint", "x.ckpt"],
        {"x.ckpt": b"garbage"},
    ),
    "a checkpoint to resume that would run code": Case(
        "`ckpt_path` 'x.ckpt' cannot be read as a Lightning checkpoint: it asks to run",
        ["--ckpt_path", "x.ckpt"],
        {"x.ckpt": malicious()},
    ),
    "code in checkpoints let in": Case(
        "`weights_only: false` would run code", ["--weights_only", "false"]
    ),
    "a missing checkpoint to resume": Case("`ckpt_path`…'x.ckpt'", ["--ckpt_path", "x.ckpt"]),
    "a checkpoint to resume that is none": Case(
        "`ckpt_path`…'x.ckpt'", ["--ckpt_path", "x.ckpt"], {"x.ckpt": b"garbage"}
    ),
    "adapters for layers that are none": Case(
        "`lora.targets` names no linear layer: ['query']; there are ['down_proj',",
        adapters("{targets: [query]}"),
    ),
    "adapters for a layer that is none": Case(
        "`lora.targets` names no linear layer: ['query']; there are ['down_proj',",
        adapters("{targets: query}"),
    ),
    "adapters for no layers": Case(
        "`lora.targets` is empty: name linear layers, or give `all-linear`",
        adapters("{targets: []}"),
    ),
    "adapters of no rank": Case("`lora.rank` must be at least 1, got 0", adapters("{rank: 0}")),
    "adapters that add nothing": Case(
        "`lora.alpha` must be positive, got 0: adapters would learn nothing", adapters("{alpha: 0}")
    ),
    "adapters that drop more than all": Case(
        "`lora.dropout` must be in [0, 1), got 2.0", adapters("{dropout: 2.0}")
    ),
    "heads that do not divide the width": Case(
        "`TinyPolicy.hidden_size` must be a multiple of 2 x `heads` = 6, as a head's width is even, got 16",
        [f"--{POLICY}.hidden_size", "16", f"--{POLICY}.heads", "3"],
    ),
    "heads of an odd width": Case(
        "`TinyPolicy.hidden_size` must be a multiple of 2 x `heads` = 4",
        [f"--{POLICY}.hidden_size", "6"],
    ),
    **{
        f"a model of no {name}": Case(
            f"`TinyPolicy.{name}` must be at least 1, got 0", [f"--{POLICY}.{name}", "0"]
        )
        for name in ("hidden_size", "layers", "heads", "intermediate_size", "max_length")
    },
    "a model that is nowhere": Case(
        "/no/such/model", [f"--{POLICY}", "CausalPolicy", f"--{POLICY}.source", "/no/such/model"]
    ),
}


class Adapted(TinyPolicy):
    """A tiny policy that takes adapters."""

    def __init__(self, lora: dict | None = None) -> None:
        from lightning_mpo.policies import Lora

        super().__init__(hidden_size=32, layers=1, heads=2)
        self.lora = Lora(**(lora or {}))


@dataclass
class Outcome:
    code: int | str
    stderr: str
    loaded: bool
    left: list[str]


def run_case(case: Case, folder: Path) -> Outcome:
    """Run a case in this process; what it raises instead of returning a code is told by name."""
    from lightning_mpo.__main__ import main as command

    base = yaml.safe_load(BASE)
    base.pop(case.without, None)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    loads: list[type] = []
    saved = {owner: owner.load_network for owner in (CausalPolicy, TinyPolicy)}

    def spy(owner):
        return lambda self: (loads.append(owner), saved[owner](self))[1]

    argv, path, here, stderr = sys.argv, list(sys.path), os.getcwd(), io.StringIO()
    try:
        for owner in saved:
            owner.load_network = spy(owner)
        os.chdir(folder)
        sys.argv = ["lightning-mpo", case.verb, "-c", "base.yaml", *case.arguments]
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            code: int | str = command()
    except BaseException as error:
        code = f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        os.chdir(here)
        sys.argv, sys.path[:] = argv, path
        for owner, method in saved.items():
            owner.load_network = method
    known = {"base.yaml", "__pycache__", *(name.split("/")[0] for name in case.files)}
    left = sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and str(p.relative_to(folder)).split("/")[0] not in known
    )
    return Outcome(code, stderr.getvalue(), bool(loads), left)


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    case = CASES[name]
    outcome = run_case(case, tmp_path)
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    line = lines[-1]
    assert [text.startswith("lightning-mpo: ") for text in lines].count(True) == 1
    assert line.startswith("lightning-mpo: ")
    assert case.late or len(lines) == 1, "a late mistake may follow warnings"
    assert len(line) < 450
    position = 0
    for part in case.said.split("…"):
        assert part in line[position:], f"{part!r} is not said in: {line}"
        position = line.index(part, position)
    assert "Traceback" not in outcome.stderr
    assert outcome.loaded == case.late, (
        "a model was loaded before the mistake was told" if outcome.loaded else "sampled"
    )
    assert not [path for path in outcome.left if path.endswith(".ckpt")], (
        "a checkpoint of a run that never trained"
    )
    if not case.late:
        assert outcome.left == [], "a run folder of a run that never began"


def main() -> None:
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_case(case, Path(folder))
        said = outcome.stderr.strip() if outcome.code == 2 else f"!! {outcome.code}"
        print(
            f"{name:42} | {'loaded' if outcome.loaded else '      '} | {' '.join(outcome.left)[:60]} | {said}"
        )


if __name__ == "__main__":
    main()
