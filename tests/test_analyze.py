"""analyze.py: measures against NumPy and brute force, every kind of run, the toy experiments."""

import csv
import importlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.spatial.distance
import torch
import torch.nn.functional as F
from conftest import ROOT
from family import TRAINING

import analyze

METHODS = [name.removesuffix(".py") for name in TRAINING]


def embeddings(n, dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=dtype) * torch.linspace(0.1, 2, dim) + 0.3


# ---- measures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n, dim", [(300, 7), (60, 60), (9, 40), (1200, 70), (500, 1300)])
def test_spectrum_is_numpys(n, dim, normalize):
    z = embeddings(n, dim)
    x = z.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x
    expected = np.linalg.svd(np.cov(x.T), compute_uv=False)
    values = analyze.spectrum(z, normalize)
    assert values.shape == (dim,) and values.dtype == torch.float64
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-13 * expected[0])


def test_spectrum_of_collapsed_embeddings():
    """Dead dimensions, few directions, one point, rows of zeros: counted, never NaN."""
    z = embeddings(200, 6) @ torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    assert analyze.collapsed(analyze.spectrum(z, normalize=False)) == 14
    z = F.pad(embeddings(200, 6), (0, 4))
    z[3] = 0
    for normalize in (True, False):
        assert analyze.collapsed(analyze.spectrum(z, normalize)) == 4
    point = torch.ones(50, 8)
    assert analyze.collapsed(analyze.spectrum(point)) == 8
    assert analyze.participation_ratio(torch.zeros(8)) == 0
    assert math.isfinite(analyze.effective_rank(point))


def test_ranks():
    assert analyze.participation_ratio(torch.ones(9)) == pytest.approx(9)
    assert analyze.participation_ratio(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert analyze.participation_ratio(torch.tensor([2.0, 1, 1])) == pytest.approx(16 / 6)
    x = embeddings(70, 11).double().numpy()
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    assert analyze.effective_rank(torch.from_numpy(x)) == pytest.approx(np.exp(-(p @ np.log(p))))


def brute_force(x):
    """What criterion() measures of the rows of x (n, m), from whole matrices."""
    n, m = x.shape
    off = ~np.eye(n, dtype=bool)
    norms = np.linalg.norm(x, axis=1)
    unit = x / norms[:, None]
    gram, cosines = x @ x.T, unit @ unit.T
    dual = ((unit.T @ unit)[~np.eye(m, dtype=bool)] ** 2).sum()
    fourth = (np.linalg.norm(unit, axis=0) ** 4).sum()
    distances = scipy.spatial.distance.pdist(unit, "sqeuclidean")
    return {"criterion": (gram[off] ** 2).sum(), "fourth": (norms**4).sum(),
            "unit": (cosines[off] ** 2).sum(), "dual": dual, "lower": dual - n + n**2 / m,
            "upper": dual - n + n**2, "to_lower": fourth / (n**2 / m),
            "dominance": np.diag(gram).mean() / np.abs(gram[off]).mean(),
            "mean": cosines[off].mean(), "std": cosines[off].std(),
            "uniformity": np.log(np.exp(-2 * distances).mean()),
            "histogram": np.histogram(cosines[off], 200, (-1, 1))[0]}


@pytest.mark.parametrize("n, dim", [(40, 7), (7, 40), (1300, 30), (30, 2100)])
def test_duality_is_brute_force(n, dim):
    """Of rows and of columns, in one block and in several; Theorem 3.3 and the corollaries."""
    z = embeddings(n, dim)
    found = analyze.duality(z)
    x = z.double().numpy()
    for side, expected in (("samples", brute_force(x)), ("dimensions", brute_force(x.T))):
        assert found[side].keys() == expected.keys()
        counts = expected.pop("histogram")
        assert np.abs(found[side]["histogram"] - counts).sum() <= 1e-4 * counts.sum() + 4
        for name, value in expected.items():
            assert found[side][name] == pytest.approx(value, rel=1e-9, abs=1e-9), (side, name)
        assert found[side]["lower"] <= found[side]["unit"] * (1 + 1e-12) + 1e-9
        assert found[side]["unit"] <= found[side]["upper"]
        assert found[side]["to_lower"] >= 1 - 1e-12
    assert found["residual"] < 1e-14


def test_duality_of_uniform_unit_vectors():
    """Cosines of deviation 1 / sqrt(D), L_c = n^2 / D nearly, the sums at their lower bound."""
    z = F.normalize(torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    found = analyze.duality(z)["samples"]
    assert found["std"] == pytest.approx(1 / 16, rel=0.01)
    assert found["unit"] == pytest.approx(1024 * 1023 / 256, rel=0.01)
    assert 1 <= found["to_lower"] < 1.02


def test_duality_of_rows_of_zeros_and_of_a_point():
    z = embeddings(50, 6)
    some = analyze.duality(torch.cat([z, torch.zeros(2, 6)]))["samples"]
    for name in ("criterion", "fourth", "unit", "lower", "upper", "to_lower"):
        assert some[name] == pytest.approx(analyze.duality(z)["samples"][name])
    point = analyze.duality(torch.ones(50, 6))
    assert point["residual"] < 1e-14 and point["samples"]["std"] < 1e-6
    assert point["samples"]["uniformity"] == pytest.approx(0, abs=1e-9)
    nothing = analyze.duality(torch.zeros(5, 6))
    assert all(math.isfinite(v) for v in nothing["samples"].values() if isinstance(v, float))


def test_alignment():
    z1, z2 = embeddings(20, 5), embeddings(20, 5, seed=1)
    cosine = F.cosine_similarity(z1.double(), z2.double())
    assert analyze.alignment(z1, z2) == pytest.approx((2 - 2 * cosine).mean().item())
    assert analyze.alignment(z1, 3 * z1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n, dim", [(12000, 32), (32, 12000)])
def test_memory_does_not_hold_the_larger_matrix(n, dim):
    """12,000 x 12,000 in float64 would be 1.2 GB; a quarter of that is enough."""
    program = (f"import resource, torch, analyze\ntorch.set_num_threads(2)\n"
               f"z = torch.randn({n}, {dim})\nanalyze.duality(z[:100, :100])\n"
               f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
               f"analyze.spectrum(z), analyze.duality(z), analyze.effective_rank(z)\n"
               f"print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 280_000  # KiB


# ---- runs ---------------------------------------------------------------------------------------


def test_heads_are_every_scripts():
    assert list(analyze.HEADS) == ["simclr", "vicreg", "interpolate", "directclr"]
    for method, heads in analyze.HEADS.items():
        script = importlib.import_module(method)
        parsed = {head for head in heads if script.parse_args(["--head", head]).head == head}
        assert parsed == set(heads)
        if script.VARIANT == "head":
            assert set(script.VARIANTS) == set(heads)


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A folder with a short run of every head of every script, and of every method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        script = importlib.import_module(method)
        flags = ["--data", str(image_folder), "--arch", "convnet", "--batch-size", "20", "--steps",
                 "2", "--epochs", "1", "--lr", "0.02", "--dim", "32"]
        flags += [] if method == "directclr" else ["--hidden", "32"]
        variants = {f"{script.VARIANT} {name}" for name in script.VARIANTS}
        for choice in sorted(variants | {f"head {name}" for name in analyze.HEADS[method]}):
            flag, value = choice.split()
            out = folder / f"{method}-{flag}-{value}"
            script.main([*flags, f"--{flag}", value, "--out", str(out)])
    return folder


def options(*argv):
    parsed = analyze.parse_args([*map(str, argv)])
    return parsed


def test_every_method_and_head_is_read(runs):
    """Strictly; the embeddings are those of the script's own model, the figures its log's."""
    found, cache = analyze.find_runs([runs]), {}
    assert len(found) == 4 + 4 + 9 + 4 + 12
    asked = options("compare", runs)
    for name, folder in found.items():
        run = analyze.load_run(name, folder, asked, cache)
        script = importlib.import_module(run.args.script)
        checkpoint = torch.load(folder / "last.pt", weights_only=True)
        model = script.Model(analyze.argparse.Namespace(**checkpoint["args"]), 16, 10)
        for part in ("backbone", "head", "probe"):
            getattr(model, part).load_state_dict(checkpoint[part])
        images = run.data.test_images
        h, z, _ = analyze.embed(run, images, "cpu")
        with torch.no_grad():
            expected = model.eval().backbone(images.float() / 255)
            torch.testing.assert_close(h, expected)
            torch.testing.assert_close(z, model.head(expected))
        assert len(h) == 40 and run.final["step"] == 2
        metrics = script.evaluate(model, run.data, torch.device("cpu"), linear=False)
        assert metrics["knn"] == run.final["knn"] and metrics["rank"] == run.final["rank"]
        assert round(analyze.effective_rank(h), 2) == run.final["rank"]


def test_all_commands_write_numbers_and_figures(runs, tmp_path, capsys):
    """Three runs side by side: JSON, Markdown, CSV and pictures hold what the functions return."""
    chosen = [runs / f"{name}" for name in ("simclr-head-mlp", "vicreg-head-expander",
                                            "directclr-head-slice")]
    results = analyze.main([*map(str, chosen), "--out", str(tmp_path), "--queries", "3",
                            "--neighbours", "4"])
    output = capsys.readouterr().out
    assert list(results) == [path.name for path in chosen]
    for name in ("spectrum", "duality", "compare", "nearest"):
        saved = json.loads((tmp_path / f"{name}.json").read_text())
        assert saved["results"] == json.loads(json.dumps(results))
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
        assert f"\n{name}, 40 test images" in output
    with open(tmp_path / "compare.csv", newline="") as file:
        table = list(csv.DictReader(file))
    markdown = (tmp_path / "compare.md").read_text().splitlines()
    assert len(markdown) == 5 and all(line.count("|") == 14 for line in markdown)
    for row, (name, r) in zip(table, results.items()):
        assert row["run"] == name and float(row["kNN"]) == r["final"]["knn"]
        assert float(row["rank h"]) == r["representation"]["effective_rank"]
        assert float(row["L_c"]) == r["embedding"]["duality"]["samples"]["unit"]
    run = analyze.load_run("a", chosen[0], options("spectrum", chosen[0]), {})
    h, z, _ = analyze.embed(run, run.data.test_images, "cpu")
    first = results[chosen[0].name]
    assert first["embedding"]["singular_values"] == analyze.spectrum(z).tolist()
    assert first["representation"]["duality"] == analyze.duality(h)
    for i, query in enumerate(first["nearest"]["queries"]):
        near = (F.normalize(h, dim=1) @ F.normalize(h, dim=1)[query]).argsort(descending=True)
        near = [j for j in near.tolist() if j != query][:4]
        assert first["nearest"]["neighbours"][i] == near
        same = [bool(run.data.test_labels[j] == run.data.test_labels[query]) for j in near]
        assert first["nearest"]["hits"][i] == same


def test_flags(runs, tmp_path):
    """--raw, --center, --limit, --threshold, --figure, and the data elsewhere."""
    folder = runs / "simclr-head-mlp"
    run = analyze.load_run("a", folder, options("spectrum", folder), {})
    flags = ["spectrum", str(folder), "--out", str(tmp_path), "--figure", "png", "--limit", "30"]
    _, z, _ = analyze.embed(run, run.data.test_images[torch.linspace(0, 39, 30).long()], "cpu")
    for extra, expected in (([], analyze.spectrum(z)), (["--raw"], analyze.spectrum(z, False)),
                            (["--center"], analyze.spectrum(z - z.mean(0)))):
        (found,) = analyze.main(flags + extra).values()
        assert found["images"] == 30
        assert found["embedding"]["singular_values"] == pytest.approx(expected.tolist())
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    (found,) = analyze.main([*flags, "--threshold", "2"]).values()
    assert found["embedding"]["collapsed"] == 32
    (found,) = analyze.main([*flags, "--data", run.args.data]).values()
    assert found["data"] == run.args.data


def test_names_tell_runs_apart(tmp_path):
    for name in ("a/x", "b/x", "b/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "last.pt").touch()
    paths = [tmp_path / "a" / "x", tmp_path / "b"]
    assert list(analyze.find_runs(paths)) == ["a/x", "b/x", "b/y"]
    assert list(analyze.find_runs([tmp_path / "b", tmp_path / "b" / "x"])) == ["x", "y"]
    for name in ("p/dcl", "p/simclr", "p/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "last.pt").touch()
    assert list(analyze.find_runs([tmp_path / "p"])) == ["simclr", "dcl", "other"]
    assert list(analyze.PATH) == list(importlib.import_module("interpolate").VARIANTS)


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        analyze.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("analyze.py: error: ")
    return error


def test_bad_input(runs, tmp_path, capsys):
    """One line that names what was wrong, for whatever is not a run of ours."""
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no run there" in refused(capsys, "spectrum", tmp_path / "empty")
    good = torch.load(runs / "simclr-head-mlp" / "last.pt", weights_only=True)
    folder = tmp_path / "run"
    folder.mkdir()

    def broken(**changes):
        torch.save({**good, **changes}, folder / "last.pt")
        return refused(capsys, "spectrum", folder)

    assert "format 3" in broken(format=3)
    assert "a run of moco.py" in broken(method="moco")
    assert "head slice" in broken(args={**good["args"], "head": "slice"})
    assert "does not fit" in broken(args={**good["args"], "dim": 31})
    assert "does not fit" in broken(head={})
    assert "does not fit" in broken(args={**good["args"], "arch": "resnet18"})
    assert "trained on 7 images" in broken(data=[7, *good["data"][1:]])
    assert "no checkpoint of ours" in broken(args=3)
    assert "no such folder" in broken(args={**good["args"], "data": "./gone"})
    poisoned = {k: v * torch.nan if v.is_floating_point() else v
                for k, v in good["backbone"].items()}
    assert "not finite" in broken(backbone=poisoned)
    torch.save({"state_dict": good["backbone"]}, folder / "last.pt")
    assert "no checkpoint of ours" in refused(capsys, "compare", folder)
    whole = (runs / "simclr-head-mlp" / "last.pt").read_bytes()
    for length in (0, 100, len(whole) // 2):
        (folder / "last.pt").write_bytes(whole[:length])
        assert "damaged" in refused(capsys, "compare", folder)
    (folder / "last.pt").write_bytes(whole)
    (folder / "log.jsonl").write_text("{")
    assert "log.jsonl cannot be read" in refused(capsys, "compare", folder)
    assert "cannot be used" in refused(capsys, "spectrum", folder, "--device", "moon")
    (tmp_path / "file").touch()
    (folder / "log.jsonl").unlink()
    assert "cannot write" in refused(capsys, "spectrum", folder, "--out", tmp_path / "file")
    assert "no experiment fig7" in refused(capsys, "toy", "fig7")
    assert "at least 1" in refused(capsys, "toy", "--steps", "0")


def test_unfinished_run_has_blanks(runs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    source = runs / "vicreg-head-none" / "last.pt"
    (tmp_path / "run" / "last.pt").write_bytes(source.read_bytes())
    (found,) = analyze.main(["compare", str(tmp_path / "run"), "--out", str(tmp_path)]).values()
    assert set(found["final"].values()) == {None}
    assert "run" in capsys.readouterr().out


def test_numbers_without_matplotlib(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    analyze.main([str(runs / "simclr-head-mlp"), "--out", str(tmp_path)])
    output = capsys.readouterr().out
    for name in ("spectrum", "duality", "compare", "nearest"):
        assert f"no figure {name}: matplotlib is not installed" in output
        assert (tmp_path / f"{name}.json").exists()
    assert not list(tmp_path.glob("*.svg"))


# ---- toy experiments ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["paper", "code"])
def test_toy_loss_is_the_formula(loss):
    """Against a loop over images, for two settings at once."""
    z1, z2 = (torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(s),
                          dtype=torch.float64) for s in (0, 1))
    for r, value in enumerate(analyze.toy_loss(z1, z2, loss).tolist()):
        total = 0.0
        for i in range(9):
            if loss == "paper":
                own = math.exp(-((z1[r, i] - z2[r, i]) ** 2).sum() / 2)
                rest = [math.exp(-((z1[r, i] - z1[r, j]) ** 2).sum() / 2)
                        for j in range(9) if j != i]
            else:
                own = math.exp(z1[r, i] @ z2[r, i] / 0.1)
                rest = [math.exp(z1[r, i] @ z2[r, j] / 0.1) for j in range(9) if j != i]
            total -= math.log(own / (own + sum(rest)))
        assert value == pytest.approx(total / 9)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_lemma_2(layers):
    """The gradient of equation 2 at the product of the layers is -W (S0 - S1), S0 and S1 summed
    pair by pair; S0 and S1 have no negative eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    weights = [w[None] for w in analyze.toy_init("uniform", layers, generator)]
    x1 = torch.randn(1, 12, 16, generator=generator, dtype=torch.float64)
    x2 = x1 + 0.5 * torch.randn(1, 12, 16, generator=generator, dtype=torch.float64)
    product = analyze.toy_forward(torch.eye(16, dtype=torch.float64)[None], weights).mT
    product.requires_grad_()
    z1, z2 = x1 @ product.mT, x2 @ product.mT
    loss = analyze.toy_loss(z1, z2, "paper").sum()
    gradient = torch.autograd.grad(loss, product)[0][0]
    distance = (z1[0, :, None] - z1[0]).square().sum(2)
    logits = -(distance + torch.diag((z1 - z2)[0].square().sum(1))) / 2
    a, s0, s1 = logits.softmax(1).detach(), 0, 0
    for i in range(12):
        e = x2[0, i] - x1[0, i]
        s1 = s1 + (1 - a[i, i]) * torch.outer(e, e) / 12
        for j in range(12):
            d = x1[0, i] - x1[0, j]
            s0 = s0 + (i != j) * a[i, j] * torch.outer(d, d) / 12
    found = analyze.toy_x(weights, x1, x2)[0]
    torch.testing.assert_close(found, s0 - s1)
    torch.testing.assert_close(gradient, -product[0].detach() @ found, rtol=1e-12, atol=1e-14)
    assert min(torch.linalg.eigvalsh(s).min() for s in (s0, s1)) > -1e-12


def test_toy_inits():
    """Singular values exp(-.35 k), aligned layers that meet, PyTorch's bound."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(-0.35 * torch.arange(16, dtype=torch.float64))
    for kind in ("decaying", "aligned"):
        w1, w2 = analyze.toy_init(kind, 2, generator)
        torch.testing.assert_close(torch.linalg.svdvals(w1), scale)
        torch.testing.assert_close(torch.linalg.svdvals(w2), scale)
        met = torch.linalg.svdvals(w2 @ w1)
        assert torch.allclose(met, scale**2) == (kind == "aligned")
    w1, _ = analyze.toy_init("uniform", 2, generator)
    assert 0.24 < w1.abs().max() <= 0.25


def test_toy_augmentation_collapses_the_noisy_half():
    """In kind as Figure 3: strong noise kills eight of sixteen with equation 2, and only shrinks
    them with the official code's loss; Lemma 2 to float64's precision."""
    rows = {(r["loss"], r["noise"]): r for r in analyze.toy_augmentation(2000, 0)}
    assert len(rows) == 12 and all(r["lemma2"] < 1e-11 for r in rows.values())
    values = {key: np.array(r["singular_values"]) for key, r in rows.items()}
    assert (values["paper", 3.0][8:] < 1e-4).all() and (values["paper", 3.0][:8] > 1).all()
    assert (values["paper", 0.01] > 0.05).all()
    for loss in ("paper", "code"):
        below = [values[loss, noise][8:].max() for noise in (0.5, 1.0, 1.5, 2.0, 3.0)]
        assert below == sorted(below, reverse=True)
    assert 0.01 < values["code", 3.0][8:].min()


def test_toy_layers_grow_by_theorem_3():
    """Aligned layers stay aligned and grow by the law; others align where they have grown."""
    rows = {(r["loss"], r["init"]): r for r in analyze.toy_layers(1000, 0)}
    aligned, decaying = rows["paper", "aligned"], rows["paper", "decaying"]
    assert aligned["off_law"] < 0.02 and aligned["grown_alignment"] > 0.99
    assert decaying["off_law"] > 0.1  # which supposes alignment
    first, last = (np.array(aligned["w1"])[i] for i in (0, -1))
    assert last[0] > 2.5 and last[-1] == pytest.approx(first[-1], rel=0.05)
    assert decaying["grown_alignment"] > 0.9 and decaying["balance"] < 0.2
    assert aligned["embedding"][-1][-1] < -18 and rows["code", "decaying"]["grown"] >= 8
    assert "law" not in rows["code", "aligned"]


def test_toy_depth_collapses_with_depth():
    """One layer loses nothing; more layers lose more, with the decaying start most."""
    rows = {(r["loss"], r["layers"], r["relu"], r["init"]): r for r in analyze.toy_depth(500, 0)}
    assert len(rows) == 32
    for loss in ("paper", "code"):
        lost = [rows[loss, layers, False, "decaying"]["collapsed"] for layers in (1, 2, 3, 4)]
        assert lost[0] == 0 and lost == sorted(lost) and lost[-1] > 8
        assert rows[loss, 4, False, "uniform"]["collapsed"] < lost[-1]
    spectra = [rows["code", 1, relu, "uniform"]["log_spectrum"] for relu in (False, True)]
    assert spectra[0] == spectra[1]  # nothing lies between


def test_toy_command(tmp_path, capsys):
    """Tables, JSON and figures of all three; the same seed gives the same numbers."""
    for experiments in ([], ["augmentation", "layers"]):
        flags = [*experiments, "--steps", "20", "--out", str(tmp_path), "--figure", "png"]
        analyze.main(["toy", *flags, "--seed", "0"])
        found = [json.loads((tmp_path / f"toy-{name}.json").read_text())["results"]
                 for name in analyze.TOYS]
        first = found if not experiments else first
        assert found == first
        assert all((tmp_path / f"toy-{name}.png").exists() for name in analyze.TOYS)
    output = capsys.readouterr().out
    assert "toy layers: 20 steps, seed 0" in output and "below -8" in output
