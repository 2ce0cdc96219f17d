"""Files of others: they run no code, lead nowhere else, take no more than an honest file, and see no secret."""

import copy
import json
import re
import shutil
from pathlib import Path

import datasets
import jax
import pytest
import yaml

from rpo_jax import export, models, train
from rpo_jax.config.reading import known_keys, load_config
from rpo_jax.core.files import inside, read_json
from rpo_jax.core.records import Message, PreferenceExample, Response
from rpo_jax.data import chat_template
from rpo_jax.data.chat_template import ChatTemplate, TemplateError
from rpo_jax.data.limited_process import Stopped
from rpo_jax.data.sources import read_rows
from rpo_jax.data.tokenize import TokenLimits, tokenize_examples
from rpo_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tests.fuzz_files import run
from tests.runs import settings, write_rows
from tests.worlds import small_model

ROOT = Path(__file__).parents[1]
MESSAGES = (Message("system", "Be brief."), Message("user", "Hi é \ud800"))
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A whole model folder, its weights in two files."""
    folder = tmp_path_factory.mktemp("honest")
    train_tokenizer(["some words to learn from"] * 3, 320, folder / "tokenizer")
    params = models.init_params(small_model(), jax.random.key(0))
    size = 4 * models.count_params(small_model())
    return models.save_pretrained(
        folder / "model", small_model(), params, tokenizer=folder / "tokenizer", max_shard_bytes=size * 2 // 3
    )


@pytest.fixture
def folder(honest, tmp_path):
    """A copy of the honest folder to damage, alone in its parent."""
    return Path(shutil.copytree(honest, tmp_path / "models" / "model"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def evil(folder, sentinel):
    """A module that leaves a mark when it is imported, under the names that auto_map gives it."""
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w').close()\nclass Evil: pass\n")
    return {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


# --- no code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "w.pkl", "w.npy"])
def test_pickles_and_what_may_hold_them_are_refused_with_the_way_out(name, folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"pickled weights .*can run code when read\. Convert them once"):
        models.check_pretrained(folder)


def test_nothing_in_the_package_unpickles_or_trusts_remote_code():
    words = re.compile(
        r"import pickle|torch\.load|allow_pickle=True|trust_remote_code=True|yaml\.load\(|(?<![\w.])(eval|exec)\("
    )
    for file in (ROOT / "rpo_jax").rglob("*.py"):
        assert not [line for line in file.read_text().splitlines() if words.search(line)], file


def test_a_config_that_names_code_runs_none(folder, tmp_path):
    edit(folder / "config.json", auto_map=evil(folder, tmp_path / "mark"), trust_remote_code=True)
    models.load_pretrained(folder)
    load_tokenizer(folder)
    assert not (tmp_path / "mark").exists()
    again = models.save_pretrained(tmp_path / "out", *models.load_pretrained(folder), tokenizer=folder)
    assert "auto_map" not in (again / "config.json").read_text()
    assert not (again / "evil.py").exists()


@pytest.mark.parametrize("key", ["auto_map", "init_inputs", "gguf_file", "tokenizer_object"])
def test_a_tokenizer_that_names_code_or_other_files_is_refused(key, folder, tmp_path):
    edit(folder / "tokenizer_config.json", **{key: evil(folder, tmp_path / "mark")})
    with pytest.raises(ValueError, match=f"sets {key}, which names code or files"):
        load_tokenizer(folder)
    assert not (tmp_path / "mark").exists()


def test_a_configuration_file_cannot_name_code(tmp_path):
    file = tmp_path / "config.yaml"
    for tag in ("!!python/object/apply:os.system", "!!python/name:os.system"):
        file.write_text(f"run:\n  dir: {tag} ['touch {tmp_path / 'mark'}']\n")
        with pytest.raises(ValueError, match="not valid YAML"):
            load_config(file)
    file.write_text(yaml.safe_dump({"data": {"class_path": "os.system", "init_args": {"command": "true"}}}))
    with pytest.raises(ValueError, match=r"unknown configuration key 'data\.class_path'"):
        load_config(file)
    assert not (tmp_path / "mark").exists()


# --- no way out of the folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../other/w.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x" * 300, "\0", ""]
)
def test_an_index_cannot_lead_out_of_its_folder(name, folder):
    keys = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=dict.fromkeys(keys, name))
    with pytest.raises(ValueError, match="no safetensors file beside it"):
        models.check_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "config.json", INDEX, "tokenizer.json", "tokenizer_config.json"]
)
def test_a_link_cannot_lead_out_of_its_folder(name, folder, tmp_path):
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match="leads out of"):
        load_tokenizer(folder) if name.startswith("tokenizer") else models.check_pretrained(folder)
    if name.startswith("tokenizer"):
        with pytest.raises(ValueError, match="leads out of"):
            models.save_pretrained(tmp_path / "out", *models.load_pretrained(folder), tokenizer=folder)


def test_the_hubs_cache_of_links_is_a_folder_like_any_other(honest, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(honest.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert models.check_pretrained(snapshot) == models.check_pretrained(honest)
    assert len(load_tokenizer(snapshot)) == len(load_tokenizer(honest))


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", 3])
def test_a_data_set_cannot_lead_out_of_its_folder(name, tmp_path):
    data, splits = datasets.Dataset.from_dict({"prompt": ["p"]}), tmp_path / "splits"
    data.save_to_disk(tmp_path / "data")
    datasets.DatasetDict({"train": data}).save_to_disk(splits)
    assert len(list(read_rows(tmp_path / "data"))) == len(list(read_rows(splits))) == 1
    edit(tmp_path / "data" / "state.json", _data_files=[{"filename": name}])
    edit(splits / "dataset_dict.json", splits=[name])
    for folder in (tmp_path / "data", splits):
        with pytest.raises(ValueError, match=r"leads out of|by something else than texts"):
            list(read_rows(folder))


def test_a_link_in_a_folder_of_rows_cannot_lead_out_of_it(tmp_path):
    (tmp_path / "elsewhere.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"'train\.jsonl' leads out of"):
        list(read_rows(tmp_path / "data"))


def test_names_and_sizes_of_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "circle").symlink_to("circle")
    assert read_json(tmp_path, "a.json") == {"a": 1}
    for name, message in [("../a", "leads out"), ("/a", "leads out"), ("\0", "cannot be"), ("y" * 9999, "cannot be")]:
        with pytest.raises(ValueError, match=message):
            inside(tmp_path, name)
    with pytest.raises(ValueError, match=r"has 8 bytes; no such file needs more than 7\."):
        read_json(tmp_path, "a.json", max_bytes=7)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(tmp_path, "deep.json")


# --- chat templates ------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(folder):
    yield load_tokenizer(folder)
    chat_template.close_worker()


LIKE_LLAMA = """
{%- set ns = namespace(n=0) -%}
{%- for m in messages -%}
    {%- set ns.n = ns.n + 1 -%}
    {%- if loop.index0 > 8 %}{% break %}{% endif -%}
    {{- bos_token ~ m['role'] ~ ':' }}{% generation %}{{ m['content'] | trim }}{% endgeneration %}
    {{- m | tojson(indent=2) }}
{% endfor %}
{%- if tools is none and documents is not defined %}x{% endif %}
{{ dict(a=1) | tojson }} {{ strftime_now('%Y') }} {{ ns.n }}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def render_messages(tokenizer):
    (outcome,) = ChatTemplate(tokenizer).render([(MESSAGES, True)])
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


@pytest.mark.parametrize(
    "template", [LIKE_LLAMA, "{{ messages[0].content }}\n", "{% for m in messages %}[{{ m.role }}]\n{% endfor %}"]
)
def test_a_template_renders_as_transformers_has_it(template, tokenizer):
    tokenizer.chat_template = template
    given = [message.to_dict() for message in MESSAGES]
    expected = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    assert render_messages(tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 s for one prompt",
        ),
        ("{% for x", "cannot be used: TemplateSyntaxError"),
    ],
)
def test_a_template_that_is_beyond_use_stops_the_run(template, message, tokenizer, monkeypatch):
    """Not one row after another: each would take its time, and none is to blame."""
    tokenizer.chat_template = template
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1.0 if "more than" in message else 20.0)
    example = PreferenceExample("file:1", MESSAGES, (Response("chosen", "yes"), Response("rejected", "no")))
    with pytest.raises(TemplateError, match=message):
        tokenize_examples([example] * 50, tokenizer, TokenLimits(8, 16, "keep_end", template="chat"))


def load_with(tokenizer, template):
    """The tokenizer with another template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def test_a_template_that_fails_once_is_not_used_half(tokenizer, monkeypatch):
    """A worker that dies at the first question would leave no end token, and the next one would go on without."""
    failures, exchange = [Stopped("it used too much memory")], chat_template._Worker.exchange

    def fails_once(worker, request, seconds):
        answer = exchange(worker, request, seconds)
        if seconds == chat_template.RENDER_SECONDS and failures:
            raise failures.pop()
        return answer

    monkeypatch.setattr(chat_template._Worker, "exchange", fails_once)
    other = load_with(tokenizer, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{# fails once #}")
    example = PreferenceExample("file:1", MESSAGES, (Response("chosen", "yes"), Response("rejected", "no")))
    with pytest.raises(TemplateError, match="stopped: it used too much memory for one prompt"):
        tokenize_examples([example], other, TokenLimits(8, 16, "keep_end"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**11 }}", "MemoryError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception.__globals__.x }}", "SecurityError|Undefined"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for a in range(99999) %}{{ 'abcdefghij' * 100 }}{% endfor %}", "writes more than 67,108,864 characters"),
        ("{{ raise_exception('only users') }}", "only users"),
    ],
)
def test_a_template_gets_no_further_than_its_prompt(template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        render_messages(tokenizer)


def test_after_an_interrupt_no_answer_is_taken_for_the_next_ones(tokenizer, monkeypatch):
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat = ChatTemplate(tokenizer)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rpo_jax.data.limited_process.os.read", interrupt)  # the answer is there, and nobody takes it
        with pytest.raises(KeyboardInterrupt):
            chat.render([((Message("user", "first"),), True)])
    assert chat.render([((Message("user", "second"),), True)]) == ["second"]


def test_a_template_sees_no_environment(tokenizer, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    tokenizer.chat_template = "{{ 1 }}"
    render_messages(tokenizer)
    (worker,) = chat_template._kept.values()
    assert b"a-secret" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()


# --- secrets -------------------------------------------------------------------------------------------------------


def test_no_setting_can_hold_a_secret_and_none_reaches_what_a_run_writes(tmp_path, monkeypatch, capfd):
    """A key has no place in the configuration, and the environment's goes into no file and no message."""
    assert not [
        key for key in known_keys() if key.rpartition(".")[2] in ("key", "api_key", "token", "password", "secret")
    ]
    with pytest.raises(ValueError, match="unknown configuration key"):
        load_config(None, ["tracking.wandb_api_key=abc"])
    secrets = {name: f"secret-of-{name}" for name in ("WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "JUDGE_API_KEY")}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    data = write_rows(tmp_path / "data.jsonl")
    words = settings(data, tmp_path / "run", tmp_path / "cache", {"train.steps": 1, "contrast.weights": "uniform"})
    assert train.main([f"--{word}" for word in words]) == 0
    assert export.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    printed = "".join(capfd.readouterr())
    assert "checkpoint" in printed
    texts = (printed.encode(), *written)
    assert not any(secret.encode() in text for text in texts for secret in secrets.values())


# --- anything else -------------------------------------------------------------------------------------------------


THOUSANDS = [
    pytest.param(first, 1000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]) for first in range(0, 10_000, 1000)
]


@pytest.mark.parametrize(("first", "mutations"), [(0, 20), *THOUSANDS])
def test_every_damaged_folder_loads_or_is_refused(first, mutations):
    report = run(mutations, seed=0, first=first)
    assert report["tried"] == mutations
    assert report["failures"] == []
    assert 0.5 < report["outcomes"]["refused"] / mutations < 0.95, "most mutations should matter, not all"
    assert report["honest_taken"] < 2 * report["honest_bytes"]
