"""The wheel and the source distribution: what is in them, and that the commands run from a wheel alone."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import rpo_jax

pytest.importorskip("hatchling", reason="the build backend is not in this environment")

ROOT = Path(__file__).parents[1]
WHEEL = f"rpo_jax-{rpo_jax.__version__}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")  # owner/name


def built(target: str, folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)], cwd=ROOT, check=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's files where they are imported from, as pip lays them down."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def outside(installed, tmp_path):
    """Runs a module of the wheel in a folder that has nothing else of the repository."""

    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_has_every_file_of_the_package_and_the_presets_once(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = {f"rpo_jax/{name}" for name in files_below(ROOT / "rpo_jax")}
    presets = {f"rpo_jax/presets/{name}" for name in files_below(ROOT / "configs")}
    about = {name for name in names if name.startswith(f"{WHEEL}.dist-info/")}
    assert set(names) == code | presets | about
    assert len(names) == len(set(names))
    assert f"{WHEEL}.dist-info/licenses/LICENSE" in about


def test_its_description_has_no_link_that_a_package_index_cannot_follow(wheel):
    with zipfile.ZipFile(wheel).open(f"{WHEEL}.dist-info/METADATA") as file:
        about = email.message_from_binary_file(file)
    assert (about["Name"], about["Version"]) == ("rpo-jax", rpo_jax.__version__)
    assert about["License-Expression"] == "Apache-2.0"
    text = about.get_payload()
    assert text.startswith("# rpo_jax")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 5
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    # What they lead to is in the repository.
    own = [re.search(r"/main/([^#]*)", target) for target in targets if f"/{REPOSITORY}/" in target]
    assert own
    assert [found[1] for found in own if found and not (ROOT / found[1]).exists()] == []


def test_the_commands_run_from_the_wheel_outside_the_repository(outside, installed, tmp_path):
    assert outside("-m", "rpo_jax.cli", "--version") == f"rpo-jax {rpo_jax.__version__}\n"
    where = outside("-c", "import rpo_jax.config.presets as p; print(p.__file__, p.preset_folder())").split()
    assert where == [str(installed / "rpo_jax/config/presets.py"), str(installed / "rpo_jax/presets")]
    smaller = ["--data.train_rows", "24", "--run.cache_dir", "cache"]
    said = outside("-m", "rpo_jax.cli", "prepare", "--config", "quickstart_sft", *smaller)
    assert "24 training and" in said
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["cache"])


@pytest.mark.slow
def test_a_model_is_trained_exported_and_reported_from_the_wheel(outside, tmp_path):
    run = ["--run.dir", "run", "--train.steps", "2", "--data.eval_path", "null"]
    outside("-m", "rpo_jax.cli", "train", "--config", "quickstart_sft", *run)
    outside("-m", "rpo_jax.cli", "export", "--run", "run", "--out", "hf")
    outside("-m", "rpo_jax.cli", "report", "--run", "run", "--no-rewards")
    assert (tmp_path / "hf" / "README.md").is_file()
    assert (tmp_path / "report.html").is_file()


def test_the_source_distribution_has_all_that_the_repository_has(tmp_path):
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("only a clone knows what it has")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).exists() and not name.startswith(".ci/")}
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - names == set()


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rpo_jax.__version__
    assert f"## {rpo_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# What names a file of ours on the web, and what names the repository for a program.
NAMED = re.compile(
    r"(?:github\.com|githubusercontent\.com|google\.com/github)/([\w.-]+/[\w.-]+)/(?:blob/)?main/"
    r"|(?:repo_url|repository-code|Repository|Issues|source, extras)\W+https://github\.com/([\w.-]+/[\w.-]+?)[\"/\\\s]"
)


def addresses(root: Path) -> dict[str, set[str]]:
    """The repositories that files name as ours, owner/name, by file."""
    top = [path for path in root.iterdir() if path.suffix in (".md", ".cff", ".yml", ".toml")]
    paths = [*top, *root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb")]
    found = {str(path.relative_to(root)): NAMED.findall(path.read_text(encoding="utf-8")) for path in paths}
    return {name: {one or other for one, other in pairs} for name, pairs in found.items() if pairs}


def test_one_address_everywhere_which_a_release_s_first_command_changes(tmp_path):
    places = addresses(ROOT)
    some = {"pyproject.toml", "CITATION.cff", "mkdocs.yml", "notebooks/quickstart.ipynb", "docs/results.md"}
    assert set(places) > some
    assert {name: found for name, found in places.items() if found != {REPOSITORY}} == {}

    if shutil.which("git") is None:
        pytest.skip("the command is for a clone")
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^git grep .*OWNER/NAME.*$", guide, re.MULTILINE)
    assert REPOSITORY in command
    for name in (*places, "CONTRIBUTING.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    subprocess.run(["bash", "-c", command.replace("OWNER/NAME", "someone/some-name")], cwd=tmp_path, check=True)
    assert addresses(tmp_path) == {name: {"someone/some-name"} for name in places}
    changed = (tmp_path / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "someone/some-name#OWNER/NAME#" in changed, "it can be changed again"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_image_has_torch_for_the_cpu_before_anything_asks_for_it(name):
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [line for line in text.splitlines() if line and not line.startswith("#")]
    installs = [step for step in steps if "pip install" in step]
    assert "--torch-backend cpu" in installs[0]
    assert ("[cuda," in installs[1]) == (name == "gpu")
    assert any("torch.version.cuda is None" in step for step in steps), "and a CUDA build ends the image's"
    copied = [step.split()[1] for step in steps if step.startswith("COPY")]
    assert all((ROOT / source).exists() for source in copied)


def test_the_release_workflow_builds_tries_and_then_publishes():
    path = ROOT / ".github" / "workflows" / "release.yml"
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
    scripts = [step["run"] for step in jobs["build"]["steps"] if "run" in step]
    (tag,) = (script for script in scripts if "__version__" in script)
    for version, status in ((f"v{rpo_jax.__version__}", 0), ("v0.0.0", 1)):
        environment = {**os.environ, "GITHUB_REF_NAME": version}
        assert subprocess.run(["bash", "-c", tag], cwd=ROOT, env=environment).returncode == status


def test_nothing_but_four_extras_asks_for_torch():
    """An index gives its CUDA build to whoever asks: `pip install rpo-jax` alone must not."""
    bringing_torch = ("torch", "sentence-transformers", "accelerate", "peft")
    asking = {
        extra
        for extra, names in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
        if any(re.match(r"[\w-]+", name)[0] in bringing_torch for name in names)
    }
    assert asking == {"encoder", "lm-eval", "minilm", "test"}
