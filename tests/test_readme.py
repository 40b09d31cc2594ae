"""What the README says can be done: its commands parse, its ImageNet recipes run."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from family import TRAINING

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
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(script, "linear_probe", lambda *sets: 0.0)
    metrics = script.main([*flags, "--steps", "5", "--no-stream", "--out", str(tmp_path / "run")])
    assert metrics["step"] == 5
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True, mmap=True)
    assert checkpoint["args"]["arch"] == "resnet50" and checkpoint["args"]["optimizer"] == "lars"
    assert checkpoint["args"]["blur"] == [1.0, 0.1] and checkpoint["args"]["warmup"] == 10
    (tmp_path / "run" / "last.pt").unlink()  # hundreds of megabytes


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


def rows():
    """Every row of a table that links a log: (log, {column: cell})."""
    columns = []
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|---"):
            continue
        if line.startswith("|") and "log" in cells:
            columns = cells
        for log in re.findall(r"\[log\]\((tests/results/\S+\.jsonl)\)", line):
            if line.startswith("|"):
                yield log, dict(zip(columns, cells))


def test_tables_are_their_logs():
    """Accuracies, effective rank and seconds of every row are the last line of the log it links."""
    found = [*rows()]
    assert len(found) >= 45
    for log, cells in found:
        first, *_, final = map(json.loads, (ROOT / log).read_text().splitlines())
        names = {"kNN": "knn", "linear": "linear", "online": "online", "effective rank": "rank"}
        for column, name in names.items():
            assert cells[column] == f"{final[name]:.1f}", (log, column)
        if "training" in cells:
            assert cells["training"] == f"{final['seconds']:.0f} s", log
        variant = re.search(r"`([a-z-]+)`", next(iter(cells.values())))
        if variant:
            assert first["args"]["method" if first["method"] == "interpolate" else "head"] == (
                variant[1]), log
