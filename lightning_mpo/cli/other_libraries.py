"""Options of TRL, verl, OpenRLHF, transformers and peft, with the names that they have here."""

from __future__ import annotations

_BATCH = (
    "a rollout has `rollout.prompts` x `rollout.completions` sequences, `rollout.minibatches` "
    "updates a pass, and "
)
_OPTIMIZER = "`model.optimizer: {class_path: torch.optim.AdamW, init_args: {lr: …}}`"
OPTIONS = {
    "top_p": (
        "training over a nucleus is `objective.support: {class_path: Nucleus, init_args: {p: …}}`"
    ),
    "top_k": (
        "training over the most probable tokens is `objective.support: {class_path: TopK, "
        "init_args: {k: …}}`"
    ),
    "min_p": "it is `objective.support: {class_path: MinP, init_args: {ratio: …}}`",
    "temperature": "it is `model.temperature`, of sampling and of every log-prob",
    "stop": "tokens that end a response are `rollout.stop`",
    "stop_strings": (
        "tokens that end a response are `rollout.stop`; strings of several tokens do not exist"
    ),
    "repetition_penalty": (
        "it does not exist: it would change the distribution that log-probs are of"
    ),
    "num_generations": "completions per prompt are `rollout.completions`",
    "num_generations_eval": "it is `rollout.validation_completions`",
    "group_size": "completions per prompt are `rollout.completions`",
    "n_samples_per_prompt": "completions per prompt are `rollout.completions`",
    "n": "completions per prompt are `rollout.completions`",
    "beta": (
        "it is `coefficient` of `ConstantCoefficient`, the controller of a `KLPenalty` in "
        "`objective.terms`"
    ),
    "kl_coef": (
        "it is `coefficient` of `ConstantCoefficient`, the controller of a `KLPenalty` in "
        "`objective.terms`"
    ),
    "init_kl_coef": (
        "it is `coefficient` of `AdaptiveCoefficient`, the controller of a `KLPenalty` in "
        "`objective.terms`"
    ),
    "target_kl": (
        "it is `target` of `AdaptiveCoefficient`, the controller of a `KLPenalty` in "
        "`objective.terms`"
    ),
    "epsilon": (
        "it is `objective.surrogate: {class_path: ClippedRatio, init_args: {low: …, high: …}}`"
    ),
    "epsilon_low": "it is `objective.surrogate: {class_path: ClippedRatio, init_args: {low: …}}`",
    "epsilon_high": "it is `objective.surrogate: {class_path: ClippedRatio, init_args: {high: …}}`",
    "delta": (
        "TRL's is `dual` of `objective.surrogate: ClippedRatio`, DPPO's an argument of "
        "`DivergenceMask`"
    ),
    "cliprange": (
        "it is `objective.surrogate: {class_path: ClippedRatio, init_args: {low: …, high: …}}`"
    ),
    "clip_ratio": (
        "it is `objective.surrogate: {class_path: ClippedRatio, init_args: {low: …, high: …}}`"
    ),
    "loss_type": (
        "the loss is put together from `objective.surrogate` and `objective.reduction`; see "
        "configs/algorithm"
    ),
    "importance_sampling_level": (
        "it is `objective.actions`: TokenActions, SequenceActions or BlockActions"
    ),
    "scale_rewards": (
        "it is `objective.advantage: {class_path: GroupRelative, init_args: {scale: …}}`"
    ),
    "entropy_coef": "it is `coef` of an `EntropyBonus` in `objective.terms`",
    "top_entropy_quantile": (
        "it is `objective.selection: {class_path: HighEntropyTokens, init_args: {share: …}}`"
    ),
    "ent_coef": "it is `coef` of an `EntropyBonus` in `objective.terms`",
    "vf_coef": "it is `coef` of a `ValueLoss` in `objective.terms`",
    "gamma": "it is an argument of `objective.advantage`: GeneralizedAdvantage or ReturnToGo",
    "lam": "it is an argument of `objective.advantage: GeneralizedAdvantage`",
    "learning_rate": f"it is {_OPTIMIZER}",
    "lr": f"it is {_OPTIMIZER}",
    "weight_decay": "it is an argument of `model.optimizer`",
    "adam_beta1": "it is `betas` of `model.optimizer`",
    "optim": f"it is {_OPTIMIZER}",
    "optimizer": f"it is {_OPTIMIZER}",
    "lr_scheduler": "it is `model.scheduler: {class_path: …}`",
    "lr_scheduler_type": "it is `model.scheduler: {class_path: torch.optim.lr_scheduler.…}`",
    "warmup_ratio": (
        "it is `model.scheduler: {class_path: torch.optim.lr_scheduler.LinearLR, init_args: {…}}`"
    ),
    "warmup_steps": (
        "it is `model.scheduler: {class_path: torch.optim.lr_scheduler.LinearLR, init_args: {…}}`"
    ),
    "max_completion_length": "it is `rollout.max_new_tokens`",
    "max_response_length": "it is `rollout.max_new_tokens`",
    "response_length": "it is `rollout.max_new_tokens`",
    "max_tokens": "it is `rollout.max_new_tokens`",
    "max_prompt_length": "it is `data.max_prompt_tokens`",
    "chat_template_kwargs": "it is `data.template_arguments`",
    "shuffle_dataset": "it is `data.order`: shuffled or file",
    "num_iterations": "passes over a rollout are `rollout.epochs`",
    "ppo_epochs": "passes over a rollout are `rollout.epochs`",
    "num_ppo_epochs": "passes over a rollout are `rollout.epochs`",
    "num_mini_batches": "it is `rollout.minibatches`",
    "steps_per_generation": "updates in one pass over a rollout are `rollout.minibatches`",
    "per_device_train_batch_size": _BATCH
    + "`trainer.accumulate_grad_batches` micro-batches an update",
    "generation_batch_size": _BATCH + "`trainer.accumulate_grad_batches` micro-batches an update",
    "train_batch_size": _BATCH + "`trainer.accumulate_grad_batches` micro-batches an update",
    "batch_size": _BATCH + "`trainer.accumulate_grad_batches` micro-batches an update",
    "per_device_eval_batch_size": "it is `data.validation_batch_size`",
    "gradient_accumulation_steps": "it is `trainer.accumulate_grad_batches`",
    "gradient_checkpointing": "it is `model.policy.gradient_checkpointing` of a CausalPolicy",
    "num_train_epochs": "it is `trainer.max_epochs`, or `trainer.max_steps` in updates",
    "epochs": (
        "passes over the data are `trainer.max_epochs`, passes over a rollout `rollout.epochs`"
    ),
    "max_grad_norm": "it is `trainer.gradient_clip_val`",
    "bf16": "it is `trainer.precision: bf16-mixed`",
    "fp16": "it is `trainer.precision: bf16-mixed`",
    "output_dir": "it is `trainer.default_root_dir`",
    "run_name": "it is `trainer.logger`",
    "report_to": "it is `trainer.logger: {class_path: lightning.pytorch.loggers.…}`",
    "logging_steps": "it is `trainer.log_every_n_steps`",
    "log_completions": "it is the callback `Samples`",
    "eval_steps": (
        "it is `trainer.val_check_interval`, with `trainer.check_val_every_n_epoch: null`"
    ),
    "save_steps": "it is `every_n_train_steps` of `ModelCheckpoint` in `trainer.callbacks`",
    "save_total_limit": "it is `save_top_k` of `ModelCheckpoint` in `trainer.callbacks`",
    "resume_from_checkpoint": "it is `--ckpt_path FILE`, or `--ckpt_path last`",
    "seed": "it is `seed_everything`",
    "gpus": "it is `trainer.devices`",
    "deepspeed": (
        "it is `trainer.strategy`; sharding is `ModelParallelStrategy`, see configs/hardware"
    ),
    "use_vllm": "responses are sampled in process, by `rollout.sampler`",
    "vllm_mode": "responses are sampled in process, by `rollout.sampler`",
    "vllm_importance_sampling_correction": (
        "it is `objective.correction`: TruncatedWeights or MaskedWeights"
    ),
    "reward_funcs": "it is `rollout.rewards`, a list of classes",
    "reward_weights": "it is `weight` of each reward in `rollout.rewards`",
    "multi_objective_aggregation": (
        "it is `objective.advantage`: GroupRelative or DecoupledRelative"
    ),
    "mask_truncated_completions": "it is `rollout.mask_truncated`",
    "model_name_or_path": (
        "it is `model.policy: {class_path: CausalPolicy, init_args: {source: …}}`"
    ),
    "dataset_name": "it is `data: {class_path: Table, init_args: {train: …, hub: …}}`",
    "train_dataset": "it is `data: {class_path: Table, init_args: {train: …}}`",
    "eval_dataset": "it is `data: {class_path: Table, init_args: {validation: …}}`",
    "peft_config": "it is `lora` of a CausalPolicy",
    "quantization_config": "it is `quantization` of a CausalPolicy",
    "ref_model": "the reference is the initial policy, if `objective.terms` has a `KLPenalty`",
    "sync_ref_model": "it is the callback `ReferenceUpdate`",
    "ref_model_mixup_alpha": "it is `mixup` of the callback `ReferenceUpdate`",
    "ref_model_sync_steps": "it is `every` of the callback `ReferenceUpdate`, in rollouts",
}
"""The option of this package, by the last part of another library's name."""

ARGUMENTS = {
    "Lora": {
        "r": "`rank`",
        "lora_alpha": "`alpha`",
        "target_modules": "`targets`",
        "lora_dropout": "`dropout`",
        "use_dora": "nothing: plain low-rank adapters are what sampler and trainer agree on",
        "use_rslora": "`alpha`: give alpha x sqrt(rank)",
        "modules_to_save": "nothing: whole layers are not trained beside adapters",
        "bias": "nothing: biases stay as they are",
    },
    "Quantization": {
        "load_in_4bit": "`bits: 4`",
        "load_in_8bit": "`bits: 4`; 8 is refused",
        "bnb_4bit_quant_type": "`kind`",
        "bnb_4bit_use_double_quant": "`double`",
        "bnb_4bit_compute_dtype": "`compute_dtype`",
    },
}
"""The argument of a class of this package, by class and another library's name."""
