"""Each mistake of a user ends in one paragraph, the documented exit code, no traceback, and a run that goes on once mended."""

import json
import os

import pytest

from iterative_sft_cli.cli import run


def fails(capsys, *argv: str) -> tuple[int, str]:
    code = run(list(argv))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and "\n\n" not in captured.err.strip()
    return code, captured.err


def goes_on(capsys, config, tmp_path) -> None:
    assert run(["train", str(config)]) == 0, capsys.readouterr().err
    capsys.readouterr()
    stats = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [row["round"] for row in stats] == [0, 1]


def test_missing_model(toy, tmp_path, capsys):
    config = toy(rounds=1, model={"path": "no/such/folder", "use": None})
    code, err = fails(capsys, "train", str(config))
    assert code == 4 and "no/such/folder" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_wrong_column(toy, tmp_path, capsys):
    code, err = fails(capsys, "train", str(toy(rounds=1, prompts={"prompt": "qestion"})))
    assert code == 4 and "qestion" in err and "question" in err and "answer" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_empty_prompt_file(toy, tmp_path, capsys):
    config = toy(rounds=1)
    (tmp_path / "prompts.jsonl").write_text("")
    code, err = fails(capsys, "train", str(config))
    assert code == 4 and "prompts.jsonl" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_broken_json_line_is_named(toy, tmp_path, capsys):
    config = toy(rounds=1)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:4], '{"question": "1+1", "ans', *lines[4:]]) + "\n")
    code, err = fails(capsys, "train", str(config))
    assert code == 4 and "prompts.jsonl:5" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_unknown_filter(toy, tmp_path, capsys):
    code, err = fails(capsys, "train", str(toy(rounds=1, filters=["finished", "numeric_anser"])))
    assert code == 2 and "numeric_anser" in err and "numeric_answer" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_filter_with_a_wrong_argument(toy, tmp_path, capsys):
    code, err = fails(capsys, "train", str(toy(rounds=1, filters=[{"length": {"maximum": 3}}])))
    assert code == 2 and "maximum" in err and "max" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="a path below a file is refused differently elsewhere")
@pytest.mark.parametrize(
    ("code", "attribute", "exit_code", "said"),
    [
        ("1 / 0\n", "make", 5, "an error inside the import of"),
        ("def make(config): ...\n", "mak", 2, "has no attribute `mak`. Did you mean `make`?"),
    ],
)
def test_backend_whose_file_fails_or_has_another_name(toy, tmp_path, capsys, code, attribute, exit_code, said):
    (tmp_path / "mine.py").write_text(code)
    found, err = fails(capsys, "train", str(toy(rounds=1, model={"use": f"mine.py:{attribute}"})))
    assert found == exit_code and "model.use" in err and said in " ".join(err.split())
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_unwritable_output_dir(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    code, err = fails(capsys, "train", str(toy(rounds=1, output_dir="file/run")))
    assert code == 4 and "file" in err
    goes_on(capsys, toy(rounds=1), tmp_path)


def test_foreign_folder_is_left_alone(toy, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("my work")
    code, err = fails(capsys, "train", str(toy(rounds=1)))
    assert code == 4 and "thesis.tex" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_no_accepted_sample(toy, tmp_path, capsys):
    config = toy(rounds=1, filters=[{"length": {"max": 1}}])
    code, err = fails(capsys, "train", str(config))
    assert code == 3 and "none of 48 samples" in err and "hint:" in err
    goes_on(capsys, toy(rounds=1, filters=[{"length": {"max": 1}}], guards={"on_empty": "skip"}), tmp_path)


def test_every_sample_truncated(toy, tmp_path, capsys):
    code, err = fails(capsys, "train", str(toy(rounds=1, generate={"max_new_tokens": 4})))
    assert code == 3 and "max_new_tokens" in err


def test_every_config_error_at_once_with_its_place(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: m\noutput_dir: out\nrounds: 0\ngenerate: {temprature: 1.0}\ntrain: {data: replace}\nprompts: {path: p}\n"
    )
    code, err = fails(capsys, "train", str(path))
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) >= 3
    assert any(line.startswith(f"{path}:3:") for line in lines)
    assert any("temprature" in line and "temperature" in line for line in lines)
    assert any("start_from" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_missing_config_and_unknown_command(capsys):
    code, err = fails(capsys, "train", "no-such-file.yaml")
    assert code == 2 and "no-such-file.yaml" in err
    code, err = fails(capsys, "trian")
    assert code == 2 and "train" in err
