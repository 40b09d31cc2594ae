"""What the README says can be done: its commands parse, its ImageNet recipes run."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from family import TRAINING
from test_runs import TINY

import supervised
import tables

README = (ROOT / "README.md").read_text()
METHODS = [name.removesuffix(".py") for name in TRAINING]
IMAGENET = re.search(r'^    IMAGENET="(.*)"$', README, re.M)[1]
RECIPES = [command.replace("$IMAGENET", IMAGENET) for command in re.findall(
    r"^\|.*\| `torchrun --nproc-per-node 8 (\w+\.py \$IMAGENET .*)` \|$", README, re.M)]


def test_recipes_are_found():
    assert len(RECIPES) == 14 and "$" not in "".join(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: " ".join(r.split()[-6:]))
def test_recipe(recipe, image_folder, tmp_path, monkeypatch):
    """Five steps on small images, as written but for data and batch, layers of 8192 made smaller,
    and the linear probe, whose hundreds of steps other tests take."""
    name, *flags = shlex.split(recipe.replace("8192", "96"))
    flags[flags.index("--data") + 1] = str(image_folder)
    flags[flags.index("--batch-size") + 1] = "8"
    flags += ["--device", "cpu", "--image-size", "8"]
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(script, "linear_probe", lambda *sets: 0.0)
    saved = {}  # instead of hundreds of megabytes on the disk
    monkeypatch.setattr(script, "save", lambda value, path: saved.update({path.name: value}))
    metrics = script.main([*flags, "--steps", "5", "--no-stream", "--out", str(tmp_path / "run")])
    assert metrics["step"] == 5
    checkpoint = saved["last.pt"]
    assert checkpoint["args"]["arch"] == "resnet50" and checkpoint["args"]["optimizer"] == "lars"
    assert checkpoint["args"]["blur"] == [1.0, 0.1] and checkpoint["args"]["warmup"] == 10


def commands():
    """Every command of the README that calls a script, in code blocks and in backquotes."""
    for text in re.findall(r"^    (.*)$|`([^`\n]+)`", README, re.M):
        text = re.sub(r"\s#.*|\.\.\.$", "", "".join(text)).strip()
        found = re.search(rf"(?:^|\s)(?:python|torchrun.*?) ((?:{'|'.join(METHODS)})\.py.*)", text)
        if found and "$" not in text:
            yield found[1]


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_command_parses(command, tmp_path, monkeypatch):
    """With the flags that the scripts have; --list prints, --resume wants a run that is not here.
    """
    name, *flags = shlex.split(command)
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    if "--list" in flags or "--resume" in flags:
        with pytest.raises(SystemExit) as stop:
            script.parse_args(flags)
        assert stop.value.code == (0 if "--list" in flags else 2)
    else:
        assert script.parse_args(flags).lr > 0


def test_files_that_it_names_exist():
    """Links to logs and pictures, and the scripts of its table."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 40
    for link in links:
        assert (ROOT / link).exists(), link
    for name in re.findall(r"^\| `(\S+\.py)` \|", README, re.M):
        assert Path(ROOT / name).is_file()


def test_diff_counts():
    """The numbers of lines that it gives for two diffs, as `diff` prints them."""
    for pair, count in ((("simclr.py", "vicreg.py"), r"prints (\d+) lines"),
                        (("simclr.py", "directclr.py"), r"simclr.py directclr.py`: (\d+)"),
                        (("vicreg.py", "interpolate.py"), r"vicreg.py interpolate.py`: (\d+)")):
        out = subprocess.run(["diff", *pair], cwd=ROOT, capture_output=True, text=True).stdout
        assert len(out.splitlines()) == int(re.search(count, README)[1])


def test_tables_are_their_logs():
    """Each table of results is what its logs give, and every log that is kept stands in one."""
    assert README == tables.write(README)
    shown = set(re.findall(r"\]\((tests/results/\S+\.jsonl)\)", README))
    kept = {str(path.relative_to(ROOT)) for path in tables.RESULTS.rglob("*.jsonl")}
    assert shown == kept and len(kept) >= 45


def test_speeds_are_their_logs():
    """Every row of a table in a section that links benchmarks' logs is a line of one of them."""
    found = 0
    for section in README.split("\n## "):
        logs = re.findall(r"\]\((tests/results/benchmark-\S+\.txt)\)", section)
        lines = {line for log in logs for line in (ROOT / log).read_text().splitlines()}
        rows = [line for line in section.splitlines() if logs and line.startswith("|")]
        assert {*rows} <= lines
        found += len(rows)
    assert found >= 18


@pytest.mark.parametrize("name", tables.TABLES)
def test_logs_are_of_their_commands(name):
    """Every command of a table parses, and the log that it left holds its arguments."""
    for row in tables.TABLES[name]:
        for log, command in tables.runs(row):
            file, *flags = command.split()
            script = importlib.import_module(file.removesuffix(".py"))
            args, records = script.parse_args(flags), tables.read(log)
            if records:
                script.Model(args, records[0]["image_size"], 10)  # which fills in what is left open
                kept = records[0]["args"]
                free = {"out", "resume", "steps", "workers"}
                assert records[0]["method"] == script.METHOD
                assert records[-1]["step"] == args.epochs * records[0]["steps_per_epoch"]
                assert {k: v for k, v in kept.items() if k not in free} == {
                    k: v for k, v in vars(args).items() if k in kept and k not in free}, log


def test_tables_are_trained_and_written(image_folder, tmp_path, monkeypatch, capfd):
    """Two seeds of a row, one of them stopped before and gone on with, and one that fails."""
    flags = f"simclr.py --data {image_folder} {' '.join(TINY)} --steps 4"
    rows = [tables.Row("`good`", flags, "some/good", "68", 2),
            tables.Row("`bad`", f"{flags} --arch vgg", "some/bad")]
    monkeypatch.setattr(tables, "TABLES", {"some": rows, "none": [rows[1]]})
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RUNS", tmp_path / "runs")
    simclr = importlib.import_module("simclr")
    simclr.main([*flags.split()[1:-2], "--steps", "2", "--out", str(tmp_path / "runs/some/good")])
    assert tables.train(["some"], 2, 10) == 1
    assert "invalid choice: 'vgg'" in capfd.readouterr().out
    finals = [tables.read(name)[-1] for name in ("some/good", "some/good-seed1")]
    assert [final["step"] for final in finals] == [4, 4] and not tables.read("some/bad")
    text = tables.write("a\n<!-- table: some -->\n\n| old |\n\nb\n<!-- table: none -->\n\nc\n")
    assert text.startswith("a\n<!-- table: some -->\n\n|  | kNN | ") and "old" not in text
    assert text.endswith("|\n\nb\n<!-- table: none -->\n\nc\n") and text == tables.write(text)
    mean = sum(final["knn"] for final in finals) / 2
    spread = abs(finals[0]["knn"] - finals[1]["knn"]) / 2**0.5
    (line,) = [line for line in text.splitlines() if "`good`" in line]
    assert f"| {mean:.1f} ± {spread:.1f} |" in line and "| 68 |" in line
    assert "(tests/results/some/good-seed1.jsonl)" in line and "`bad`" not in text
    tables.train(["some"], 1, 0)  # what is finished is not trained again, and there is no time
    assert "1 runs to train" in capfd.readouterr().out


def test_supervised_training_learns(image_folder, tmp_path, capsys):
    """By heart, where the test images are the training images; it prints JSON lines alone."""
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(image_folder / "train")
    accuracy = supervised.main(["--data", str(tmp_path), *TINY, "--epochs", "20", "--lr", "1",
                                "--crop", "1", "1", "--flip", "0"])
    first, *epochs, final = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["args"]["jitter_prob"] == 0 and len(epochs) == 20
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert final == {"final": True, "accuracy": accuracy} and accuracy > 80
