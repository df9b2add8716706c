import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lifelines import CoxPHFitter

from braindino.downstream.head_losses import GRADIENTS, batch_shares, cox_gradient
from braindino.downstream.head_stack import HeadStack
from braindino.downstream.oversampling import oversample

ONES = torch.ones(1, 7, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(loss, outputs):
    leaf = outputs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def breslow(h, times, events):
    """Eq. 11 case by case."""
    terms = [
        h[i] - torch.log(sum(h[j].exp() for j in range(len(h)) if times[j] >= times[i]))
        for i in range(len(h)) if events[i]
    ]  # fmt: skip
    return -sum(terms) / len(terms)


def test_cross_entropy_is_torchs_also_with_class_weights():
    z, y = draw(1, 7, 3), torch.tensor([[0, 1, 2, 2, 1, 0, 0]])
    of_class = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for weights, kind in ((ONES, None), (of_class[y], of_class)):
        expected = by_autograd(lambda o, kind=kind: F.cross_entropy(o[0], y[0], weight=kind), z)
        torch.testing.assert_close(GRADIENTS["cross_entropy"](z, F.one_hot(y, 3), batch_shares(weights)), expected)


def test_squared_and_mixed_errors_are_those_of_torchs_losses():
    z, y = 3 * draw(1, 7, 1), draw(1, 7, seed=1)
    expected = by_autograd(lambda o: F.mse_loss(o[..., 0], y), z)
    torch.testing.assert_close(GRADIENTS["squared_error"](z, y, ONES), expected)
    expected = by_autograd(
        lambda o: (
            0.2 * F.mse_loss(o[..., 0], y)
            + 0.8 * (0.5 * F.l1_loss(o[..., 0], y) + 0.5 * F.huber_loss(o[..., 0], y, delta=1.0))
        ),
        z,
    )
    torch.testing.assert_close(GRADIENTS["log_mixed"](z, y, ONES), expected)


def test_the_mixed_error_by_hand():
    z = torch.tensor([[[0.5], [-3.0]]])
    # 0.4 d + 0.4 sign(d) + 0.4 clip(d), over two cases.
    expected = torch.tensor([[[(0.2 + 0.4 + 0.2) / 2], [(-1.2 - 0.4 - 0.4) / 2]]])
    torch.testing.assert_close(GRADIENTS["log_mixed"](z, torch.zeros(1, 2), torch.ones(1, 2)), expected)


def test_cox_is_the_partial_likelihood_over_risk_sets_with_ties():
    times = torch.tensor([[5.0, 2, 2, 3, 3, 1, 4]], dtype=torch.float64)
    events = torch.tensor([[1.0, 1, 1, 0, 1, 0, 0]], dtype=torch.float64)
    h = draw(1, 7, 1)
    expected = by_autograd(lambda o: breslow(o[0, :, 0], times[0], events[0]), h)
    torch.testing.assert_close(cox_gradient(h, torch.stack([times, events], dim=-1), ONES), expected)


def test_the_cox_gradient_vanishes_at_the_coefficients_of_lifelines():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 2))
    table = pd.DataFrame(x, columns=["a", "b"])
    # No ties, where Efron's and Breslow's handling agree.
    table["time"], table["event"] = rng.permutation(80) + 1.0 + 20 * np.exp(-x[:, 0]), rng.random(80) < 0.7
    fitted = CoxPHFitter().fit(table, "time", "event").params_.to_numpy()
    targets = torch.from_numpy(np.stack([table["time"], table["event"]], axis=1).astype(float))[None]
    risks = torch.from_numpy(x @ fitted)[None, :, None]
    gradient = cox_gradient(risks, targets, torch.ones(1, 80))[0, :, 0].numpy() @ x
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_a_batch_without_an_event_has_no_gradient():
    targets = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    assert cox_gradient(torch.randn(1, 2, 1), targets, torch.ones(1, 2)).abs().max() == 0


@pytest.mark.parametrize("hidden_width", [None, 6])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_gradients_by_hand_are_those_of_autograd(hidden_width, dropped):
    stack = HeadStack([3, 4], num_features=5, hidden_width=hidden_width, num_outputs=2, dtype=torch.float64)
    x, at_outputs = F.layer_norm(draw(2, 7, 5), (5,)), draw(2, 7, 2, seed=1)
    kept = (draw(2, 7, hidden_width or 5, seed=4) > 0) * 2.0 if dropped else None

    leaves = {name: part.clone().requires_grad_() for name, part in stack.parameters.items()}
    inner = x
    if hidden_width:
        inner = F.gelu(inner @ leaves["hidden_weight"] + leaves["hidden_bias"])
    outputs = (inner if kept is None else inner * kept) @ leaves["output_weight"] + leaves["output_bias"]
    outputs.backward(at_outputs)

    seen = []
    stack.backward(x, lambda z: (seen.append(z.clone()), at_outputs)[1], kept)
    torch.testing.assert_close(seen[0], outputs.detach())
    for name, leaf in leaves.items():
        torch.testing.assert_close(stack.gradients[name], leaf.grad)
    if kept is None:
        torch.testing.assert_close(stack.outputs(x), outputs.detach())


def test_smote_fills_up_with_cases_between_cases_of_the_class():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 3)).astype(np.float32)
    y = np.array([1] * 3 + [0] * 17)
    made, classes = oversample(x, y, seed=0, whose="head 0")
    assert made.shape == (14, 3) and made.dtype == np.float32 and (classes == 1).all()
    lengths = np.linalg.norm(x[:3, None] - x[None, :3], axis=-1)
    apart = np.linalg.norm(made[:, None] - x[None, :3], axis=-1)
    detours = apart[:, :, None] + apart[:, None, :] - lengths
    pairs = detours[:, ~np.eye(3, dtype=bool)]
    np.testing.assert_allclose(pairs.min(axis=1), 0, atol=1e-5)
    again = oversample(x, y, seed=1, whose="head 0")[0]
    assert np.abs(made - again).max() > 1e-3
