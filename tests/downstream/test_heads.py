import numpy as np
import pytest
import torch
from torch import nn

from braindino.downstream.heads import Heads, MlpHead, train_classifiers, train_regressors
from braindino.downstream.intervals import bootstrap_interval
from braindino.downstream.metrics import accuracy, binary_auc
from braindino.vision_transformer import vit_base

SHORT = MlpHead(loss="cross_entropy", hidden_width=16, steps=200, learning_rate=3e-3)


def test_the_head_is_six_thousandths_of_a_vit_b_with_its_head():
    head = Heads([0], num_features=768, hidden_width=MlpHead(loss="cross_entropy").hidden_width, num_outputs=1)
    trained = sum(parameter.numel() for parameter in head.parameters())
    assert trained == 2 * 768 + 768 * 672 + 672 + 672 + 1
    with torch.device("meta"):
        frozen = sum(parameter.numel() for parameter in vit_base().parameters())
    assert trained / (trained + frozen) == pytest.approx(0.006, abs=5e-5)


def test_each_stacked_head_computes_what_the_torch_layers_compute():
    heads = Heads([3, 4], num_features=5, hidden_width=7, num_outputs=2)
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    outputs = heads(x)
    for m in range(2):
        layers = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2))
        with torch.no_grad():
            layers[1].weight.copy_(heads.hidden_weight[m].T)
            layers[1].bias.copy_(heads.hidden_bias[m, 0])
            layers[3].weight.copy_(heads.output_weight[m].T)
            layers[3].bias.copy_(heads.output_bias[m, 0])
        torch.testing.assert_close(outputs[m], layers(x[m]))


def test_heads_trained_together_are_the_heads_trained_alone():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((30, 4)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 3, 30))
    subsets = [np.arange(20), np.arange(5), np.arange(10, 30)]
    together = train_classifiers(x, y, subsets=subsets, seeds=[0, 1, 1], num_classes=3, head=SHORT)
    for m in range(3):
        alone = train_classifiers(x, y, subsets=[subsets[m]], seeds=[[0, 1, 1][m]], num_classes=3, head=SHORT)
        np.testing.assert_allclose(together[m], alone[0], atol=1e-4)


def test_a_head_learns_separable_classes_and_nothing_from_permuted_labels():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 240)
    x = rng.standard_normal((240, 8)).astype(np.float32)
    x[:, 0] += 3.0 * labels
    train, test = np.arange(120), np.arange(120, 240)
    features = torch.from_numpy(x)
    subjects = [f"s{i}" for i in test]

    learned = train_classifiers(
        features, torch.from_numpy(labels), subsets=[train], seeds=[0], num_classes=2, head=SHORT
    )[0][test]
    right = bootstrap_interval(
        lambda w: accuracy(labels[test], learned.argmax(axis=1), weights=w), subjects, iterations=500
    )
    assert right.low > 0.8

    permuted = rng.permutation(labels)
    guessed = train_classifiers(
        features, torch.from_numpy(permuted), subsets=[train], seeds=[0], num_classes=2, head=SHORT
    )[0][test]
    chance = bootstrap_interval(
        lambda w: binary_auc(permuted[test] == 1, guessed[:, 1], weights=w), subjects, iterations=500
    )
    assert chance.low < 0.5 < chance.high


def test_a_regressor_learns_years_on_the_paper_learning_rate():
    rng = np.random.default_rng(2)
    age = rng.uniform(20, 90, 200).astype(np.float32)
    x = rng.standard_normal((200, 6)).astype(np.float32)
    x[:, 0] = (age - 50) / 10
    head = MlpHead(loss="squared_error", hidden_width=64, steps=2000)
    predicted = train_regressors(
        torch.from_numpy(x), torch.from_numpy(age), subsets=[np.arange(150)], seeds=[0], head=head
    )[0]
    error = np.abs(predicted - age)[150:].mean()
    assert error < 0.5 * np.abs(age[150:] - age[:150].mean()).mean()


def test_the_same_seed_gives_the_same_head_and_another_seed_another():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 2
    a, b, c = train_classifiers(x, y, subsets=[np.arange(20)] * 3, seeds=[5, 5, 6], num_classes=2, head=SHORT)
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a - c).max() > 1e-3


def test_one_training_scan_and_a_constant_target_do_not_break_a_regressor():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([40.0, 41.0, 42.0, 43.0])
    head = MlpHead(loss="squared_error", hidden_width=8, steps=50)
    predicted = train_regressors(x, y, subsets=[np.array([2])], seeds=[0], head=head)
    assert np.isfinite(predicted).all()
    assert predicted[0, 2] == pytest.approx(42.0, abs=1.0)
