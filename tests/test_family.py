"""The scripts differ in the method alone, and keep their form; and the checker notices when not."""

import argparse
import ast
import importlib
import shutil
import subprocess
import sys

import pytest
from family import LINES, ROOT, SCRIPTS, TRAINING, drift, fix, sections

TEXTS = {name: (ROOT / name).read_text() for name in SCRIPTS}
FAMILY = {name: TEXTS[name] for name in TRAINING}
METHOD_FLAGS = {  # the flags in which each script differs from the others, the whole list
    "simclr.py": "dim hidden head temperature lr",
    "vicreg.py": "dim hidden sim-coeff std-coeff cov-coeff lr",
    "directclr.py": "dim head temperature lr",
    "interpolate.py": "method list blend alpha normalize dim hidden head temperature sim-coeff "
                      "std-coeff cov-coeff mu off-diagonal eps tcr-coeff lr",
}

def test_every_script_is_covered():
    assert sorted(p.name for p in ROOT.glob("*.py")) == sorted(SCRIPTS)
    assert set(LINES) == {*SCRIPTS, "README.md", "tests/*.py"}

@pytest.mark.parametrize("pattern", LINES)
def test_lines_stay_within_budget(pattern):
    files = [path.read_text() for path in ROOT.glob(pattern)]
    assert files and sum(len(text.splitlines()) for text in files) <= LINES[pattern]

@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_cover_the_file(name):
    parts, training = sections(TEXTS[name]), name in TRAINING
    assert "".join(part[3] for part in parts) == TEXTS[name]
    tags = [part[2] for part in parts]
    assert tags == ["method", "shared", "method", *["shared"] * 7] if training else (
        tags[1:] == ["own"] * len(tags[1:]) and len(tags) > 3)

def test_shared_sections_are_identical():
    found = drift(FAMILY)
    assert not found, "\n".join(found) + "\nrepair: python tests/family.py --fix SCRIPT"

def flags(script, monkeypatch):
    """Every option of a script's parser, and the names of those that add_method_args gives it."""
    caught, names, module = [], [], importlib.import_module(script.removesuffix(".py"))
    def stop(self, *args, **kwargs):
        caught.extend(self._actions)
        raise SystemExit
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        module.parse_args([])
    module.add_method_args(lambda name, **options: names.append(name))
    return {a.option_strings[-1]: (a.option_strings, getattr(a.type, "__qualname__", a.type),
                                   a.default, a.choices, a.help, a.nargs) for a in caught}, names

def test_flags_are_equal_but_for_the_methods(monkeypatch):
    shared = []
    for script in TRAINING:
        options, names = flags(script, monkeypatch)
        assert names == [f"--{name}" for name in METHOD_FLAGS[script].split()]
        assert all(option[4] or option[3] for option in options.values())  # help or choices
        shared.append({name: option for name, option in options.items() if name not in names})
    assert len(shared[0]) > 20 and "--jitter" in shared[0]
    assert all(options == shared[0] for options in shared)

DEFINITION = ast.FunctionDef, ast.ClassDef

def faults(name, text):
    """What is wrong with a script's imports and form, as a list of lines."""
    found = [f"over 100 columns: {line}" for line in text.splitlines() if len(line) > 100]
    tree, lines, training = ast.parse(text), text.splitlines(), name in TRAINING
    found += ["two blank lines"] * (training and "\n\n\n" in text)
    allowed = {*sys.stdlib_module_names, "torch", "numpy"}
    allowed |= {"torchvision", "PIL"} if training else set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", a.name).split(".")[0] for a in node.names]
            inside = node not in tree.body
            extra = {"matplotlib"} if inside and not training else set()
            if not {*modules} <= allowed | extra or inside and training:
                found.append(f"import: {ast.unparse(node)}")
        if isinstance(node, ast.FunctionDef):
            most = 80 if node.name in ("main", "train", "parse_args") else 59
            found += [f"{node.name} is too long"] * (node.end_lineno - node.lineno + 1 > most)
    for node in tree.body[1:]:
        entry = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        if not (entry or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, *DEFINITION))):
            found.append(f"happens at import: {ast.unparse(node)}")
        if isinstance(node, DEFINITION):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            while lines[first - 2].startswith("#"):
                first -= 1
            found += [f"no docstring: {node.name}"] * (not ast.get_docstring(node))
            found += [f"no blank line: {node.name}"] * bool(lines[first - 2])
    return found

@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    assert faults(name, TEXTS[name]) == []

def broken(old, new, name="vicreg.py"):
    """A script with one change, which must be possible."""
    assert old in TEXTS[name] and old != new
    return TEXTS[name].replace(old, new, 1)

JSON, ARGS, DEF = "import json\n", "    args = parse_args(argv)\n", "\ndef fail"

@pytest.mark.parametrize("name, old, new, message", [
    ("vicreg.py", JSON, "import json, sklearn\n", "import: import json, sklearn"),
    ("vicreg.py", ARGS, "    from matplotlib import pyplot\n", "import: from matplotlib"),
    ("analyze.py", JSON, "from matplotlib import pyplot\n", "import: from matplotlib"),
    ("analyze.py", JSON, "import torchvision\n", "import: import torchvision"),
    ("vicreg.py", JSON, "import json  # " + 90 * "x" + "\n", "over 100 columns"),
    ("vicreg.py", DEF, "\n" + DEF, "two blank lines"),
    ("vicreg.py", DEF, DEF[1:], "no blank line: fail"),
    ("vicreg.py", DEF, f"\nprint(1)\n{DEF}", "happens at import: print(1)"),
    ("vicreg.py", "    loader = ", 60 * "    pass\n" + "    loader = ", "fetch is too long"),
    ("vicreg.py", ARGS, 81 * "    pass\n", "main is too long"),
    ("vicreg.py", '    """End the ', '    f"""End the ', "no docstring: fail")])
def test_checker_notices_bad_form(name, old, new, message):
    found = faults(name, broken(old, new, name))
    assert len(found) == 1 and found[0].startswith(message)

@pytest.mark.parametrize("old, new", [
    ("k=10", "k=11"), ("\ndef random_crop", "\n\ndef random_crop"),
    ("import json\n", "import json\nimport random\n"), ("\n# ==== 8. ", "# a line\n\n# ==== 8. "),
    ("7. Optimiser", "7. Optimizer"), ("7. Optimiser [shared]", "7. Optimiser [method]")])
def test_checker_notices_drift_and_fix_repairs_it(old, new):
    """And keeps the method."""
    text = broken(old, new).replace("25.0", "26.0")
    assert drift({**FAMILY, "vicreg.py": text})
    if not new.startswith("7."):
        repaired = fix(TEXTS["simclr.py"], text)
        assert not drift({**FAMILY, "vicreg.py": repaired}) and "26.0" in repaired

@pytest.mark.parametrize("old, new", [
    ("# ==== 5. ", "# ==== 6. "), ("# ==== 5. ", "# === 5. "), ("[shared] ===", "[shard] ==="),
    ("[shared] ===", "[shared] ==")])
def test_checker_refuses_malformed_banners(old, new):
    with pytest.raises(ValueError):
        drift({**FAMILY, "vicreg.py": broken(old, new)})

def test_fix_from_the_command_line(tmp_path):
    """Only what drifted is written."""
    (tmp_path / "tests").mkdir()
    for name in ("tests/family.py", *SCRIPTS):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "vicreg.py").write_text(broken("k=10", "k=11"))
    command = [sys.executable, str(tmp_path / "tests/family.py"), "--fix", "simclr.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "vicreg.py: shared sections now simclr.py's\n"
    assert {name: (tmp_path / name).read_text() for name in SCRIPTS} == TEXTS
    command[-1] = "analyze.py"
    assert subprocess.run(command, capture_output=True).returncode == 2
