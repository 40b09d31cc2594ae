"""The tables of results: the runs that make them, and what their logs say.

python tests/tables.py list                      each table's runs, and which have no log yet
python tests/tables.py run TABLE [TABLE ...]     train what has no log; goes on after a stop
python tests/tables.py write                     bring the tables up to their logs

A run's folder is runs/tables/NAME; its log, once finished, tests/results/NAME.jsonl. A table follows
a line <!-- table: TABLE --> in README.md or tests/results/README.md.
"""

import argparse
import collections
import json
import operator
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from family import ROOT

sys.path.insert(0, str(ROOT))
import interpolate  # noqa: E402

RESULTS, RUNS = ROOT / "tests" / "results", ROOT / "runs" / "tables"
PAGES = ROOT / "README.md", RESULTS / "README.md"

# label: the row's first cell; published: top-1 on ImageNet, ResNet-50, 100 epochs; seeds: how many
Row = collections.namedtuple("Row", "label command name published seeds", defaults=("", 1))
PUBLISHED = {  # Garrido et al. 2023, Table S5 and text; Jing et al. 2022, Tables 1 and 2
    "vicreg": "68.1", "vicreg-exp": "68.0", "vicreg-ctr": "67.9", "simclr": "68.6",
    "simclr-abs": "68.7", "slice": "62.7", "none": "51.5", "linear": "61.1", "mlp": "66.5",
    "diagonal": "60.2", "orthogonal": "52.2", "lowrank": "62.3", "random": "43.0"}
SMALL = "--data shapes --precision bf16"
DIMS = f"interpolate.py {SMALL} --hidden 1024"
DIMENSIONS = 8, 32, 128, 512, 2048
TUNED = {8: 5, 32: 5, 128: 5, 2048: 0.2}  # D: vicreg's best --cov-coeff of dims-tune, where it is not 1
STEPS = *interpolate.PATH, "simclr --normalize A", "simclr --normalize B"
CIFAR = "--data data/cifar10_jpeg --arch convnet --batch-size 256 --precision bf16"
SIX = {"simclr": "simclr.py", "vicreg": "vicreg.py", "directclr": "directclr.py",
       "none": "directclr.py --head none", **{m: f"interpolate.py --method {m}" for m in STEPS[1:3]}}
BEST = {"simclr-abs": 0.12, "dcl-abs": 0.03, "tcr": 0.12, STEPS[-2]: 0.24, STEPS[-1]: 0.24}
HEADS = "slice", "none", "linear", "mlp", "diagonal", "orthogonal", "lowrank", "random"

def rows(script, flag, values, flags, name, seeds=1):
    """A row for each value of a flag."""
    return [Row(f"`{value}`", f"{script} {flags} {flag} {value}", f"{name}/{value}",
                PUBLISHED.get(value, ""), seeds) for value in values]

def on_a_gpu(data, name):
    """The tables on CIFAR-10, ResNet-18: methods, path, heads, dimensions."""
    def row(command, name, seeds=1):
        return Row(f"`python {command} --data {data}`", f"{command} --data {data}", name, "", seeds)
    expander = "--head expander --temperature 0.15"
    return {
        name: [row(f"{script} --epochs {epochs}", f"{name}/{script.split('.')[0]}-{epochs}", 3)
               for epochs in (100, 200) for script in ("simclr.py", "vicreg.py --dim 8192")],
        f"{name}-path": rows("interpolate.py", "--method", interpolate.PATH,
                             f"--data {data} --epochs 50", f"{name}-path"),
        f"{name}-heads": rows("directclr.py", "--head", HEADS, f"--data {data} --epochs 50",
                              f"{name}-heads"),
        f"{name}-dims": [
            row(f"{script} --epochs 50 --dim {dim}{hidden}",
                f"{name}-dims/{script.split('.')[0]}-{dim}{hidden.replace(' --hidden ', '-')}")
            for script in ("vicreg.py", f"simclr.py {expander}")
            for hidden in ("", " --hidden 8192") for dim in (64, 256, 1024, 4096, 8192)]}

TABLES = {
    "shapes": [Row(f"`python {name}.py --data shapes`", f"{name}.py --data shapes",
                   f"shapes/{name}", "", 3) for name in ("vicreg", "simclr", "directclr")],
    "dims": [Row(f"`{method}`, D = {dim}", f"{DIMS} --method {method} --dim {dim}",
                 f"dims/{method}-{dim}", "", 3)
             for method in ("vicreg", "vicreg-exp", "vicreg-ctr", "simclr")
             for dim in DIMENSIONS] + [
        Row(f"`vicreg --cov-coeff {c}`, D = {dim}", f"{DIMS} --dim {dim} --cov-coeff {c}",
            f"dims/vicreg-tuned-{dim}", "", 3) for dim, c in TUNED.items()],
    "dims-tune": [Row(f"`--dim {dim} --cov-coeff {c}`", f"{DIMS} --dim {dim} --cov-coeff {c} "
                      "--holdout 1000", f"dims-tune/{dim}-{c}")
                  for dim in DIMENSIONS for c in (0.04, 0.2, 1, 5)],
    "rates": [Row(f"`{m}`, lr {lr}", f"interpolate.py --data shapes --holdout 1000 --lr {lr} --method "
                  f"{m}", f"rates/{m.replace(' --normalize ', '-')}-{lr}")
              for m in STEPS
              for lr in ((0.06, 0.12, 0.24) if m[:3] == "tcr" or " " in m else (0.03, 0.06, 0.12))],
    "peak": [Row(f"`{m}`, lr {lr}", f"interpolate.py --data shapes --lr {lr} --method {m}",
                 f"peak/{m.replace(' --normalize ', '-')}", PUBLISHED.get(m, ""), 3)
             for m in STEPS for lr in [BEST.get(m, 0.06)]],
    "collapse": rows("directclr.py", "--head", ("none", "linear", "mlp", "slice"),
                     "--data shapes --temperature 0.5", "collapse", 3),
    "choices": [Row(f"`{command}`", f"{command} --data shapes", f"choices/{name}", "", 3)
                for name, command in (("narrow", "vicreg.py --dim 32 --hidden 32"),
                                      ("tuned", "simclr.py --head expander --temperature 0.15"))],
    "heads-shapes": rows("directclr.py", "--head", HEADS, SMALL, "heads-shapes", 3),
    "cifar-rates": [Row(f"`{command} --lr {lr}`", f"{command} {CIFAR} --epochs 2 --holdout 5000 "
                        f"--lr {lr}", f"cifar-rates/{name}-{lr}")
                    for name, command in SIX.items() for lr in (0.06, 0.12)],
    "cifar": [Row(f"`{command}`", f"{command} {CIFAR} --epochs 20", f"cifar/{name}", "",
                  3 if "directclr" in command else 1) for name, command in SIX.items()],
    **on_a_gpu("cifar10", "gpu-cifar10"),
    **on_a_gpu("data/cifar10_jpeg", "gpu-cifar10_jpeg"),
}

def runs(row):
    """(name, command) of a row's runs, one for each seed."""
    return [(row.name + f"-seed{seed}" * bool(seed), row.command + f" --seed {seed}" * bool(seed))
            for seed in range(row.seeds)]

def read(name):
    """The records of a run's log in tests/results/; none where it is missing or unfinished."""
    path = RESULTS / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return records if records and records[-1].get("final") else []

def cell(values, digits):
    """A mean, with the range over seeds where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1
                   else "")

def table(name, folder):
    """A table in Markdown, of the rows of which a log is there, with links from a folder."""
    found = [(row, [name for name, _ in runs(row) if read(name)]) for row in TABLES[name]]
    found = [(row, logs, [read(name)[-1] for name in logs]) for row, logs in found if logs]
    if not found:
        return "Not trained yet."
    columns = {"kNN": ("knn", 1), "linear": ("linear", 1), "online": ("online", 1),
               "effective rank": ("rank", 1), "s": ("seconds", 0)}
    published = ["published"] * any(row.published for row in TABLES[name])
    lines = [["", *columns, *published, "log"], ["---"] * (len(columns) + len(published) + 2)]
    first = [finals[0] for _, _, finals in found]
    lines.append(["untrained", *(f"{first[0][key]:.1f}" if key in first[0] else "" for key in (
        "knn_untrained", "linear_untrained", "", "rank_untrained", "")), *[""] * len(published), ""])
    for row, logs, finals in found:
        links = [os.path.relpath(RESULTS / f"{name}.jsonl", folder) for name in logs]
        lines.append([
            row.label, *(cell([f[key] for f in finals], n) for key, n in columns.values()),
            *[row.published] * len(published), " ".join(f"[log]({link})" for link in links)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def write(text, folder):
    """A page's text with each table after its marker brought up to its logs."""
    return re.sub(
        r"(<!-- table: (\S+) -->\n\n)((?:(?:\||Not trained).*\n)*)",
        lambda old: f"{old[1]}{table(old[2], folder)}\n" + "\n" * (not old[3]), text)

def draw(path):
    """Accuracies against D, of the table dims: mean and range over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    finals = {row.name[5:]: [read(name)[-1] for name, _ in runs(row) if read(name)]
              for row in TABLES["dims"]}
    for dim in DIMENSIONS:
        finals.setdefault(f"vicreg-tuned-{dim}", finals.get(f"vicreg-{dim}"))
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "0"}):
        figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for panel, (title, key) in zip(panels, {"kNN": "knn", "linear probe": "linear"}.items()):
            for i, method in enumerate(("vicreg", "vicreg-tuned", "vicreg-exp", "vicreg-ctr",
                                        "simclr")):
                dims = [dim for dim in DIMENSIONS if finals.get(f"{method}-{dim}")]
                values = [[final[key] for final in finals[f"{method}-{dim}"]] for dim in dims]
                low, mean, high = zip(*[(min(v), statistics.mean(v), max(v)) for v in values])
                spread = [*map(operator.sub, mean, low)], [*map(operator.sub, high, mean)]
                panel.errorbar([dim * 1.05**i for dim in dims], mean, spread, label=method,
                               marker="os^Dv"[i], markersize=4, capsize=2, linewidth=1)
            panel.set(title=title, xscale="log", xlabel="D", ylabel="accuracy, %")
            panel.set_xticks(DIMENSIONS, DIMENSIONS)
            panel.minorticks_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                      frameon=False)
        figure.savefig(path, metadata={"Date": None})

def train(names, jobs, minutes):
    """Train the tables' runs that have no log, `jobs` at a time; how many failed."""
    queue = [run for name in names for row in TABLES[name] for run in runs(row) if not read(run[0])]
    print(f"{len(queue)} runs to train, {jobs} at a time", flush=True)
    running, failed, end = [], 0, time.time() + 60 * minutes
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    while queue or running:
        over = time.time() > end
        while queue and len(running) < jobs and not over:
            name, command = queue.pop(0)
            folder = RUNS / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            (folder / "last.pt").exists() or shutil.rmtree(folder, ignore_errors=True)  # killed early
            where = ["--resume" if (folder / "last.pt").exists() else "--out",
                     os.path.relpath(folder, ROOT)]
            with open(f"{folder}.txt", "a") as output:
                process = subprocess.Popen(
                    [sys.executable, *command.split(), *where], cwd=ROOT, env=environment,
                    stdout=output, stderr=subprocess.STDOUT)
            running.append((process, name, command))
        for process, name, command in [*running]:
            if process.poll() is None and over:
                process.send_signal(signal.SIGTERM)  # it saves
                process.wait()
            if process.poll() is None:
                continue
            running.remove((process, name, command))
            if process.returncode == 0:
                (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(RUNS / name / "log.jsonl", RESULTS / f"{name}.jsonl")
            # minus: before or after it trained, where nothing catches signals
            failed += process.returncode not in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
            last = Path(f"{RUNS / name}.txt").read_text().splitlines()[-1:]
            print(f"exit {process.returncode}, python {command}: {''.join(last)}", flush=True)
        if over and not running:
            break
        time.sleep(0.2)
    return failed

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    commands.add_parser("write")
    run = commands.add_parser("run")
    run.add_argument("tables", nargs="+", choices=[*TABLES], metavar="TABLE")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    run.add_argument("--minutes", type=float, default=float("inf"),
                     help="save and stop then; the same command goes on")
    args = parser.parse_args(argv)
    if args.command == "write":
        for page in PAGES:
            page.write_text(write(page.read_text(), page.parent))
        draw(ROOT / ".github" / "dims.svg")
    elif args.command == "run":
        sys.exit(bool(train(args.tables, args.jobs, args.minutes)))
    else:
        for name in TABLES:
            print(name)
            for run, command in (run for row in TABLES[name] for run in runs(row)):
                print(f"  {'log' if read(run) else '   '}  python {command}")

if __name__ == "__main__":
    main()
