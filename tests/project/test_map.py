"""Each source file of the package has a test of its name, or a line here that names the test which covers it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
COVERED = {
    "callbacks/prompt_order.py": "callbacks/test_resume.py",
    "callbacks/support.py": "stories/test_training_rlpt.py",
    "__main__.py": "cli/test_entry_point.py",
    "characters.py": "data/test_tails.py",
    "checks.py": "cli/test_numbers.py",
    "peptide_files.py": "data/test_peptides.py",
    "errors.py": "cli/test_entry_point.py",
    "scores.py": "laws/test_policies.py",
    "cli/benchmarks.py": "cli/test_evaluate.py",
    "cli/compare.py": "cli/test_evaluate.py",
    "cli/classes.py": "recipes/test_algorithms.py",
    "cli/fit.py": "cli/test_run.py",
    "cli/forked_runs.py": "cli/test_verify_resume.py",
    "cli/fork_server.py": "cli/test_verify_resume.py",
    "cli/guard.py": "cli/test_entry_point.py",
    "cli/hyperparameters.py": "cli/test_parser.py",
    "cli/main.py": "cli/test_entry_point.py",
    "cli/messages.py": "cli/mistakes/test_names.py",
    "cli/mistakes.py": "cli/test_entry_point.py",
    "cli/objective_files.py": "project/test_public.py",
    "cli/option_checks.py": "cli/test_parser.py",
    "cli/other_libraries.py": "cli/mistakes/test_names.py",
    "cli/plan_check.py": "cli/test_plan.py",
    "cli/plan_objects.py": "cli/test_plan.py",
    "cli/reports.py": "cli/mistakes/test_names.py",
    "cli/save_config.py": "cli/test_run.py",
    "cli/settings.py": "cli/test_parser.py",
    "cli/stage_entry.py": "cli/test_stages.py",
    "cli/stage_metrics.py": "cli/test_stages.py",
    "cli/stage_runs.py": "cli/test_stages.py",
    "cli/suggestions.py": "cli/mistakes/test_names.py",
    "cli/verbs.py": "cli/test_entry_point.py",
    "cli/warmup_stage.py": "cli/test_warm_up.py",
    "data/annotated.py": "cli/test_dissect.py",
    "data/base.py": "laws/test_data.py",
    "data/batching.py": "laws/test_data.py",
    "data/code_prompts.py": "data/test_code_lines.py",
    "data/code_tokens.py": "data/test_code_lines.py",
    "functional/thoughts.py": "rewards/test_next_line.py",
    "modules/reward_reference.py": "rewards/test_next_line.py",
    "objective/token_ids.py": "objective/test_first_tokens.py",
    "data/csv_rows.py": "data/test_reading.py",
    "data/encoding.py": "data/test_rendering.py",
    "data/files.py": "data/test_reading_refusals.py",
    "data/generated.py": "laws/test_generated.py",
    "data/identity.py": "laws/test_data.py",
    "data/lengths.py": "laws/test_data.py",
    "data/levels.py": "data/test_scaffold_metrics.py",
    "data/loaders.py": "laws/test_data.py",
    "data/order.py": "laws/test_data.py",
    "data/over_data.py": "data/test_scaffold.py",
    "data/source.py": "data/test_table.py",
    "data/solutions.py": "data/test_rendering.py",
    "data/suspicions.py": "laws/test_data.py",
    "data/tables.py": "data/test_svamp.py",
    "export/option_text.py": "export/test_card.py",
    "export/origin.py": "export/test_card.py",
    "functional/block_weights.py": "functional/test_actions.py",
    "functional/head_gradients.py": "functional/test_heads.py",
    "functional/head_logits.py": "functional/test_heads_options.py",
    "functional/head_positions.py": "functional/test_heads_both.py",
    "functional/prefix_tree.py": "functional/test_prefix_trees.py",
    "export/reloaded.py": "export/test_masked.py",
    "export/samples.py": "export/test_masked.py",
    "memory/footprint.py": "callbacks/test_memory.py",
    "memory/resident.py": "callbacks/test_memory.py",
    "metrics/trends.py": "metrics/test_alarms.py",
    "modules/beats.py": "callbacks/test_heartbeat.py",
    "modules/evaluation.py": "callbacks/test_rollout.py",
    "modules/fitting.py": "policies/test_folder_says.py",
    "modules/hooks.py": "callbacks/test_rollout.py",
    "modules/limits.py": "stories/test_loop_refusals.py",
    "modules/loader.py": "stories/test_loop_prompts.py",
    "modules/optimization.py": "stories/test_loop.py",
    "modules/saved_state.py": "stories/test_resume_within_epochs.py",
    "modules/source.py": "stories/test_loop_prompts.py",
    "modules/stage.py": "modules/test_warmup.py",
    "modules/trainer.py": "stories/test_loop_refusals.py",
    "modules/trainer_options.py": "cli/test_numbers.py",
    "objective/advantages.py": "laws/test_advantages.py",
    "objective/axes.py": "objective/test_rules.py",
    "objective/block_weights.py": "laws/test_action_spaces.py",
    "objective/decoupled.py": "functional/test_decoupled.py",
    "objective/divergence_mask.py": "laws/test_surrogates.py",
    "objective/linear_bound.py": "laws/test_surrogates.py",
    "objective/log_ratios.py": "objective/test_objective.py",
    "objective/loss_metrics.py": "objective/test_objective.py",
    "objective/outcome.py": "laws/test_advantages.py",
    "objective/reductions.py": "laws/test_reductions.py",
    "objective/selection.py": "laws/test_selections.py",
    "objective/supports.py": "laws/test_supports.py",
    "objective/surrogates.py": "laws/test_surrogates.py",
    "plan/check.py": "cli/test_plan.py",
    "plan/passes.py": "cli/test_plan.py",
    "plan/predict.py": "cli/test_plan.py",
    "plan/sizes.py": "cli/test_plan.py",
    "plan/weights.py": "cli/test_plan.py",
    "policies/base.py": "laws/test_policies.py",
    "policies/checksums.py": "policies/test_quantization_refusals.py",
    "policies/combinations.py": "policies/test_quantization_refusals.py",
    "policies/described.py": "policies/test_folder_says.py",
    "policies/end_tokens.py": "policies/test_folder_says.py",
    "policies/loaded.py": "policies/test_causal.py",
    "policies/masked_checks.py": "policies/test_masked_refusals.py",
    "policies/masked_inputs.py": "policies/test_masked_models.py",
    "policies/model_cache.py": "policies/test_pretrained.py",
    "policies/model_files.py": "policies/test_loading_damage.py",
    "policies/model_kinds.py": "policies/test_masked_models.py",
    "policies/reference.py": "callbacks/test_reference.py",
    "policies/remarks.py": "policies/test_folder_says.py",
    "policies/sharded_weights.py": "policies/test_sharding.py",
    "policies/trunk.py": "policies/test_mtp_trunks.py",
    "policies/weight_files.py": "policies/test_loading_damage.py",
    "recipes/yaml_files.py": "cli/test_hostile.py",
    "resume/changed_options.py": "callbacks/test_resume_options.py",
    "resume/comparison.py": "callbacks/test_resume.py",
    "resume/early_stopping.py": "callbacks/test_resume.py",
    "resume/entries.py": "resume/test_restoring.py",
    "resume/kills.py": "cli/test_verify_resume.py",
    "resume/run_options.py": "recipes/test_configs.py",
    "rollout/diagnosis.py": "callbacks/test_watchdog.py",
    "rewards/calling.py": "rewards/test_process.py",
    "rewards/helper.py": "rewards/test_process_ends.py",
    "rewards/importing.py": "rewards/test_functions.py",
    "rewards/isolation.py": "rewards/test_process.py",
    "rewards/math_worker.py": "rewards/test_math.py",
    "rewards/resolving.py": "rewards/test_functions.py",
    "rewards/sandbox/container.py": "rewards/sandbox/test_pool.py",
    "rewards/sandbox/inside/confine.py": "rewards/sandbox/test_hostile.py",
    "rewards/sandbox/inside/frames.py": "rewards/sandbox/test_judge.py",
    "rewards/sandbox/inside/judge.py": "rewards/sandbox/test_judge.py",
    "rewards/sandbox/inside/program.py": "rewards/sandbox/test_pool.py",
    "rewards/sandbox/inside/seccomp.py": "rewards/sandbox/test_hostile.py",
    "rewards/sandbox/inside/values.py": "rewards/sandbox/test_values.py",
    "rewards/sandbox/inside/zygote.py": "rewards/sandbox/test_pool.py",
    "rewards/sandbox/jobs.py": "rewards/test_code.py",
    "rewards/sandbox/limits.py": "cli/mistakes/test_rewards.py",
    "rewards/scoring.py": "rewards/test_base.py",
    "rewards/thoughts.py": "rewards/test_verdicts.py",
    "rollout/evaluation.py": "callbacks/test_rollout.py",
    "rollout/events.py": "rollout/test_collect.py",
    "rollout/ranks.py": "rollout/test_collect.py",
    "rollout/scorer.py": "rollout/test_collect.py",
    "rollout/successes.py": "stories/test_curriculum.py",
    "rollout/state.py": "stories/test_resume_within_epochs.py",
    "sampling/base.py": "laws/test_policies.py",
    "sampling/record.py": "sampling/test_local_records.py",
    "memory/drawing.py": "callbacks/test_memory.py",
    "modules/gradients.py": "stories/test_loop.py",
    "modules/precision.py": "stories/test_loop.py",
    "modules/rollout_setup.py": "stories/test_loop_refusals.py",
    "modules/trainer_adapters.py": "rollout/test_collect.py",
    "modules/update_metrics.py": "stories/test_loop_metrics.py",
    "objective/block_actions.py": "laws/test_action_spaces.py",
    "objective/trust_metrics.py": "objective/test_objective.py",
    "resume/model_checkpoints.py": "callbacks/test_resume.py",
    "resume/option_effects.py": "recipes/test_configs.py",
    "resume/optimizer_states.py": "resume/test_restoring.py",
    "rollout/learning_curve.py": "callbacks/test_report.py",
    "rollout/shift_figure.py": "cli/test_shift.py",
    "rollout/stage_results.py": "callbacks/test_report.py",
    "rollout/stages_table.py": "callbacks/test_report.py",
    "storage/disk.py": "storage/test_files.py",
    "storage/reading.py": "resume/test_restoring.py",
    "storage/shard_reading.py": "storage/test_shards_damage.py",
}
"""The test, below `tests/`, of each source file that has none of its name."""


def sources() -> set[str]:
    """Return the files of the package; `callbacks` through its link."""
    package = ROOT / "lightning_mpo"
    files = [*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]
    return {str(path.relative_to(package)) for path in files if path.name != "__init__.py"}


def namesake(source: str) -> Path:
    path = Path(source)
    return ROOT / "tests" / path.parent / f"test_{path.name}"


def test_every_source_file_has_a_namesake_or_a_line():
    assert {source for source in sources() if not namesake(source).exists()} == COVERED.keys()


def test_every_test_of_the_map_exists():
    assert [test for test in COVERED.values() if not (ROOT / "tests" / test).is_file()] == []


def test_no_test_file_is_over_300_lines():
    files = (ROOT / "tests").rglob("test_*.py")
    assert [path.name for path in files if len(path.read_text().splitlines()) > 300] == []


def test_no_test_file_imports_another():
    files = (ROOT / "tests").rglob("*.py")
    lines = [line for path in files for line in path.read_text().splitlines()]
    assert [
        line for line in lines if line.lstrip().startswith("from tests.") and ".test_" in line
    ] == []
