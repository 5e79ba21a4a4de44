"""A compact table of command lines that make no sense: each ends in one line that names the cause."""

from __future__ import annotations

import pytest

from lightning_mpo.__main__ import main
from tests.support.configurations import BASE
from tests.support.mistakes import Case, run_case

TRAINER = {
    "accelerator=foo": "invalid accelerator name",
    "devices=x": "`trainer.devices` must be a number",
    "strategy=foo": "invalid strategy name",
    "strategy=ddp_spawn": "`trainer.strategy: ddp_spawn` copies this process",
    "max_steps=-5": "`trainer.max_steps` must be at least -1, got -5",
    "max_steps=0": "`trainer.max_steps: 0` trains nothing",
    "max_steps=1e30": "`trainer.max_steps`: must be int, got 1e+30",
    "max_epochs=x": "`trainer.max_epochs`: must be int or null, got x",
    "max_time=soon": "`Timer(duration='soon')` is not a valid duration",
    "max_time=00:00:00:00": "`trainer.max_time` must be positive, got '00:00:00:00'",
    "max_time={seconds: -1}": "`trainer.max_time` must be positive, got {'seconds': -1}",
    "val_check_interval=-1": "`trainer.val_check_interval` must be at least 1",
    "gradient_clip_val=-1": "`trainer.gradient_clip_val` must not be negative, got -1",
    "gradient_clip_val=.nan": "`trainer.gradient_clip_val` is .nan",
    "gradient_clip_algorithm=foo": "`trainer.gradient_clip_algorithm` must be 'norm', 'value'",
    "accumulate_grad_batches=0": "`trainer.accumulate_grad_batches` must be at least 1, got 0",
    "num_nodes=0": "`trainer.num_nodes` must be at least 1",
    "barebones=true": "barebones",
    "precision=64-true": "`trainer.precision: 64-true` is not supported",
    "logger=pytorch_lightning.loggers.CSVLogger": "write lightning.pytorch in place of pytorch_lightning",
    "callbacks=[os.path.join]": "os.path.join is not a subclass of `Callback`",
    "callbacks=[BatchSizeFinder]": "`BatchSizeFinder` is not supported",
    "callbacks=[Timer]": "write it out, such as `interval: step`",
    "profiler=foo": "profiler",
    "num_nodes=2": "needs a launcher that starts a process on each node",
    "callbacks=[BackboneFinetuning]": "`BackboneFinetuning` is not supported: a policy has no `backbone`",
    "gpus=2": "no option `trainer.gpus`: it is `trainer.devices`",
}
OTHERS = {
    "--ckpt_path=best": "`ckpt_path` must be `last` or a checkpoint file, got 'best'",
    "--ckpt_path=": "`ckpt_path` must be `last`",
    "--ckpt_path=.": "`ckpt_path` must be `last`",
    "--ckpt_path=/": "`ckpt_path` must be `last`",
    "--rollout.top_p=0.9": "class_path: Nucleus",
    "--rollout.top_k=5": "class_path: TopK",
    "--rollout.temperature=1": "it is `model.temperature`",
    "--rollout.stop=x": "`rollout.stop`: must be a list or null, got x",
    "--rollout.num_generations=4": "`rollout.completions`",
    "--rollout.max_completion_length=4": "it is `rollout.max_new_tokens`",
    "--beta=0.1": "`KLPenalty` in `objective.terms`",
    "--learning_rate=1": "`model.optimizer",
    "--per_device_train_batch_size=1": "`rollout.prompts` x `rollout.completions`",
    "--rollout.prompts=1000000000": "`rollout.prompts` must be at most 10,000,000",
    "--rollout.max_new_tokens=1000000000": "`rollout.max_new_tokens` must be at most 10,000,000",
    "--seed_everything=x": "`seed_everything`: must be bool or int, got x",
}
FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "must hold a mapping of options, got nothing"),
    "text": ("hello", "must hold a mapping of options, got str"),
    "two documents": ("a: 1\n---\nb: 2\n", "expected a single document"),
    "tabs": ("trainer:\n\tmax_steps: 3\n", "not with tabs"),
    "a key twice": (
        "trainer:\n  max_steps: 3\n  max_steps: 4\n",
        "o.yaml gives `max_steps` twice, in lines 2 and 3",
    ),
    "a section twice": (
        "trainer: {max_steps: 3}\ntrainer: {max_epochs: 1}\n",
        "gives `trainer` twice, in lines 1 and 2",
    ),
    "Latin-1": (b"trainer: {default_root_dir: caf\xe9}", "is not UTF-8 text (byte 31)"),
    "UTF-16": ("trainer: {max_steps: 1}".encode("utf-16"), "is not UTF-8 text"),
    "too large": (b"x: " + b"a" * 2_000_000, "2,000,003 bytes"),
    "deep": ("x: " + "[" * 3000 + "]" * 3000, "is not valid YAML"),
    "a number for a name": ("3: 4", "the key 3, which is not text"),
    "a list for a section": ("trainer: []", "`trainer` must be a mapping of options, got []"),
    "a number for a section": ("rollout: 3", "`rollout` must be a mapping of options, got 3"),
    "a word for a section": ("trainer: fast", "`trainer`: must be a mapping of options, got fast"),
    "a word for the algorithm": (
        "model: {init_args: {objective: grpo}}",
        "`model.objective`: must be a mapping of options, got grpo",
    ),
    "an axis that is none": (
        "model: {init_args: {objective: {surogate: ClippedRatio}}}",
        "`objective` has no option `surogate`; did you mean `surrogate`",
    ),
    "a negative learning rate": (
        "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: -1.0e-3}}}}",
        "`model.optimizer`: Invalid learning rate: -0.001",
    ),
    "a function for a scheduler": (
        "model: {init_args: {scheduler: {class_path: transformers.get_cosine_schedule_with_warmup, "
        "init_args: {num_warmup_steps: 1, num_training_steps: 4}}}}",
        "`model.scheduler`: `get_cosine_schedule_with_warmup` is a function",
    ),
    "a schedule that ends early": (
        "{model: {init_args: {scheduler: {class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 0.1, "
        "total_steps: 2}}}}, trainer: {max_steps: 4}}",
        "ends after `total_steps` = 2 updates, and `trainer.max_steps` is 4",
    ),
    "a schedule that waits for a metric": (
        "model: {init_args: {scheduler: {class_path: lightning.pytorch.cli.ReduceLROnPlateau, "
        "init_args: {monitor: val/reward}}}}",
        "`model.scheduler: ReduceLROnPlateau` waits for a metric",
    ),
    "the worst checkpoint": (
        "trainer: {limit_val_batches: 1, callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: run/best, "
        "monitor: val/pass_at_1}}]}",
        "`ModelCheckpoint` watches `val/pass_at_1` with `mode: min` and would keep the worst",
    ),
    "a metric that is never logged": (
        "trainer: {limit_val_batches: 1, callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_reward, "
        "mode: max}}]}",
        "`EarlyStopping` watches `val_reward`, which no PolicyOptimization logs; did you mean `val/reward`?",
    ),
    "pruning": (
        "trainer: {callbacks: [{class_path: ModelPruning, init_args: {pruning_fn: l1_unstructured}}]}",
        "`ModelPruning` is not supported: sampler and trainer would use different weights",
    ),
    "an optimizer of matrices": (
        "model: {init_args: {optimizer: {class_path: torch.optim.Muon, init_args: {lr: 0.1}}}}",
        "`model.optimizer` takes no weights of one dimension, and norms have such: Muon only supports 2D",
    ),
    "peft's names": (
        "model: {init_args: {policy: {class_path: CausalPolicy, init_args: {source: x, lora: {r: 4}}}}}",
        "`model.policy.lora`: `Lora` has no argument `r`; it is `rank`",
    ),
    "inherited arguments": (
        "data: {class_path: JsonLines, init_args: {train: x, instructon: y}}",
        "`JsonLines` has no argument `instructon`; did you mean `instruction`",
    ),
}
CASES = {
    **{f"trainer.{key}": Case(said, [f"--trainer.{key}"]) for key, said in TRAINER.items()},
    **{key: Case(said, [key]) for key, said in OTHERS.items()},
    **{
        f"a folder for {name}": Case(
            f"run/{name}' is a folder, and the run writes a file", (), {f"run/{name}/x": ""}
        )
        for name in ("config.yaml", "metrics.csv", "hparams.yaml")
    },
    **{
        f"file: {key}": Case(said, ["-c", "o.yaml"], {"o.yaml": text})
        for key, (text, said) in FILES.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_without_a_model(tmp_path, name):
    case = CASES[name]
    outcome = run_case(case, tmp_path)
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, outcome.stderr
    assert case.message in lines[0]
    assert len(lines[0]) < 450
    assert not outcome.loaded
    assert outcome.left == []


VERBS = {
    "methods x": "`methods` does not take 'x'",
    "methods --configs": "argument --configs: expected one argument",
    "methods --configs base.yaml": "no folder 'base.yaml'",
    "methods --configs latin": "is not UTF-8 text",
    "methods --configs lists": "must hold a mapping of options, got list",
    "methods --configs twice": "gives `model` twice",
    "methods --page latin/a.yaml": "latin/a.yaml is not UTF-8 text",
    "configs show nope": "nope",
    "plan": "`plan` needs a configuration",
    "plan -c base.yaml --gpu-gib x": "argument --gpu-gib: invalid float value: 'x'",
    "plan -c base.yaml --gpu-gib nan": "`--gpu-gib` must be above 0.6 and finite, got nan",
    "plan -c base.yaml --gpu-gib inf": "`--gpu-gib` must be above 0.6 and finite, got inf",
    "plan -c base.yaml --trainer.accelerator=foo": "invalid accelerator name",
    "plan -c base.yaml --trainer.devices=0": "`Trainer(devices='0')` value is not a valid input",
    "export --checkpoint base.yaml --to o --form foo": "argument --form: invalid choice: 'foo'",
    "export --checkpoint base.yaml --to o": "`--checkpoint` 'base.yaml' cannot be read",
    "export --checkpoint . --to o": "`--checkpoint` '.' ",
    "rewards-check": "`rewards-check` needs a configuration",
    "rewards-check -c base.yaml --rows x": "argument --rows: invalid int value: 'x'",
    "rewards-check -c base.yaml --seconds inf": "`--seconds` must be positive and finite, got inf",
    "rewards-check -c base.yaml --share nan": "`--share` must be at least 0 and finite, got nan",
    "verify-resume -c base.yaml --kill update:²": "`--kill` must be one of",
    "verify-resume -c base.yaml --kill update:0": "`--kill` must be one of",
    "verify-resume -c base.yaml --kill update:1e3": "`--kill` must be one of",
    "verify-resume -c base.yaml --updates x": "argument --updates: invalid int value: 'x'",
    "verify-resume -c base.yaml --updates 99999999999999999999": "`--updates` must be from 2 to 1,000,000",
    "verify-resume -c base.yaml --folder base.yaml": "`--folder` 'base.yaml' is a file: give a folder",
    "verify-resume -c base.yaml --folder=": "`--folder` needs the name of a folder",
    "predict --model": "argument --model: expected one argument",
}


@pytest.mark.parametrize("words", VERBS)
def test_one_line_of_the_other_verbs(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    for folder, text in {
        "latin": b"caf\xe9: 1",
        "lists": b"- 1",
        "twice": b"model: {}\nmodel: {}",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.yaml").write_bytes(text)
    assert main(words.split(" ")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert VERBS[words] in lines[0]
