"""analyze.py: measures against slow formulas, runs and foreign files, the toy experiments."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import analyze

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def embeddings(n, dim, seed=0):
    z = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return z * torch.linspace(0.1, 2, dim) + 0.3

@pytest.mark.parametrize("n, dim", [(300, 7), (60, 60), (9, 40), (1200, 70), (100, 1100)])
def test_spectrum_and_rank_are_numpys(n, dim):
    """In one block and in several."""
    z = embeddings(n, dim)
    x = z.double().numpy()
    s = np.linalg.svd(x, compute_uv=False)
    assert analyze.effective_rank(z) == pytest.approx(np.exp(-s / s.sum() @ np.log(s / s.sum())))
    for normalize, x in ((False, x), (True, x / np.linalg.norm(x, axis=1, keepdims=True))):
        expected = np.linalg.svd(np.cov(x.T), compute_uv=False, hermitian=True)
        np.testing.assert_allclose(analyze.spectrum(z, normalize), expected, 1e-9, 1e-12)

def brute_force(x):
    """What criterion() measures of the rows of x (n, m), from whole matrices."""
    (n, m), norms = x.shape, np.linalg.norm(x, axis=1)
    off, unit = ~np.eye(n, dtype=bool), x / norms[:, None]
    gram, cosines = x @ x.T, (unit @ unit.T)[off]
    dual = ((unit.T @ unit)[~np.eye(m, dtype=bool)] ** 2).sum()
    apart = torch.cdist(*[torch.from_numpy(unit)] * 2, compute_mode="donot_use_mm_for_euclid_dist")
    return {"criterion": (gram[off] ** 2).sum(), "fourth": (norms**4).sum(),
            "unit": (cosines**2).sum(), "dual": dual, "lower": dual - n + n**2 / m,
            "upper": dual - n + n**2, "mean": cosines.mean(), "std": cosines.std(),
            "to_lower": (np.linalg.norm(unit, axis=0) ** 4).sum() / (n**2 / m),
            "dominance": np.diag(gram).mean() / np.abs(gram[off]).mean(),
            "uniformity": np.log(np.exp(-2 * apart.numpy()[off] ** 2).mean()),
            "histogram": np.histogram(cosines, 200, (-1, 1))[0]}

@pytest.mark.parametrize("n, dim", [(40, 7), (7, 40), (1300, 30), (30, 2100)])
def test_duality_is_brute_force(n, dim):
    """Of rows and of columns, in one block and in several; Theorem 3.3 and Corollary 3.4.1."""
    z = embeddings(n, dim)
    found, x = analyze.duality(z), z.double().numpy()
    assert found["residual"] < 1e-14
    for side, expected in (("samples", brute_force(x)), ("dimensions", brute_force(x.T))):
        mine, counts = found[side], expected.pop("histogram")
        assert np.abs(mine.pop("histogram") - counts).sum() <= 1e-4 * counts.sum() + 4
        assert mine == {k: pytest.approx(v, rel=1e-9, abs=1e-9) for k, v in expected.items()}
        assert mine["lower"] - 1e-6 <= mine["unit"] <= mine["upper"] and mine["to_lower"] > 1 - 1e-9

def test_special_embeddings():
    """Few directions, dead dimensions, rows of zeros, one point, uniform vectors, a single row."""
    few = embeddings(200, 6) @ torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    z, point = embeddings(200, 6), torch.ones(50, 8)
    z[3] = 0
    for x, dead in ((few, 14), (z @ torch.eye(6, 10), 4), (point, 8), (0 * point, 8)):
        for normalize in (True, False):
            assert analyze.collapsed(analyze.spectrum(x, normalize)) == dead
    assert analyze.effective_rank(point) == pytest.approx(1, abs=1e-5)
    for values, ratio in (([1.0] * 9, 9), ([3.0, 0, 0], 1), ([2.0, 1, 1], 16 / 6), ([0.0], 0)):
        assert analyze.participation_ratio(torch.tensor(values)) == pytest.approx(ratio)
    padded, without = analyze.criterion(z), analyze.criterion(torch.cat([z[:3], z[4:]]))
    for name in ("criterion", "fourth", "unit", "lower", "upper", "to_lower"):
        assert padded[name] == pytest.approx(without[name])
    found, nothing = analyze.criterion(point), analyze.criterion(0 * point)
    assert found["std"] < 1e-6 and found["uniformity"] == pytest.approx(0, abs=1e-9)
    assert not any(map(math.isnan, [v for v in nothing.values() if isinstance(v, float)]))
    uniform = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    found = analyze.criterion(uniform / uniform.norm(dim=1, keepdim=True))
    assert found["std"] == pytest.approx(1 / 16, rel=0.01) and 1 <= found["to_lower"] < 1.02
    assert found["unit"] == pytest.approx(1024 * 1023 / 256, rel=0.01)
    for function, bad in ((analyze.spectrum, z[:1]), (analyze.duality, z[:, :1])):
        with pytest.raises(ValueError, match="at least two"):
            function(bad)

def test_memory_does_not_hold_the_larger_matrix():
    """8,000 x 8,000 in float64 would be 500,000 KiB; a third of that is enough, on either side."""
    program = """import resource, torch, analyze
peak, z = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.randn(8000, 32)
analyze.duality(z[:100])
before = peak()
for x in (z, z.T):
    analyze.spectrum(x), analyze.duality(x), analyze.effective_rank(x)
print(peak() - before)"""
    assert int(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)) < 170_000

def write_run(name, seed=0, final=(), **args):
    """A run folder as the training scripts leave it; its h and z."""
    Path(name).mkdir(parents=True)
    h, z = embeddings(60, 12, seed), embeddings(60, 8, seed + 1)
    file = {"h": h, "z": z, "labels": torch.arange(60), "paths": ["a.png"] * 60}
    torch.save(file, f"{name}/embeddings.pt")
    log = [{"method": "simclr", "args": args}, {"final": True, **dict(final)}]
    Path(name, "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return h, z

def analyzed(*argv):
    """Run analyze.py; {report: its rows}."""
    analyze.main([*argv, "--out", "out"])
    return {path.stem: json.loads(path.read_text())["rows"] for path in Path("out").glob("*.json")}

def test_reports_hold_what_the_functions_return(capsys):
    """Two runs and a file side by side: JSON, tables and figures of all three commands."""
    h, z = write_run("a", 0, {"knn": 71.5, "online": 70.25, "seconds": 3}, head="mlp")
    write_run("b|$", 5, {"linear": 80.0}, method="dcl")  # vicreg.py has no --head
    np.save("c.npy", embeddings(30, 4, 9).numpy())
    rows = analyzed("a", "b|$", "c.npy")["spectrum"]
    tables = {path.stem: " ".join(path.read_text().split()) for path in Path("out").glob("*.md")}
    for row, space, x in ((rows[0], "a | representation", h), (rows[1], "a | embedding", z),
                          (rows[4], "c.npy | embedding", embeddings(30, 4, 9))):
        s, both, rank = analyze.spectrum(x), analyze.duality(x), analyze.effective_rank(x)
        ratio, lost, d = analyze.participation_ratio(s), analyze.collapsed(s), both["samples"]
        assert row == {**row, **both, "singular_values": s.tolist(), "collapsed": lost,
                       "effective_rank": rank, "participation": ratio}
        numbers = " | ".join(f"{value:.4g}" for value in (*x.shape, rank, ratio, lost, s[0], s[-1]))
        assert f"| {space} | {numbers} |" in tables["spectrum"]
        assert f"| {d['unit']:.4g} | {d['dual']:.4g} | {d['to_lower']:.4g} |" in tables["duality"]
    ranks, both = [f"{row['effective_rank']:.4g}" for row in rows], rows[1]["samples"]
    assert (f"| a | simclr | mlp | 71.5 | | 70.25 | {ranks[0]} | {ranks[1]} | 0 | 0 | "
            f"{both['unit']:.4g} | {both['dual']:.4g} | 3 |") in tables["compare"]
    assert "| b\\|$ | dcl | | | 80 | | " in tables["compare"]
    assert f"| c.npy | | | | | | | {ranks[4]} | | 0 | " in tables["compare"]
    assert Path("out/duality.md").read_text() in capsys.readouterr().out
    assert [path.read_text()[:5] for path in Path("out").glob("*.svg")] == ["<?xml"] * 2

def test_flags_and_names(capsys, monkeypatch):
    """What is measured of which rows, figures as PNG or none, the names and the order of runs."""
    z = write_run("run")[1][torch.linspace(0, 59, 30).long()]
    flags = "spectrum run --limit 30 --figure png".split()
    for extra, expected in (([], analyze.spectrum(z)), (["--raw"], analyze.spectrum(z, False)),
                            (["--center"], analyze.spectrum(z - z.mean(0)))):
        row = analyzed(*flags, *extra)["spectrum"][1]
        assert row["singular_values"] == pytest.approx(expected.tolist()) and row["n"] == 30
    assert Path("out/spectrum.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert analyzed(*flags, "--threshold", "2")["spectrum"][1]["collapsed"] == 8
    assert "no figure spectrum.png: matplotlib is not installed" in capsys.readouterr().out
    for name in ("a/x", "b/x", "b/y", "p/dcl", "p/other", "p/simclr", "p/barlow"):
        write_run(name)
    Path("p/barlow/embeddings.pt").unlink()
    assert [[*analyze.find_runs(names.split())] for names in ("a/x b", "b b/x", "p")] == [
        ["a/x", "b/x", "b/y"], ["x", "y"], ["simclr", "dcl", "other"]]
    assert capsys.readouterr().out == "skipped p/barlow: not finished, it has no embeddings.pt\n"

@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_foreign_files(kind):
    """Half to double precision; what is no floating array (n, D) in a file of several is left."""
    x = embeddings(20, 5).to(kind)
    several = {"a": x, "b": torch.arange(20), "c": torch.ones(20), "d": x[:1], "e": x[:9].T}
    torch.save({**several, 3: None}, "x.pt")
    torch.save(torch.nn.Parameter(x), "x1.pt")
    if kind != torch.bfloat16:  # NumPy has none
        np.save("x.npy", np.asfortranarray(x.numpy()))
        np.savez("x.npz", s=np.array(["a", "b"]), **{k: v.numpy() for k, v in several.items()})
    for path in Path().glob("x*"):
        rows = analyzed("compare", str(path))["compare"]
        keys = [": a", ": e"] if path.name in ("x.npz", "x.pt") else [""]
        assert [row["run"] for row in rows] == [path.name + key for key in keys]
        for row, mine in zip(rows, (x, x[:9].T)):
            expected = analyze.spectrum(mine.double()).tolist()
            assert row["z"]["singular_values"] == pytest.approx(expected, abs=1e-12)

def test_bad_input(capsys):
    """One line that names what is wrong, exit code 2, whatever a file holds; no pickle runs."""
    def refused(said, argv):
        with pytest.raises(SystemExit) as stop:
            analyze.main(argv.split())
        out, error = capsys.readouterr()
        assert stop.value.code == 2 and "pickled code ran" not in out
        assert error.count("\n") == 1 and error.startswith("analyze.py: error: ") and said in error
    x, hostile = embeddings(20, 5), np.empty(1, dtype=object)
    hostile[0] = type("", (), {"__reduce__": lambda self: (print, ("pickled code ran",))})()
    for said, bad in (("int64 [20, 5]", x.long()), ("no f", x[0]), ("no f", x[:1]), ("NaN", x / 0),
                      ("no f", x[:, :1]), ("NaN", x * math.nan), ("NaN", x.double() * 1e300)):
        np.save("x.npy", bad.numpy())
        torch.save({"h": bad, "z": bad}, "x.pt")
        refused(said, "x.npy")
        refused(said, "spectrum x.pt")
    write_run("good")
    write_run("young")
    Path("young/embeddings.pt").unlink()
    Path("half.pt").write_bytes(Path("good/embeddings.pt").read_bytes()[:3000])
    np.savez("x.npz", h=x, z=hostile)
    np.save("x.npy", hostile, allow_pickle=True)
    torch.save({"h": x, "z": hostile[0]}, "x.pt")
    for name in ("x.npy", "x.npz", "x.pt", "half.pt", "good/log.jsonl"):
        refused(f"{name}: damaged, or no", name)
    for argv in ("toy fig7", "spectrum", "", "toy --steps 0", "toy --steps x", "toy --seed -1",
                 f"toy --seed {2**63}", "good --figure gif", "good --limit 1", "good --out x.npy"):
        refused("", argv)
    refused("No such file", "gone")
    refused("no finished run", "young")
    for log in ("{", "[]", "3\n", ""):
        Path("good/log.jsonl").write_text(log)
        refused("log.jsonl: damaged", "good")

def test_program():
    """Names that the console cannot show do not stop it; Ctrl-C does, with exit code 130."""
    np.save("\udcff-ü.npy", embeddings(20, 5).numpy())
    command = [sys.executable, ROOT / "analyze.py"]
    settings = {"stdout": -1, "stderr": -1, "env": {"PYTHONIOENCODING": "ascii"},
                "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    done = subprocess.run([*command, "\udcff-ü.npy"], **settings)
    assert done.returncode == 0 and b"\\udcff-?" in done.stdout, done.stderr
    running = subprocess.Popen([*command, "toy", "layers", "--steps", "1000000"], **settings)
    assert b"toy layers: 1,000,000 steps" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=30)[1] == b"\nstopped\n" and running.returncode == 130

@pytest.mark.parametrize("loss", ["paper", "code"])
def test_toy_loss_is_the_formula(loss):
    """Against a loop over images, for two settings at once."""
    z1, z2 = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(0)).double()
    for a, b, value in zip(z1, z2, analyze.toy_loss(z1, z2, loss).tolist()):
        for i in range(9):
            near = [math.exp(-((a[i] - (b if j == i else a)[j]) ** 2).sum() / 2)
                    if loss == "paper" else math.exp(a[i] @ b[j] / 0.1) for j in range(9)]
            value += math.log(near[i] / sum(near)) / 9
        assert value == pytest.approx(0, abs=1e-12)

@pytest.mark.parametrize("layers", [1, 2, 3])
def test_lemma_2(layers):
    """Equation 2's gradient at W, the product of the layers, is -W (S0 - S1), with both PSD."""
    generator = torch.Generator().manual_seed(0)
    weights = analyze.toy_init("uniform", layers, generator)[:, None]
    x1, e = torch.randn(2, 1, 12, 16, generator=generator, dtype=torch.float64)
    w = analyze.toy_forward(torch.eye(16).double()[None], weights).mT.requires_grad_()
    z1, z2 = x1 @ w.mT, (x1 + e / 2) @ w.mT
    (gradient,) = torch.autograd.grad(analyze.toy_loss(z1, z2, "paper").sum(), w)
    distance = (z1[0, :, None] - z1[0]).square().sum(2) + torch.diag((z1 - z2)[0].square().sum(1))
    a, d = (-distance / 2).softmax(1).detach(), x1[0, :, None] - x1[0]
    s0 = torch.einsum("ij,ijk,ijl->kl", a, d, d) / 12
    s1 = torch.einsum("i,ik,il->kl", 1 - a.diagonal(), e[0] / 2, e[0] / 2) / 12
    found = analyze.toy_x(weights, x1, x1 + e / 2)[0]
    torch.testing.assert_close(found, s0 - s1)
    torch.testing.assert_close(gradient[0], -w[0].detach() @ found, rtol=1e-12, atol=1e-14)
    assert min(torch.linalg.eigvalsh(s).min() for s in (s0, s1)) > -1e-12

def test_toy_inits_and_numbers():
    """The starts' singular values and bound; after 300 steps the first version's numbers."""
    draw, scale = torch.Generator().manual_seed(0), torch.exp(-0.35 * torch.arange(16).double())
    for kind in ("decaying", "aligned"):
        w1, w2 = analyze.toy_init(kind, 2, draw)
        torch.testing.assert_close(torch.linalg.svdvals(w2), scale)
        assert torch.allclose(torch.linalg.svdvals(w2 @ w1), scale**2) == (kind == "aligned")
    assert 0.24 < analyze.toy_init("uniform", 2, draw).abs().max() <= 0.25
    found = analyzed("toy", "--steps", "300")
    values = np.array([row["singular_values"] for row in found["toy-augmentation"]])
    assert values[:, 8] == pytest.approx([
        0.8494679, 0.9177997, 0.6357659, 0.2325579, 0.03909029, 8.885232e-5,
        0.5095046, 0.4310733, 0.2238010, 0.1297017, 0.08360778, 0.04351159], rel=1e-4)
    assert sum([[row["w1"][-1][0], row["balance"], row["grown_alignment"], row.get("off_law", 0)]
                for row in found["toy-layers"]], []) == pytest.approx([
        2.924141, 0.1026581, 0.9738801, 1.332466, 1.797410, 0.2395962, 0.7017030, 0.5055426,
        2.857101, 0.005214919, 0.9999997, 0.006118107, 1.031803, 0.9386798, 0.1493376, 0,
        0.9052147, 0.9298010, 0.1717327, 0, 0.6388192, 0.03412365, 0.8447785, 0], rel=1e-4)
    assert found["toy-depth"][9]["log_spectrum"][7] == pytest.approx(-2.528176, rel=1e-3)
    assert [row["collapsed"] for row in found["toy-depth"] if (row["layers"], row["loss"]) != (
        4, "paper")] == [0, 0, 0, 0, 9, 2, 6, 0, 13, 4, 10, 1,  # those four vary with rounding
                         0, 0, 0, 0, 8, 1, 8, 1, 11, 3, 13, 3, 14, 5, 15, 7]
