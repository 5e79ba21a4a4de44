"""One draw of each row, and its record."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, Nucleus, TopK
from lightning_mpo.sampling.drawing import Step, check_probabilities, inverse_cdf
from tests.support.builders import seeded

LOGITS = torch.randn(40, 12, generator=seeded(0))
UNIFORM = torch.rand(40, generator=seeded(1))


@pytest.mark.parametrize("support", [FullVocabulary(), TopK(4), Nucleus(0.7, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_a_draw_records_logprob_entropy_and_mass_of_its_distribution(support, temperature):
    drawn = Step(support, temperature, False, entropy=True).draw(LOGITS, LOGITS, UNIFORM)
    for b, logits in enumerate((LOGITS / temperature).double()):
        ids, slots = support.select(LOGITS[b : b + 1] / temperature)
        kept = torch.arange(12) if ids is None else ids[0].long()
        kept = kept if slots is None else kept[slots[0]]
        shares = logits[kept].softmax(0)
        place = int((shares.cumsum(0) > UNIFORM[b]).int().argmax())
        assert int(drawn.tokens_B[b]) == int(kept[place])
        assert float(drawn.logprobs_B[b]) == pytest.approx(float(shares[place].log()), abs=1e-5)
        entropy = float(-(shares * shares.log()).sum())
        assert float(drawn.entropy_B[b]) == pytest.approx(entropy, abs=1e-5)
        mass = float(logits.softmax(0)[kept].sum())
        assert float(drawn.kept_mass_B[b]) == pytest.approx(mass, abs=1e-5)


def test_greedy_takes_the_most_probable_id_and_an_entropy_is_recorded_on_request():
    drawn = Step(FullVocabulary(), 0.5, True).draw(LOGITS, LOGITS, UNIFORM)
    assert torch.equal(drawn.tokens_B, LOGITS.argmax(1))
    assert drawn.entropy_B is None


def test_an_id_without_probability_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    drawn = Step(FullVocabulary(), 1.0, False, entropy=True).draw(logits, logits, UNIFORM[:1])
    assert float(drawn.entropy_B) == pytest.approx(0.6931472)


def test_numbers_at_both_ends_draw_ids_that_have_probability():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1 - 2**-24])
    assert inverse_cdf(logits, logits.logsumexp(-1), numbers).tolist() == [1, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logprobs_that_are_no_numbers_are_refused(value):
    check_probabilities([torch.zeros(2, 3)])
    with pytest.raises(UserError, match="gives no probabilities, only nan"):
        check_probabilities([torch.zeros(2, 3), torch.tensor([[0.0, value]])])
