"""The built wheel, away from the checkout: every command finds its data inside the package."""

import json
import os
import subprocess
import sys
import venv

import pytest

from tests.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder outside the checkout with an environment that holds the wheel and what it asks for.

    The verified versions are taken, as launch/setup.sh takes them.
    """
    pytest.importorskip("build", reason="needs the build package and a package registry")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    install = [str(folder / "env" / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    bounds = ["--no-compile", "-c", str(ROOT / "launch" / "constraints.txt")]
    subprocess.run([*install, *bounds, str(wheel)], check=True)
    return folder


def run(place, *arguments):
    result = subprocess.run(
        [str(place / "env" / "bin" / "llm-vtrans"), *arguments],
        cwd=place, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_command_runs(place):
    small = ("--samples", "64", "--seq-len", "64", "--layout", "per-layer")
    made = json.loads(run(place, "prune", *small, "--output", "run", "--json"))
    assert made["params"]["after"] < made["params"]["before"]
    assert (place / "run" / "report" / "index.html").is_file()
    run(place, "export", "--from", "run", "--sparsity", "0.3", "--output", "larger")
    assert "ok      perplexity" in run(place, "verify", "larger")
    probing = ("--samples", "4", "--seq-len", "32")
    assert "Attention of the dense" in run(
        place, "probe", "--model", "embedded", "--run", "run", *probing
    )
    scoring = ("--baseline", "embedded", "--limit", "2", "--output", "scores.json")
    table = run(place, "score", "--model", "run", "--tasks", "embedded_heldout", *scoring)
    assert "word_perplexity" in table
    run(place, "report", "run", "--scores", "scores.json")
    html = (place / "run" / "report" / "index.html").read_text()
    assert "embedded_heldout, word_perplexity" in html and "What the heads look at" in html
    assert "nothing was sent" in run(place, "publish", "run", "--repo", "me/tiny", "--dry-run")
