import pytest
import torch

from braindino.devices import choose_device, choose_devices


def test_auto_is_a_gpu_where_there_is_one(monkeypatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for there, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("name", ["banana", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(name) -> None:
    with pytest.raises(ValueError, match=rf"--device {name}: .+; expected auto, cpu, or a GPU that PyTorch finds"):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "found", "chosen"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("cpu", 2, ["cpu"]),
    ],
)
def test_a_program_with_a_process_for_each_takes_all_gpus_or_one(name, found, chosen, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert choose_devices(name) == chosen


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("cuda", 0, "--device cuda: PyTorch finds no GPU here; use --device cpu"),
        ("cuda:2", 2, "--device cuda:2: PyTorch finds only cuda:0, cuda:1 here"),
        ("mps", 2, "--device: found 'mps'; expected auto, cpu, cuda, or one GPU such as cuda:1"),
        ("cuda:x", 2, "--device: found 'cuda:x'; expected auto"),
    ],
)
def test_gpus_that_are_not_there_are_refused_with_those_that_are(name, found, message, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=message):
        choose_devices(name)
