"""`null` is refused for options whose type does not include it."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.cli.export import Reader
from lightning_mpo.cli.nulls import check_nulls, nulls_as_files, takes_null
from lightning_mpo.data import Spans
from lightning_mpo.errors import UserError
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies import TinyPolicy
from tests.support.masked_runs import masked_configuration


def build(name: str, **arguments: object) -> Namespace:
    return Namespace(class_path=f"lightning_mpo.{name}", init_args=Namespace(**arguments))


CASES = {
    "`data.entities`: must be int": Namespace(data=build("data.spans.Spans", entities=None)),
    "`data.seed`: must be int": Namespace(data=build("data.spans.Spans", seed=None)),
    "`rollout.prompts`: must be int": Namespace(rollout=Namespace(prompts=None)),
    "`rollout.rewards[1].noise`: must be float": Namespace(
        rollout=Namespace(rewards=["f", build("rewards.spans.SpanShare", noise=None)])
    ),
    "`model.objective.surrogate`: must be Surrogate": Namespace(
        model=build("modules.optimization.PolicyOptimization", objective=Namespace(surrogate=None))
    ),
}


@pytest.mark.parametrize("message", CASES)
def test_null_is_refused(message):
    with pytest.raises(UserError, match="got null") as error:
        check_nulls(CASES[message])
    assert message in str(error.value)


def test_null_is_taken_where_the_type_says_so():
    check_nulls(
        Namespace(
            rollout=Namespace(replay=None, dynamic=None),
            trainer=Namespace(logger=None),
            data=build("data.spans.Spans", validation_prompts=None),
            model=Namespace(class_path="torch.optim.AdamW", init_args=Namespace(lr=None)),
        )
    )


def test_a_default_of_none_is_taken():
    assert takes_null(TinyPolicy, "mtp")
    assert takes_null(RolloutLoop, "replay")
    assert not takes_null(Spans, "length")
    assert not takes_null(Objective, "support")


@pytest.mark.parametrize("key", ["policy.init_args.checkpoint", "policy.checkpoint"])
@pytest.mark.parametrize("form", ["two words", "one word"])
def test_null_on_the_command_line_is_no_text(tmp_path, monkeypatch, key, form):
    # the parser of the options alone makes it the path "None"
    monkeypatch.chdir(tmp_path)
    option = f"--model.{key}"
    words = [option, "null"] if form == "two words" else [f"{option}=null"]
    (tmp_path / "run.yaml").write_text(masked_configuration())
    cli = Reader(args=["fit", "-c", "run.yaml", option, "earlier.ckpt", *words])
    policy = cli.config["fit"].model.init_args.policy
    assert policy.init_args.checkpoint is None


def test_null_takes_an_axis_of_the_objective_away(tmp_path):
    words = ["--model.init_args.objective.likelihood", "null"]
    (tmp_path / "run.yaml").write_text(masked_configuration())
    cli = Reader(args=["fit", "-c", str(tmp_path / "run.yaml"), *words])
    assert cli.config["fit"].model.init_args.objective.likelihood is None


def test_other_words_stay_as_they_are():
    words = ["fit", "--model.a", "--model.b", "null", "--trainer.logger", "null", "--model.c+=null"]
    expected = ["--config", '{"model": {"b": null}}']
    assert nulls_as_files(words) == [*words[:2], *expected, *words[4:]]
    assert nulls_as_files(["fit", "--model.a"]) == ["fit", "--model.a"]
