"""The scripts differ in the method alone; and the checker notices when they do not."""

import argparse
import ast
import sys

import pytest
from family import ROOT, SCRIPTS, TRAINING, changed_lines, definitions, drift, fix, sections

TEXTS = {name: (ROOT / name).read_text() for name in TRAINING}
METHOD_FLAGS = {  # the flags in which each script differs from the others, the whole list
    "simclr.py": {"dim", "hidden", "head", "temperature", "lr"},
    "vicreg.py": {"dim", "hidden", "head", "sim_coeff", "std_coeff", "cov_coeff", "lr"},
    "directclr.py": {"dim", "head", "temperature", "lr"},
    "interpolate.py": {"method", "list", "blend", "alpha", "normalize", "dim", "hidden", "head",
                       "temperature", "sim_coeff", "std_coeff", "cov_coeff", "mu", "off_diagonal",
                       "eps", "tcr_coeff", "lr"},
}
BUDGET = {  # changed lines of the diff; may only go down
    ("simclr.py", "vicreg.py"): 101,
    ("simclr.py", "directclr.py"): 169,
    ("vicreg.py", "interpolate.py"): 282,
}


def test_every_script_is_covered():
    assert sorted(p.name for p in ROOT.glob("*.py")) == sorted(SCRIPTS)
    assert set(METHOD_FLAGS) == set(TRAINING)


@pytest.mark.parametrize("name", TRAINING)
def test_sections_cover_the_file(name):
    parts = sections(TEXTS[name])
    assert "".join(part[3] for part in parts) == TEXTS[name]
    assert len(parts) == 10
    assert [part[0] for part in parts if part[2] == "method"] == [0, 2]


def test_shared_sections_are_identical():
    found = drift(TEXTS)
    assert not found, "\n".join(found) + "\nrepair: python tests/family.py --fix SCRIPT"


def test_analyze_carries_what_it_needs_unchanged():
    """The sections from the data to the evaluation are shared; the heads are every script's."""
    mine, texts = (ROOT / "analyze.py").read_text(), TEXTS
    parts, shared = sections(mine), [p for p in sections(texts["simclr.py"]) if p[2] == "shared"]
    assert "".join(part[3] for part in parts) == mine
    assert [p for p in parts if p[2] == "shared"] == [p for p in shared if 3 <= p[0] <= 6]
    assert [p[0] for p in parts if p[2] == "own"] == [1, 2, 7, 8, 9, 10]
    mine, simclr, directclr = (definitions(text) for text in (
        mine, texts["simclr.py"], texts["directclr.py"]))
    for name in ("Slice", "Diagonal", "LowRank"):
        assert mine[name] == directclr[name]
    for name, theirs in (("directclr_head", directclr), ("projector", simclr)):
        assert mine[name] == theirs["build_head"].replace("build_head", name, 1)
    for name in ("vicreg.py", "interpolate.py"):
        head = definitions(texts[name])["build_head"].replace("    check_flags(args)\n", "")
        assert head == simclr["build_head"]


@pytest.mark.parametrize("pair", BUDGET, ids="-".join)
def test_changed_lines_stay_within_budget(pair):
    changed = changed_lines(*(TEXTS[name] for name in pair))
    assert changed <= BUDGET[pair]
    assert changed > 0.8 * BUDGET[pair], "the diff shrank: lower the budget"


def flags(script, monkeypatch):
    """Every option of a script's parser: {dest: (flags, type, default, choices, help, nargs)}."""
    caught = {}

    def stop(self, *args, **kwargs):
        caught["parser"] = self
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(SystemExit):
        __import__(script.removesuffix(".py")).parse_args([])
    return {a.dest: (a.option_strings, getattr(a.type, "__qualname__", a.type), a.default,
                     a.choices, a.help, a.nargs) for a in caught["parser"]._actions}


def test_flags_are_equal_but_for_the_methods(monkeypatch):
    every = {name: flags(name, monkeypatch) for name in TRAINING}
    for name, mine in every.items():
        assert METHOD_FLAGS[name] <= set(mine)
    shared = {name: {d: f for d, f in mine.items() if d not in METHOD_FLAGS[name]}
              for name, mine in every.items()}
    first = shared[TRAINING[0]]
    assert len(first) > 25 and "jitter" in first and "blur" in first
    for name in TRAINING:
        assert shared[name] == first


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(name):
    """Standard library, torch, torchvision and numpy; matplotlib only inside a function."""
    tree = ast.parse((ROOT / name).read_text())
    allowed = {"torch", "torchvision", "numpy"} | set(sys.stdlib_module_names)
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            plain = isinstance(node, ast.Import)
            modules = [a.name for a in node.names] if plain else [node.module]
            for module in (m.split(".")[0] for m in modules):
                assert module in allowed or (module == "matplotlib" and node not in top), module


@pytest.mark.parametrize("name", SCRIPTS)
def test_form(name):
    """100 columns, functions under 60 lines (two 70, main 100), a docstring at the top level."""
    text = (ROOT / name).read_text()
    assert max(map(len, text.splitlines())) <= 100
    longest = {"main": 100, "train": 70, "parse_args": 70}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < longest.get(node.name, 60), node.name
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_happens_at_import(name):
    """The top level holds docstring, imports, definitions, constants and the entry point."""
    for node in ast.parse((ROOT / name).read_text()).body[1:]:
        entry = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert entry or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef,
                                          ast.Assign))


def broken(old, new):
    """The scripts with one change in vicreg.py, which must be possible."""
    text = TEXTS["vicreg.py"]
    assert text.count(old) >= 1
    return {"simclr.py": TEXTS["simclr.py"], "vicreg.py": text.replace(old, new, 1)}


@pytest.mark.parametrize("old, new", [
    ("k=10", "k=11"),
    ("def grayscale", "\ndef grayscale"),
    ("import json\n", "import json\nimport random\n"),
    ("# ==== 7. Optimiser, schedule [shared] ", "# ==== 7. Optimizer, schedule [shared] "),
    ("# ==== 7. Optimiser, schedule [shared] ", "# ==== 7. Optimiser, schedule [method] "),
])
def test_checker_notices_drift(old, new):
    assert drift(broken(old, new))


def test_checker_notices_a_line_moved_over_a_banner():
    text = TEXTS["vicreg.py"]
    parts = sections(text)
    moved = parts[4][3].splitlines(keepends=True)
    texts = {"simclr.py": TEXTS["simclr.py"], "vicreg.py": "".join(
        [p[3] for p in parts[:4]] + moved[:-1] + [p[3] for p in parts[5:6]] + moved[-1:]
        + [p[3] for p in parts[6:]])}
    assert len(texts["vicreg.py"]) == len(text) and drift(texts)


@pytest.mark.parametrize("old, new", [
    ("# ==== 5. ", "# ==== 6. "),
    ("# ==== 5. ", "# === 5. "),
    ("[shared] ===", "[shard] ==="),
    ("[shared] ===", "[shared] =="),
])
def test_checker_refuses_malformed_banners(old, new):
    with pytest.raises(ValueError):
        drift(broken(old, new))


def test_checker_accepts_a_change_of_the_method():
    assert not drift(broken('METHOD = "vicreg"', 'METHOD = "other"'))


def test_fix_repairs_drift_and_keeps_the_method():
    texts = broken("k=10", "k=11")
    texts["vicreg.py"] = texts["vicreg.py"].replace("25.0", "26.0")
    repaired = {**texts, "vicreg.py": fix(texts["simclr.py"], texts["vicreg.py"])}
    assert drift(texts) and not drift(repaired) and "26.0" in repaired["vicreg.py"]


def test_changed_lines_counts_as_diff_does():
    assert changed_lines("a\nb\nc\n", "a\nB\nc\nd\n") == 3
    assert changed_lines("a\n", "a\n") == 0
