import pytest
import torch

from braindino.devices import choose_device


def test_auto_is_a_gpu_where_there_is_one(monkeypatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for there, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("name", ["banana", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(name) -> None:
    with pytest.raises(ValueError, match=rf"--device {name}: .+; expected auto, cpu, or a GPU that PyTorch finds"):
        choose_device(name)
