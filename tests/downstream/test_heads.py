import numpy as np
import pytest
import torch
from lifelines.utils import concordance_index
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from braindino.downstream import heads as heads_module
from braindino.downstream.attention_head import start_attention_head
from braindino.downstream.head_stack import HeadStack
from braindino.downstream.heads import Head, Training, train_heads
from braindino.vision_transformer import vit_base

SMALL = Head(hidden_width=16)
SHORT = Training(steps=200, learning_rate=3e-3)


def classes_of(n, num_classes=2, *, seed=0, features=8, gap=3.0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % num_classes)
    x = rng.standard_normal((n, features)).astype(np.float32)
    x[np.arange(n), y] += gap
    return x, y


def along_a_direction(values, *, features=32, seed=0):
    """Features that hold the standardised values in a direction of many dimensions, which LayerNorm leaves."""
    rng = np.random.default_rng(seed)
    standard = (values - values.mean()) / values.std()
    x = rng.standard_normal((len(values), features)) * 0.3 + np.outer(standard, rng.choice([-0.5, 0.5], features))
    return (x + 2 * rng.standard_normal(features)).astype(np.float32)


def test_the_head_is_six_thousandths_of_a_vit_b_with_its_head():
    stack = HeadStack([0], num_features=768, hidden_width=Head().hidden_width, num_outputs=1)
    assert stack.flat.shape == (1, 768 * 672 + 672 + 672 + 1)
    with torch.device("meta"):
        frozen = sum(parameter.numel() for parameter in vit_base().parameters())
    assert stack.flat.shape[1] / (stack.flat.shape[1] + frozen) == pytest.approx(0.006, abs=5e-5)


@pytest.mark.parametrize("kind", ["mlp", "linear", "attention"])
def test_heads_trained_together_are_the_heads_trained_alone_bit_by_bit(kind):
    x, y = classes_of(30, 3)
    if kind == "attention":
        x = np.stack([x, x[::-1]], axis=1)
    subsets, seeds = [np.arange(20), np.arange(9), np.arange(10, 30)], [0, 1, 1]
    head = Head(kind=kind, hidden_width=16, dropout=0.2)
    arguments = dict(num_outputs=3, head=head, training=Training(steps=30, learning_rate=3e-3))
    together = train_heads(x, y, subsets=subsets, seeds=seeds, **arguments)
    assert together.shape == (3, 30, 3) and together.dtype == np.float32
    for m in range(3):
        alone = train_heads(x, y, subsets=[subsets[m]], seeds=[seeds[m]], **arguments)
        np.testing.assert_array_equal(together[m], alone[0])


@pytest.mark.parametrize(
    ("kind", "loss", "smote"),
    [
        ("mlp", "cross_entropy", True),
        ("linear", "squared_error", False),
        ("mlp", "log_mixed", False),
        ("mlp", "cox", False),
        ("logistic", "cross_entropy", False),
    ],
)
def test_heads_may_learn_targets_of_their_own(kind, loss, smote):
    x, classes = classes_of(30)
    rng = np.random.default_rng(1)
    days = rng.gamma(2, 100, (2, 30))
    own = {
        "cross_entropy": np.stack([classes, np.roll(np.sort(classes), 3)]),
        "cox": np.stack([days, rng.random((2, 30)) < 0.8], axis=-1),
    }.get(loss, days)
    subsets, seeds = [np.arange(20), np.arange(5, 30)], [0, 3]
    training = Training(steps=30, learning_rate=3e-3, loss=loss, smote=smote)
    arguments = dict(num_outputs=2 if loss == "cross_entropy" else 1, head=Head(kind=kind, hidden_width=16))
    together = train_heads(x, own, subsets=subsets, seeds=seeds, training=training, **arguments)
    assert not np.array_equal(together[0], together[1])
    for m in range(2):
        alone = train_heads(x, own[m], subsets=[subsets[m]], seeds=[seeds[m]], training=training, **arguments)
        np.testing.assert_array_equal(together[m], alone[0])


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_training_is_that_of_torch_layers_with_torchs_optimiser(optimiser):
    x, y = classes_of(12, 2)
    training = Training(optimiser=optimiser, steps=40, batch_size=12, learning_rate=1e-2, weight_decay=0.1)
    ours = train_heads(x, y, subsets=[np.arange(12)], seeds=[4], num_outputs=2, head=SMALL, training=training)[0]

    start = HeadStack([4], num_features=8, hidden_width=16, num_outputs=2).parameters
    layers = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    with torch.no_grad():
        layers[1].weight.copy_(start["hidden_weight"][0].T)
        layers[1].bias.copy_(start["hidden_bias"][0, 0])
        layers[3].weight.copy_(start["output_weight"][0].T)
        layers[3].bias.copy_(start["output_bias"][0, 0])
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimiser]
    steps = kind(layers.parameters(), lr=1e-2, weight_decay=0.1, fused=False, foreach=False)
    for _ in range(40):
        steps.zero_grad()
        nn.functional.cross_entropy(layers(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        steps.step()
    theirs = layers(torch.from_numpy(x)).softmax(dim=-1).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_a_head_learns_separable_classes_and_nothing_from_permuted_labels():
    x, y = classes_of(400)
    dealt = np.random.default_rng(1).permutation(y)
    train, test = np.arange(200), np.arange(200, 400)
    for labels, low, high in ((y, 0.9, 1.0), (dealt, 0.38, 0.62)):
        p = train_heads(x, labels, subsets=[train], seeds=[0], num_outputs=2, head=SMALL, training=SHORT)[0]
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
        assert low <= (p.argmax(axis=1) == labels)[test].mean() <= high


def test_a_regressor_learns_years_on_the_paper_learning_rate():
    rng = np.random.default_rng(2)
    age = rng.uniform(20, 90, 200)
    x = along_a_direction(age)
    training = Training(loss="squared_error", steps=2000)
    predicted = train_heads(
        x, age, subsets=[np.arange(150)], seeds=[0], num_outputs=1, head=Head(hidden_width=64), training=training
    )[0, :, 0]
    assert np.abs(predicted - age)[150:].mean() < 0.5 * np.abs(age[150:] - age[:150].mean()).mean()


def test_days_are_learnt_as_logarithms_and_come_back_as_days_never_below_zero():
    rng = np.random.default_rng(3)
    days = np.expm1(rng.uniform(0, 5, 200))
    x = along_a_direction(np.log1p(days))
    training = Training(loss="log_mixed", optimiser="adamw", learning_rate=3e-3, weight_decay=1e-4, steps=600)
    predicted = train_heads(x, days, subsets=[np.arange(150)], seeds=[0], num_outputs=1, head=SMALL, training=training)[
        0, :, 0
    ]
    assert predicted.min() >= 0
    error = np.abs(np.log1p(predicted) - np.log1p(days))[150:].mean()
    assert error < 0.4 * np.abs(np.log1p(days[150:]) - np.log1p(days[:150]).mean()).mean()


def test_risks_order_a_planted_survival_signal():
    rng = np.random.default_rng(4)
    hazard = rng.standard_normal(200)
    x = along_a_direction(hazard)
    survival = np.stack([100 * np.exp(-2 * hazard + 0.1 * rng.standard_normal(200)), rng.random(200) < 0.8], axis=1)
    training = Training(loss="cox", learning_rate=3e-3, weight_decay=1e-3, steps=200)
    risk = train_heads(x, survival, subsets=[np.arange(120)], seeds=[0], num_outputs=1, head=SMALL, training=training)[
        0, 120:, 0
    ]
    assert concordance_index(survival[120:, 0], -risk, survival[120:, 1]) > 0.9


def test_logistic_regression_is_scikit_learns_on_the_training_rows():
    x, y = classes_of(60, gap=1.0)
    rows = np.arange(5, 45)
    ours = train_heads(x, y, subsets=[rows], seeds=[0], num_outputs=2, head=Head(kind="logistic"), training=Training())[
        0
    ]
    scaler = StandardScaler().fit(x[rows])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(x[rows]), y[rows])
    np.testing.assert_allclose(ours, model.predict_proba(scaler.transform(x)), atol=1e-4)


def test_attention_finds_the_planted_slice_that_a_mean_drowns():
    rng = np.random.default_rng(5)
    y = np.arange(300) % 2
    x = rng.standard_normal((300, 12, 8)).astype(np.float32)
    place = rng.integers(0, 12, 300)
    x[np.arange(300), place, 0] = 6.0
    x[np.arange(300), place, 1] = np.where(y == 1, 3.0, -3.0)
    arguments = dict(subsets=[np.arange(200)], seeds=[0], num_outputs=2)
    training = Training(steps=400, learning_rate=1e-2)
    found = train_heads(x, y, head=Head(kind="attention", hidden_width=16), training=training, **arguments)[0]
    drowned = train_heads(x.mean(axis=1), y, head=SMALL, training=training, **arguments)[0]
    right = [(p.argmax(axis=1) == y)[200:].mean() for p in (found, drowned)]
    assert right[0] > 0.95 and right[0] > right[1] + 0.05


def test_attention_never_sees_a_masked_slice():
    x, y = classes_of(20)
    slices, mask = np.stack([x, x + 1], axis=1), np.array([[True, False]] * 20)
    arguments = dict(subsets=[np.arange(20)], seeds=[0], num_outputs=2)
    arguments |= dict(head=Head(kind="attention", hidden_width=8), training=Training(steps=10))
    expected = train_heads(slices, y, mask=mask, **arguments)
    slices[:, 1] = np.nan
    np.testing.assert_array_equal(train_heads(slices, y, mask=mask, **arguments), expected)

    head = start_attention_head(0, num_features=4, hidden_width=3, num_outputs=1)
    weights = head.weights(torch.randn(1, 3, 4), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]]))


def test_smote_and_class_weights_raise_the_smaller_class_and_leave_the_features_alone():
    rng = np.random.default_rng(6)
    y = (np.arange(300) % 10 == 0).astype(int)
    x = rng.standard_normal((300, 4)).astype(np.float32)
    x[:, 0] += y
    before = x.copy()
    means = []
    for training in (
        SHORT,
        Training(steps=200, learning_rate=3e-3, smote=True),
        Training(steps=200, learning_rate=3e-3, class_weights="balanced"),
    ):
        p = train_heads(x, y, subsets=[np.arange(200)], seeds=[0], num_outputs=2, head=SMALL, training=training)
        assert p.shape == (1, 300, 2)
        means.append(p[0, 200:, 1].mean())
    assert means[1] > means[0] + 0.1 and means[2] > means[0] + 0.1
    np.testing.assert_array_equal(x, before)


def test_the_same_seed_gives_the_same_head_and_another_seed_another():
    x, y = classes_of(20)
    a, b, c = train_heads(x, y, subsets=[np.arange(20)] * 3, seeds=[5, 5, 6], num_outputs=2, head=SMALL, training=SHORT)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


def test_one_training_scan_and_a_constant_target_do_not_break_a_regressor():
    x, _ = classes_of(4)
    predicted = train_heads(
        x,
        np.array([40.0, 41, 42, 43]),
        subsets=[np.array([2])],
        seeds=[0],
        num_outputs=1,
        head=SMALL,
        training=Training(loss="squared_error", steps=50, learning_rate=1e-2),
    )
    assert predicted[0, 2, 0] == pytest.approx(42.0, abs=1.0)


@pytest.mark.parametrize(
    ("targets", "head", "training", "message"),
    [
        (np.arange(6) // 3, SMALL, SHORT, r"head 1 \(seed 9\): all 3 training cases are of class 0"),
        (np.array([[1, 1], [2, 0], [3, 0], [4, 1], [5, 1], [6, 1]][::-1]), SMALL, Training(loss="cox"), None),
        (np.array([[1, 0], [2, 0], [3, 0], [4, 1], [5, 1], [6, 1]]), SMALL, Training(loss="cox"),
         r"head 1 \(seed 9\): no event among 3 training cases"),
        (np.arange(6.0), Head(kind="logistic"), Training(loss="squared_error"), "logistic regression tells classes"),
        (np.arange(6) % 2, Head(kind="attention"), SHORT, r"expected \(n, S, D\)"),
        (np.arange(6) % 3, SMALL, SHORT, "class indices from 0 to 2; expected 0 to 1"),
        (np.arange(6.0) - 1, SMALL, Training(loss="log_mixed"), "smallest target is -1"),
        (np.array([0, 1, 0, 1, 1, 1]), SMALL, Training(smote=True), "SMOTE of head 1 .seed 9.: class 1 has 1 training"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_the_head(targets, head, training, message):
    x, _ = classes_of(6)
    num_outputs = 2 if training.loss == "cross_entropy" else 1
    arguments = dict(subsets=[np.arange(6), np.arange(3)], seeds=[8, 9], num_outputs=num_outputs, head=head)
    if message is None:
        assert np.isfinite(train_heads(x, targets, training=training, **arguments)).all()
        return
    with pytest.raises(ValueError, match=message):
        train_heads(x, targets, training=training, **arguments)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"training.smote: found loss cox; only classes"):
        Training(loss="cox", smote=True)
    with pytest.raises(ValueError, match=r"head.dropout: found 1; expected a probability"):
        Head(dropout=1)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_block_of_heads_as_on_a_gpu_is_the_heads_one_by_one(kind, monkeypatch):
    x, y = classes_of(40, 3)
    arguments = dict(subsets=[np.arange(9), np.arange(20), np.arange(30)], seeds=[0, 1, 2], num_outputs=3)
    arguments |= dict(head=Head(kind=kind, hidden_width=16, dropout=0.2))
    arguments |= dict(training=Training(steps=30, learning_rate=1e-3, smote=True))
    alone = train_heads(x, y, **arguments)
    run_blocks = heads_module._run_blocks
    monkeypatch.setattr(heads_module, "_run_blocks", lambda *args, on_cpu: run_blocks(*args, on_cpu=not on_cpu))
    np.testing.assert_allclose(train_heads(x, y, **arguments), alone, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heads_on_a_gpu_are_those_of_the_cpu():
    x, y = classes_of(40, 3)
    arguments = dict(subsets=[np.arange(20), np.arange(30)], seeds=[0, 1], num_outputs=3)
    for kind in ("mlp", "linear"):
        arguments |= dict(head=Head(kind=kind, hidden_width=16), training=Training(steps=30, learning_rate=1e-3))
        there = train_heads(x, y, device="cuda", **arguments)
        np.testing.assert_allclose(there, train_heads(x, y, **arguments), atol=1e-3)
