"""The trained weights of a policy come back from its checkpoint, and others are refused."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy, Lora, TinyPolicy
from tests.support.adapters import (
    CPU,
    PROMPTS,
    RESPONSES,
    always_share,  # noqa: F401
    lora_policy,
    move_adapters,
    save,
    score,
)
from tests.support.builders import CHARACTERS, make_rollout


def test_what_is_trained_is_saved_and_comes_back(tiny_policy, tiny_folder, tmp_path):
    rollout, path = make_rollout(PROMPTS, RESPONSES), str(tmp_path / "last.ckpt")
    policy = tiny_policy(seed=3, reference=True)
    assert {key.split(".")[0] for key in policy.trained_state(policy.state_dict())} == {"network"}
    save(policy, path)
    loaded = tiny_policy(seed=4, reference=True, checkpoint=path)
    loaded.check()
    torch.testing.assert_close(score(loaded, rollout), score(policy, rollout), rtol=0, atol=0)
    torch.testing.assert_close(
        score(loaded, rollout, reference=True), score(policy, rollout), rtol=0, atol=0
    )

    adapted = lora_policy(tiny_folder)
    move_adapters(adapted)
    state = adapted.trained_state(adapted.state_dict())
    assert state
    assert set(state) == {name for name, p in adapted.named_parameters() if p.requires_grad}
    save(adapted, path)
    again = CausalPolicy(tiny_folder, lora=Lora(rank=4, alpha=8), checkpoint=path)
    again.build(device=CPU, reference=True)
    torch.testing.assert_close(score(again, rollout), score(adapted, rollout), rtol=0, atol=0)


def test_a_reference_has_a_checkpoint_of_its_own_or_the_source_alone(tiny_policy, tmp_path):
    rollout = make_rollout(PROMPTS, RESPONSES)
    paths = {name: str(tmp_path / f"{name}.ckpt") for name in ("start", "other")}
    start, other = tiny_policy(seed=3), tiny_policy(seed=4)
    save(start, paths["start"])
    save(other, paths["other"])

    def built(**options):
        made = tiny_policy(seed=5, reference=True, **options)
        return score(made, rollout), score(made, rollout, reference=True)

    random = score(tiny_policy(seed=5), rollout)
    by_option = {"other": paths["other"], "source": "source", None: None}
    for checkpoint, trained in ((paths["start"], score(start, rollout)), (None, random)):
        kept = {"other": score(other, rollout), "source": random, None: trained}
        for name, option in by_option.items():
            policy, reference = built(checkpoint=checkpoint, reference_checkpoint=option)
            torch.testing.assert_close(policy, trained, rtol=0, atol=0)
            torch.testing.assert_close(reference, kept[name], rtol=0, atol=0)
    assert not torch.equal(random, score(start, rollout)), "the check compares something"


def test_a_reference_of_adapters_has_a_checkpoint_of_its_own(tiny_folder, tmp_path):
    rollout, plain = make_rollout(PROMPTS, RESPONSES), lora_policy(tiny_folder)
    scores, paths = {None: score(plain, rollout), "source": score(plain, rollout)}, {}
    for times, name in enumerate(("start", "other")):
        adapted = lora_policy(tiny_folder)
        for _ in range(1 + times):
            move_adapters(adapted)
        paths[name] = str(tmp_path / f"{name}.ckpt")
        save(adapted, paths[name])
        scores[name] = score(adapted, rollout)
    assert not torch.equal(scores["start"], scores["other"])
    for checkpoint in ("start", None):
        for name in ("other", "source", None):
            policy = CausalPolicy(
                tiny_folder,
                lora=Lora(rank=4, alpha=8),
                checkpoint=paths.get(checkpoint),
                reference_checkpoint=paths.get(name, name),
            )
            policy.check()
            policy.build(device=CPU, reference=True)
            kept = scores[checkpoint if name is None else name]
            torch.testing.assert_close(score(policy, rollout), scores[checkpoint], rtol=0, atol=0)
            torch.testing.assert_close(score(policy, rollout, reference=True), kept, rtol=0, atol=0)


def test_a_reference_that_nothing_uses_is_named(tiny_policy):
    with pytest.warns(UserWarning, match="^`policy.reference_checkpoint` has no effect"):
        assert tiny_policy(reference_checkpoint="source").reference_network is None


def test_a_reference_that_does_not_serve_is_named(tiny_policy, tiny_folder, tmp_path):
    path = str(tmp_path / "last.ckpt")
    policy = TinyPolicy(CHARACTERS, reference_checkpoint=path)
    with pytest.raises(UserError, match=rf"^`policy.reference_checkpoint` '{path}' does not exist"):
        policy.check()
    save(tiny_policy(hidden_size=64), path)
    fault = r"does not fit the policy: .* has shape \[.*64\]"
    with pytest.raises(UserError, match=rf"^`policy.reference_checkpoint` '{path}' {fault}"):
        tiny_policy(reference=True, reference_checkpoint=path)
    adapted = CausalPolicy(tiny_folder, lora=Lora(rank=4, alpha=8), reference_checkpoint=path)
    with pytest.raises(UserError, match="^`policy.reference_checkpoint` .* whole weights"):
        adapted.check()


def broken(kind: str, path, tiny_policy) -> None:
    """Write a checkpoint that is wrong in one way."""
    policy = tiny_policy()
    state = {f"policy.{key}": value for key, value in policy.state_dict().items()}
    if kind == "no checkpoint":
        path.write_text("hello")
    elif kind == "another file":
        torch.save({"weights": state}, path)
    elif kind == "no mapping":
        torch.save({"state_dict": 3}, path)
    elif kind == "missing":
        state.pop("policy.network.model.norm.weight")
        torch.save({"state_dict": state}, path)
    elif kind == "unknown":
        torch.save({"state_dict": state | {"policy.network.extra": torch.zeros(1)}}, path)
    elif kind == "shape":
        save(tiny_policy(hidden_size=64), path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "does not exist"),
        ("no checkpoint", "cannot be read as a Lightning checkpoint"),
        ("another file", "cannot be read as a Lightning checkpoint: it holds no state_dict"),
        ("no mapping", "cannot be read as a Lightning checkpoint"),
        (
            "missing",
            r"does not fit the policy: 1 weights are missing, 0 unknown .*model.norm.weight",
        ),
        ("unknown", r"does not fit the policy: 0 weights are missing, 1 unknown .*network.extra"),
        ("shape", r"does not fit the policy: .* has shape \[.*64\], the policy needs \[.*32\]"),
    ],
)
def test_a_checkpoint_that_does_not_serve_is_one_clear_sentence(
    tiny_policy, tmp_path, kind, message
):
    path = tmp_path / "last.ckpt"
    broken(kind, path, tiny_policy)
    policy = TinyPolicy(CHARACTERS, hidden_size=32, layers=2, heads=2, checkpoint=str(path))

    def take() -> None:
        policy.check()
        policy.build(device=CPU, reference=False)

    with pytest.raises(UserError, match=rf"^`policy.checkpoint` '{path}' {message}") as caught:
        take()
    assert "\n" not in str(caught.value)
