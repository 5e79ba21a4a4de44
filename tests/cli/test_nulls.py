"""`null` is refused for options whose type does not include it."""

from __future__ import annotations

import pytest
from jsonargparse import Namespace

from lightning_mpo.callbacks.rollout import RolloutLoop
from lightning_mpo.cli.nulls import check_nulls, takes_null
from lightning_mpo.data import Spans
from lightning_mpo.errors import UserError
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies import TinyPolicy


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
