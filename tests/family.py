"""Take the scripts apart into their sections, compare them, and bring them back into step.

python tests/family.py --fix simclr.py    copy simclr.py's [shared] sections into the other scripts
"""

import argparse
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ("simclr.py", "vicreg.py", "directclr.py", "interpolate.py")
SCRIPTS = (*TRAINING, "analyze.py")
LINES = {"simclr.py": 700, "vicreg.py": 700, "directclr.py": 700, "interpolate.py": 900,
         "analyze.py": 650, "README.md": 220, "tests/*.py": 3200}  # at most
BANNER = re.compile(r"# ==== (\d+)\. (.+) \[(shared|method|own)\] =+\n")

def sections(text):
    """Split a script into [(number, title, tag, text)]; the texts joined give the script again.
    What precedes the first banner is section 0, the docstring. Raises ValueError where a banner is
    malformed, out of order, or not the file's full width.
    """
    parts = [(0, "Docstring", "method", "")]
    for line in text.splitlines(keepends=True):
        match = BANNER.fullmatch(line)
        if line.startswith("# ==") and (not match or len(line) != 101):
            raise ValueError(f"malformed banner: {line.rstrip()}")
        if match:
            number = int(match[1])
            if number != parts[-1][0] + 1:
                raise ValueError(f"section {number} follows section {parts[-1][0]}")
            parts.append((number, match[2], match[3], ""))
        parts[-1] = (*parts[-1][:3], parts[-1][3] + line)
    return parts

def drift(texts):
    """Differences between the [shared] sections of scripts {name: text}, as unified diffs; and a
    script whose list of (number, title, tag) is not the first one's."""
    (first, text), *others = texts.items()
    reference, found = sections(text), []
    for name, text in others:
        parts = sections(text)
        if [p[:3] for p in parts] != [p[:3] for p in reference]:
            found.append(f"{name}: sections {[p[:3] for p in parts]} are not {first}'s")
            continue
        for mine, theirs in zip(parts, reference):
            if mine[2] == "shared" and mine[3] != theirs[3]:
                found.append("".join(difflib.unified_diff(
                    theirs[3].splitlines(True), mine[3].splitlines(True), first, name)))
    return found

def fix(source, target):
    """Return target with every [shared] section replaced by source's of the same number."""
    shared = {part[0]: part for part in sections(source) if part[2] == "shared"}
    return "".join((shared[part[0]] if part[2] == "shared" else part)[3]
                   for part in sections(target))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--fix", metavar="SCRIPT", required=True, choices=TRAINING)
    source = parser.parse_args().fix
    for name in TRAINING:
        text = (ROOT / name).read_text()
        fixed = fix((ROOT / source).read_text(), text)
        if fixed != text:
            (ROOT / name).write_text(fixed)
            print(f"{name}: shared sections now {source}'s")
