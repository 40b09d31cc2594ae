"""What the README says can be done: its commands parse, its ImageNet recipes run, its figures are
those of the logs."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from family import TRAINING

import tables

README = (ROOT / "README.md").read_text()
METHODS = [name.removesuffix(".py") for name in TRAINING]
IMAGENET = re.search(r'^    IMAGENET="(.*)"$', README, re.M)[1]
RECIPES = [command.replace("$IMAGENET", IMAGENET) for command in re.findall(
    r"^\|.*\| `torchrun --nproc-per-node 8 (\w+\.py \$IMAGENET .*)` \|$", README, re.M)]

def test_recipes_are_found():
    """And need the memory that was counted."""
    assert len(RECIPES) == 12 and "$" not in "".join(RECIPES)
    rows = re.findall(r"^\| .* \| ([\d.]+) \| `torch.* (\w+\.py) \$IMAGENET (.*)` \|$", README, re.M)
    counted = (tables.RESULTS / "benchmark-memory.txt").read_text()
    assert len(rows) == 12 and all(f"| `{a} {b}` | {gib} |" in counted for gib, a, b in rows)

@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: " ".join(r.split()[-6:]))
def test_recipe(recipe, image_folder, tmp_path, monkeypatch):
    """Five steps on small images, as written but for data and batch, layers of 8192 made smaller,
    and the evaluation, which other tests take."""
    name, *flags = shlex.split(recipe.replace("8192", "96"))
    flags[flags.index("--data") + 1] = str(image_folder)
    flags[flags.index("--batch-size") + 1] = "8"
    flags += ["--device", "cpu", "--image-size", "8", "--workers", "0"]
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(script, "evaluate", lambda *args, **options: {"knn": 0.0})
    saved = {}  # instead of hundreds of megabytes on the disk
    monkeypatch.setattr(script, "save", lambda value, path: saved.update({path.name: value}))
    metrics = script.main([*flags, "--steps", "5", "--out", str(tmp_path / "run")])
    assert metrics["step"] == 5
    kept = saved["last.pt"]["args"]
    assert kept["arch"] == "resnet50" and kept["optimizer"] == "lars"
    assert kept["blur"] == [1.0, 0.1] and kept["epochs"] == 100 and kept["warmup"] == 0.1

def commands():
    """Every command of the README that calls a script, in code blocks and in backquotes."""
    for text in re.findall(r"^    (.*)$|`([^`\n]+)`", README, re.M):
        text = re.sub(r"\s#.*|\.\.\.$", "", "".join(text)).strip()
        found = re.search(rf"(?:^|\s)(?:python|torchrun.*?) ((?:{'|'.join(METHODS)})\.py.*)", text)
        if found and "$" not in text:
            yield found[1]

@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_command_parses(command, tmp_path, monkeypatch):
    """With the flags that the scripts have; --list prints, --resume wants a run that is missing."""
    name, *flags = shlex.split(command)
    script = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    if "--list" in flags or "--resume" in flags:
        with pytest.raises(SystemExit) as stop:
            script.parse_args(flags)
        assert stop.value.code == (0 if "--list" in flags else 2)
    else:
        assert script.parse_args(flags).lr > 0

@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_files_that_it_names_exist(page):
    links = re.findall(r"\]\(([^):]+)\)", page.read_text())
    assert len(links) >= 4
    assert [link for link in links if not (page.parent / link).exists()] == []

def test_diff_counts():
    """The numbers of lines that it gives for three diffs, as `diff` prints them; may only fall."""
    for pair, most, count in (("simclr.py vicreg.py", 97, r"prints (\d+) lines: the docstring"),
                              ("simclr.py directclr.py", 107, r"directclr.py` prints (\d+) lines"),
                              ("vicreg.py interpolate.py", 248, r"interpolate.py` (\d+)\.")):
        out = subprocess.run(["diff", *pair.split()], cwd=ROOT, capture_output=True, text=True)
        assert len(out.stdout.splitlines()) == int(re.search(count, README)[1]) <= most

def test_tables_are_their_logs():
    """Each table is what its logs give, and every log that is kept stands in one; so are the means
    of claims, the last line of the first command and what the text says of VICReg's loss."""
    shown, source, claims = set(), *README.split("| claim |")
    for page in tables.PAGES:
        text = page.read_text()
        assert text == tables.write(text, page.parent)
        shown |= {(page.parent / log).resolve() for log in re.findall(r"\]\((\S+\.jsonl)\)", text)}
        source += text * (page != tables.PAGES[0])
    means = re.findall(r"[\d.]+ \([\d.]+ to [\d.]+\)", claims)
    assert len(means) > 15 and not [mean for mean in means if f" {mean} |" not in source]
    kept = set(tables.RESULTS.rglob("*.jsonl"))
    assert shown == kept and len(kept) >= 9
    final = tables.read("shapes/vicreg")[-1]
    line = re.search(r"^    final True.*$", README, re.M)[0]
    for name in ("knn", "linear", "rank", "knn_untrained", "linear_untrained", "step"):
        assert re.search(rf" {name} {final[name]:.4g} ", line + " "), name
    speeds = (tables.RESULTS / "benchmark-cpu.txt").read_text()
    ours, theirs = re.search(r"\| 256 \| 8192 \| ([\d.]+) \| ([\d.]+) \|", speeds).groups()
    assert f"take {float(ours):.0f} ms" in README.replace("\n", " ")
    assert f"takes {float(theirs) / 1000:.1f} s" in README.replace("\n", " ")

@pytest.mark.parametrize("name", tables.TABLES)
def test_logs_are_of_their_commands(name):
    """Every command of a table parses, and the log that it left holds its arguments."""
    for row in tables.TABLES[name]:
        for log, command in tables.runs(row):
            file, *flags = command.split()
            script = importlib.import_module(file.removesuffix(".py"))
            args, records = script.parse_args(flags), tables.read(log)
            if records:
                kept = {**vars(script.parse_args([])), **records[0]["args"]}  # flags since
                free = {"out", "resume", "steps", "workers"}
                assert records[0]["method"] == script.METHOD
                assert records[-2]["epoch"] == args.epochs
                assert {k: v for k, v in kept.items() if k not in free} == {
                    k: v for k, v in vars(args).items() if k not in free}, log

def test_tables_are_trained_and_written(image_folder, tmp_path, monkeypatch, capfd):
    """Two seeds of a row, one gone on with after a stop, one killed before it saved; a failure."""
    flags = (f"simclr.py --data {image_folder} --arch convnet --batch-size 20 --dim 32 --epochs 3 "
             "--device cpu --workers 0 --steps 4")
    rows = [tables.Row("`good`", flags, "some/good", "68", 2),
            tables.Row("`bad`", f"{flags} --arch vgg", "some/bad")]
    monkeypatch.setattr(tables, "TABLES", {"some": rows, "none": [rows[1]]})
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RUNS", tmp_path / "runs")
    simclr = importlib.import_module("simclr")
    simclr.main([*flags.split()[1:-2], "--steps", "2", "--out", str(tmp_path / "runs/some/good")])
    os.mkdir(killed := tmp_path / "runs/some/good-seed1")
    (killed / "log.jsonl").write_text("{}\n")
    assert tables.train(["some"], 2, 10) == 1
    assert "invalid choice: 'vgg'" in capfd.readouterr().out
    finals = [tables.read(name)[-1] for name in ("some/good", "some/good-seed1")]
    assert [final["step"] for final in finals] == [4, 4] and not tables.read("some/bad")
    text = tables.write("a\n<!-- table: some -->\n\n| old |\n\nb\n<!-- table: none -->\n\nc\n",
                        tmp_path)
    assert text.startswith("a\n<!-- table: some -->\n\n|  | kNN | ") and "old" not in text
    assert text.endswith("|\n\nb\n<!-- table: none -->\n\nNot trained yet.\n\nc\n")
    assert text == tables.write(text, tmp_path)
    values = [final["knn"] for final in finals]
    (line,) = [line for line in text.splitlines() if "`good`" in line]
    assert f"{sum(values) / 2:.1f} ({min(values):.1f} to {max(values):.1f})" in line
    assert "| 68 |" in line and "(results/some/good-seed1.jsonl)" in line and "`bad`" not in text
    tables.train(["some"], 1, 0)  # what is finished is not trained again, and there is no time
    assert "1 runs to train" in capfd.readouterr().out
