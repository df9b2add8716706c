"""The front door, its doctor, the hold-out verb and chains of commands."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest

from braindino import __version__, cli, demo, doctor, hold_out
from braindino.manifest import Scan, write_scans
from braindino.splits import read_subjects
from braindino.steps import Step, run_steps


def test_every_verb_has_a_program_behind_it() -> None:
    for name, verb in cli.VERBS.items():
        module = importlib.import_module(verb.module)
        assert callable(module.main), name
        assert f'@command_line("{name}"' in inspect.getsource(module), f"{name}: its errors would be tracebacks"


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    try:
        code = cli.main([name, "-h"])
    except SystemExit as stop:  # argparse's and tyro's way
        code = stop.code
    assert code in (0, None)
    assert "usage" in capsys.readouterr().out.lower()


def test_the_door_lists_its_verbs_and_refuses_others(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in cli.VERBS)
    assert cli.main([]) == 2
    assert cli.main(["prepair"]) == 2
    assert "no verb 'prepair'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_ctrl_c_while_libraries_load_is_a_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["evaluate"]) == 130
    assert capsys.readouterr().err == "braindino evaluate: interrupted\n"


def test_the_doctor_names_machine_tools_and_plugin(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for word in ("cores", "python", "torch", "sdpa: works", "hd-bet", "hd-bet-offline", "nnunetv2"):
        assert word in out
    assert doctor.main(["--fix"]) == 2


def prepared(folder: Path) -> Path:
    scans = [Scan(path=f"/x/sub-{n}_T1w.nii.gz", cohort="sim", subject=f"sub-{n}", sequence="T1") for n in range(10)]
    bad = Scan(
        path="/x/sub-bad_T1w.nii.gz", cohort="sim", subject="sub-bad", status="quarantined", reason="constant: 0"
    )
    write_scans(folder / "scans.tsv", [*scans, bad])
    rows = ["participant_id\ttumor", *(f"sub-{n}\t{n % 2}" for n in range(10))]
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_subjects_are_held_out_in_proportion_to_a_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = prepared(tmp_path)
    arguments = ["--prepared", str(folder), "--out", str(tmp_path / "held.txt"), "--test-fraction", "0.4"]
    assert hold_out.main([*arguments, "--participants", str(folder / "participants.tsv"), "--strata", "tumor"]) == 0
    held = read_subjects(tmp_path / "held.txt")
    assert len(held) == 4 and "sim/sub-bad" not in held
    assert sorted(int(key[-1]) % 2 for key in held) == [0, 0, 1, 1]
    assert "6 subjects to train on, 4 held out" in capsys.readouterr().out


def test_a_column_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = prepared(tmp_path)
    arguments = ["--prepared", str(folder), "--out", str(tmp_path / "held.txt"), "--strata", "site"]
    assert hold_out.main(arguments) == 1
    assert "--strata needs --participants" in capsys.readouterr().err
    assert hold_out.main([*arguments, "--participants", str(folder / "participants.tsv")]) == 1
    assert "expected participant_id and site" in capsys.readouterr().err
    assert not (tmp_path / "held.txt").exists()


def python(title: str, code: str, **environment: str) -> Step:
    return Step(title, [sys.executable, "-c", code], environment)


def test_a_chain_runs_in_order_keeps_a_log_and_stops_at_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    steps = [
        python("first", "import os; print('one', os.environ['WORD'])", WORD="a b"),
        python("broken", "raise SystemExit(4)"),
        python("never", "print('three')"),
    ]
    with pytest.raises(ValueError, match=r"step 2 \(broken\) ended with code 4"):
        run_steps(steps, log_path=tmp_path / "commands.log", headline="A chain")
    out = capfd.readouterr().out
    assert "one a b" in out and "three" not in out
    log = (tmp_path / "commands.log").read_text()
    assert log.startswith("# A chain\n# 1. first, ") and "WORD='a b' " in log and "broken" not in log


def test_quarantined_scans_do_not_stop_a_chain(tmp_path: Path) -> None:
    step = python("some were bad", "raise SystemExit(3)")._replace(allowed=(0, 3))
    assert run_steps([step], log_path=tmp_path / "log", headline="") >= 0


def test_the_demo_holds_the_same_subjects_out_everywhere(tmp_path: Path) -> None:
    steps = demo.build_steps(tmp_path, demo.Demo())
    held_out = str(tmp_path / "held-out.txt")
    users = [step.command[1] for step in steps if held_out in step.command]
    assert users == ["split", "pretrain", "nnunet", "evaluate", "evaluate", "evaluate"]
